// An hour of mixed work: questions with secrets, chats that go on, long prompts, clients that leave, and hostile
// ones. Prints memory and latency every minute; not part of `make test`.
import { check, filler, flags, get, memory, metric, random, request, secret, sleep } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", minutes: 60, clients: 12, budget: 128, every: 60, threads: 0 });
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), ...(f.threads ? ["-t", String(f.threads)] : []), "--metrics", "--kv-budget-mib", String(f.budget)]);
const pick = random(17), end = Date.now() + 60000 * f.minutes;
const count = { asked: 0, right: 0, left: 0, refused: 0, failed: 0, mixed: 0 };
let latencies = [];

async function question(i, words) {
  const s = secret(i), start = performance.now();
  const r = await request(server.url + "/v1/completions", { body: { prompt: filler(words, i) + " " + s.fact + " " + filler(30, i + 9) + s.question, max_tokens: 12, temperature: 0 } });
  latencies.push(performance.now() - start);
  ++count.asked;
  if (r.status !== 200) return void ++count.failed;
  const text = r.json.choices[0].text.trim();
  count.right += text === s.code;
  count.mixed += /^\d{5}$/.test(text) && text !== s.code && Array.from({ length: 1000 }, (_, k) => secret(k).code).includes(text);
}

async function chat(i) {
  const messages = [{ role: "system", content: filler(400, i) + " " + secret(i).fact }];
  for (let turn = 0; turn < 4; ++turn) {
    messages.push({ role: "user", content: secret(i).question.split("\n")[1].replace("Question: ", "") });
    const r = await request(server.url + "/v1/chat/completions", { body: { messages, max_tokens: 24, temperature: 0 } });
    if (r.status !== 200) return void ++count.failed;
    messages.push({ role: "assistant", content: r.json.choices[0].message.content });
  }
}

async function leave(i) {
  const abort = new AbortController();
  setTimeout(() => abort.abort(), pick(1500));
  await request(server.url + "/v1/completions", { body: { prompt: filler(50 + pick(3000), i), max_tokens: 500, stream: pick(2) === 1 }, signal: abort.signal }).catch(() => {});
  ++count.left;
}

async function refuse() {
  const r = await request(server.url + "/v1/completions", { body: { prompt: "x", temperature: -1 - pick(5) } });
  count.refused += r.status === 400;
}

const work = Array.from({ length: f.clients }, async () => {
  while (Date.now() < end) {
    const i = pick(1000), kind = pick(10);
    await (kind < 5 ? question(i, 20 + pick(600)) : kind < 6 ? question(i, 4000) : kind < 8 ? chat(i) : kind < 9 ? leave(i) : refuse()).catch(() => ++count.failed);
  }
});
const quantile = (q) => latencies.length ? latencies.sort((a, b) => a - b)[Math.min(latencies.length - 1, Math.floor(q * latencies.length))] / 1000 : 0;
console.log("minute   RSS MiB  K/V MiB  idle ctx  asked  right  left  failed  p50 s  p99 s");
const resident = [];
const report = async () => {
  const m = memory(server.pid);
  resident.push(m.rss);
  console.log([((Date.now() - (end - 60000 * f.minutes)) / 60000).toFixed(1).padStart(6), m.rss.toFixed(0).padStart(9), ((await metric(server.url, "kv_bytes")) / 2 ** 20).toFixed(1).padStart(8),
    String(await metric(server.url, "idle_contexts")).padStart(9), String(count.asked).padStart(6), String(count.right).padStart(6), String(count.left).padStart(5),
    String(count.failed).padStart(7), quantile(0.5).toFixed(2).padStart(6), quantile(0.99).toFixed(2).padStart(6)].join(" "));
  latencies = [];
};
while (Date.now() < end) {
  await sleep(Math.min(1000 * f.every, Math.max(1, end - Date.now())));
  await report();
}
await Promise.all(work);
const peak = (await metric(server.url, "kv_peak_bytes")) / 2 ** 20;
check("no request failed", count.failed === 0, `${count.failed}`);
check("no answer held another request's secret", count.mixed === 0, `${count.mixed}`);
check("K/V never exceeded the budget", peak <= f.budget, `${peak.toFixed(1)} of ${f.budget} MiB`);
const half = resident.slice(Math.floor(resident.length / 4)), grown = half.at(-1) - half[0];
check("memory is steady after the first quarter", grown < 24, `${grown >= 0 ? "+" : ""}${grown.toFixed(0)} MiB`);
check("exit code after SIGTERM", (await server.stop()) === 0);
