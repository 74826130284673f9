// How many contexts of 16k tokens fit in 256 MiB of K/V, all still answering rightly: each is read once, and then
// asked again, when all of them are held. With --profile, contexts are compressed further when the budget is tight.
import { check, filler, flags, get, metric, request, secret } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", profile: "", contexts: 32, tokens: 16000, budget: 256 });
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []),
  ...(f.profile ? ["--profile", f.profile] : []), "--metrics", "-np", "4",
  "--kv-budget-mib", String(f.budget)]);
const url = server.url + "/v1/completions";

const words = async (n, seed) => {  // a text of about n tokens
  const text = filler(n, seed);
  const { json } = await request(server.url + "/tokenize", { body: { content: text } });
  return text.split(" ").slice(0, Math.floor(n * n / json.count)).join(" ");
};
const facts = 3;
const prompts = [];
for (let c = 0; c < f.contexts; ++c) {
  const parts = (await words(f.tokens - 150, c + 1)).split(" ");
  const own = Array.from({ length: facts }, (_, k) => secret(c * facts + k));
  own.forEach((s, k) => parts.splice(Math.floor(parts.length * (k + 1) / (facts + 1)), 0, s.fact));
  prompts.push({ text: parts.join(" "), own });
}
const ask = async (c, k) => {
  const r = await request(url, { body: { prompt: prompts[c].text + prompts[c].own[k].question, max_tokens: 12, temperature: 0 } });
  if (r.status !== 200) throw new Error(r.body);
  return { right: r.json.choices[0].text.trim() === prompts[c].own[k].code, usage: r.json.usage, timings: r.json.timings };
};

let first = 0, again = 0, held = 0, full = 0;
for (let c = 0; c < f.contexts; ++c) {
  const a = await ask(c, 0);
  first += a.right;
  full += a.timings.kv.full_bytes;
}
for (let c = 0; c < f.contexts; ++c)
  for (let k = 1; k < facts; ++k) {
    const a = await ask(c, k);
    again += a.right;
    if (k === 1 && a.usage.prompt_tokens_details.cached_tokens >= a.usage.prompt_tokens - 400) ++held;
  }
const peak = (await metric(server.url, "kv_peak_bytes")) / 2 ** 20;
console.log(`     full caches of these would take ${(full / 2 ** 20).toFixed(0)} MiB; ${await metric(server.url, "compressions_total")} compressions, ${await metric(server.url, "evictions_total")} evictions`);
check(`contexts of ${f.tokens} tokens held within ${f.budget} MiB`, held === f.contexts, `${held} of ${f.contexts}`);
check("answers right at first", first >= 0.9 * f.contexts, `${first} of ${f.contexts}`);
check("answers right when all are held", again >= 0.9 * f.contexts * (facts - 1), `${again} of ${f.contexts * (facts - 1)}`);
check("peak of K/V within the budget", peak <= f.budget, `${peak.toFixed(1)} MiB`);
check("exit code after SIGTERM", (await server.stop()) === 0);
