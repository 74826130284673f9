// Time to the first token: a first request on a long prefix against a second one with another question. And, with
// --store, the same for a second server that gets the prefix from a folder or from Valkey.
import { check, filler, flags, request, secret, sleep } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", tokens: 16000, rounds: 3, store: "" });
const args = ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "--metrics",
  ...(f.store ? [f.store.includes("://") ? "--kv-store" : "--kv-dir", f.store] : [])];
const server = await startServer(f.moend, args);
const median = (v) => v.sort((a, b) => a - b)[Math.floor(v.length / 2)];

const prompt = async (url, seed) => {
  const text = filler(f.tokens, seed);
  const { json } = await request(url + "/tokenize", { body: { content: text } });
  const words = text.split(" ").slice(0, Math.floor(f.tokens * (f.tokens - 150) / json.count));
  words.splice(words.length / 3, 0, secret(seed).fact);
  words.splice(words.length / 2, 0, secret(seed + 100).fact);
  return words.join(" ");
};
const firstToken = async (url, text) => {
  const start = performance.now();
  let ms = 0;  // to the first event; comments that keep the connection alive are none
  const r = await request(url + "/v1/completions", {
    body: { prompt: text, max_tokens: 8, temperature: 0, stream: true, stream_options: { include_usage: true } },
    onData: (body) => { if (!ms && body.includes("data: {")) ms = performance.now() - start; },
  });
  const events = r.body.split("\n\n").filter((l) => l.startsWith("data: {")).map((l) => JSON.parse(l.slice(6)));
  return { ms, cached: events.at(-1).usage.prompt_tokens_details.cached_tokens, text: events.map((e) => e.choices[0]?.text ?? "").join("") };
};

const first = [], second = [], texts = [];
for (let i = 1; i <= f.rounds; ++i) {
  const text = await prompt(server.url, i);
  texts.push(text);
  first.push((await firstToken(server.url, text + secret(i).question)).ms);
  const again = await firstToken(server.url, text + secret(i + 100).question);
  second.push(again.ms);
  console.log(`     ${first.at(-1).toFixed(0)} ms, then ${again.ms.toFixed(0)} ms with ${again.cached} tokens from the cache; the answer${again.text}, the secret ${secret(i + 100).code}`);
}
const ratio = median([...first]) / median([...second]);
check("the second first token comes sooner", ratio >= 20, `${ratio.toFixed(1)} times (medians of ${f.rounds})`);
if (f.store) {
  await sleep(1000);
  const other = await startServer(f.moend, args);
  const r = await firstToken(other.url, texts[0] + secret(101).question);
  check("another server starts from the store", r.cached > 0.9 * f.tokens, `${r.ms.toFixed(0)} ms, ${r.cached} tokens`);
  await other.stop();
}
check("exit code after SIGTERM", (await server.stop()) === 0);
