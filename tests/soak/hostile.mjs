// Thousands of hostile requests: every field with hostile values, bodies cut and nested and not UTF-8, heads that
// are no heads. The process stays the same, and every reply is an error of the client's or a valid answer.
import { check, flags, get, memory, parallel, random, raw } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", requests: 5000, seed: 1 });
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "--metrics",
  "--header-timeout", "2", "--body-timeout", "2", "--idle-timeout", "2", "--max-tokens", "4096"]);
const pick = random(f.seed), one = (list) => list[pick(list.length)];

const fields = ["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
  "stream", "stream_options", "logprobs", "top_logprobs", "n", "best_of", "echo", "suffix", "logit_bias", "frequency_penalty", "presence_penalty",
  "user", "tools", "tool_choice", "response_format", "cache_prompt", "kv_layers", "content", "tokens", "add_special", "with_pieces", "ignore_eos",
  "functions", "metadata", "store", "parallel_tool_calls", "id_slot", "n_predict", "grammar", "json_schema"];
const values = ["null", "true", "false", "0", "-0", "1", "-1", "2", "1.5", "1e308", "-1e308", "1e-320", "2147483647", "2147483648", "4294967296",
  "-2147483649", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616", "1e400", "NaN", "Infinity",
  "\"\"", "\"x\"", "\"\\u0000\"", "\"\\ud800\"", "\"\\udc00\\ud800\"", "\"\xff\xfe\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"", "\"" + "A".repeat(70000) + "\"",
  "\"<|end|><|doc|><|im_start|>\"", "\"" + "\\n".repeat(5000) + "\"", "[]", "{}", "[[]]", "[null]", "[{}]", "{\"a\":{\"b\":[]}}", "[-1]", "[8191,8192]",
  "[1e9]", "[" + "1,".repeat(20000) + "1]", "[" + "[],".repeat(20000) + "[]]", "[".repeat(40) + "]".repeat(40), "{\"a\":".repeat(100) + "1" + "}".repeat(100),
  "[\"a\",\"b\",\"c\"]", "[{\"role\":\"user\"}]", "[{\"role\":\"user\",\"content\":\"hi\"}]", "[{\"role\":\"system\",\"content\":[{\"type\":\"text\",\"text\":\"\\u0000\"}]}]",
  "[{\"role\":\"user\",\"content\":" + "[".repeat(20) + "]".repeat(20) + "}]", "{\"include_usage\":5}", "{\"1\":\"x\"}", "{\"-5\":1}", "{\"99999999999\":1}"];
const paths = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/slots", "/metrics", "/health", "/", "/v1/models/%00",
  "/../../etc/passwd", "/v1/" + "a/".repeat(900), "/?" + "x=".repeat(900)];
const base = `"max_tokens":2,"prompt":"x","messages":[{"role":"user","content":"x"}],"content":"x","tokens":[1]`;

function hostile(i) {
  const kind = pick(20);
  if (kind === 0) return one(["", "\r\n\r\n", "GET", "GET / HTTP/1.1\r\n", "\0\0\0\0", "GET / HTTP/9.9\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "GET / HTTP/1.1\r\n" + "a: b\r\n".repeat(500) + "\r\n", "GET / HTTP/1.1\r\na: " + "b".repeat(100000) + "\r\n\r\n", "GET /" + "a".repeat(50000) + " HTTP/1.1\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n", "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}", "GET / HTTP/1.1\r\nRange: bytes=0-1,2-3," + "4-5,".repeat(1000) + "\r\n\r\n"]);
  const deep = pick(1e6);
  let body = kind === 1 ? "[".repeat(deep) : kind === 2 ? `{"a":`.repeat(Math.min(deep, 200000)) : kind === 3 ? "{" + base + `,"prompt":"${"word ".repeat(pick(60000))}"}`
    : "{" + base + `,"${fields[i % fields.length]}":${values[Math.floor(i / fields.length) % values.length]}` + (pick(2) ? `,"${one(fields)}":${one(values)}` : "") + "}";
  if (pick(10) === 0) body = body.slice(0, pick(body.length) + 1);
  if (pick(10) === 0) { const at = pick(body.length); body = body.slice(0, at) + String.fromCharCode(pick(256)) + body.slice(at + 1); }
  const path = pick(5) ? paths[i % 4] : one(paths), method = pick(20) ? "POST" : one(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "post", "G\0T"]);
  const length = pick(30) ? Buffer.byteLength(body, "latin1") : pick(1e9);
  let bytes = `${method} ${path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: ${length}\r\n\r\n${body}`;
  if (pick(40) === 0) bytes = bytes.slice(0, pick(bytes.length) + 1);
  return bytes;
}

const pid = server.pid, before = memory(pid), count = {};
const wrong = [];
await parallel(f.requests, 16, async (i) => {
  const bytes = hostile(i);
  const reply = await raw(server.url, Buffer.from(bytes, "latin1"), 60);
  const status = Number(/^HTTP\/1\.1 (\d{3}) /.exec(reply)?.[1] ?? 0);
  count[status] = (count[status] ?? 0) + 1;
  // No status: the client cut its request short and the server closed. 501 and 505 are the client's doing, too.
  if (!(status === 0 || status === 200 || (status >= 400 && status < 500) || status === 501 || status === 505)) wrong.push([bytes.slice(0, 300), reply.slice(0, 300)]);
  const body = reply.slice(reply.indexOf("\r\n\r\n") + 4);
  if (status >= 400 && !/^HEAD/.test(bytes)) {
    try { if (typeof JSON.parse(body).error.message !== "string") throw 0; } catch { wrong.push([bytes.slice(0, 300), reply.slice(0, 300)]); }
  }
});
const after = memory(pid);
for (const [bytes, reply] of wrong.slice(0, 5)) console.log(JSON.stringify(bytes), "->", JSON.stringify(reply));
check(`${f.requests} hostile requests`, wrong.length === 0, Object.entries(count).map(([s, n]) => `${s === "0" ? "closed" : s}: ${n}`).join(", "));
check("the same process answers", (await get(server.url + "/health")).status === 200);
console.log(`     memory ${before.rss.toFixed(0)} -> ${after.rss.toFixed(0)} MiB, peak ${after.peak.toFixed(0)} MiB`);
check("exit code after SIGTERM", (await server.stop()) === 0);
