// Tokens per second of one decoding stream against several at once.
import { check, filler, flags, request } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", streams: 8, tokens: 256, prompt: 1000, rounds: 3 });
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "-np", String(f.streams), "--no-prefix-cache"]);

// The logit bias keeps the end token away, so that every stream has all its tokens.
const ends = (await request(server.url + "/tokenize", { body: { content: "<|end|><|doc|>" } })).json.tokens;
const logit_bias = Object.fromEntries(ends.map((t) => [t, -100]));
const decode = async (i) => {
  const r = await request(server.url + "/v1/completions", { body: { prompt: filler(f.prompt, i + 1), max_tokens: f.tokens, temperature: 0, logit_bias } });
  if (r.json?.usage?.completion_tokens !== f.tokens) throw new Error(r.body);
  return r.json.timings;
};
await decode(0);
let one = 0, many = 0;
for (let round = 0; round < f.rounds; ++round) {
  const single = await decode(1);
  one = Math.max(one, 1000 * (f.tokens - 1) / single.predicted_ms);
  // Each stream decodes alone while the others' prompts are read; only the time when all decode counts: from the
  // last first token on, every stream still has some of its tokens to go.
  const all = await Promise.all(Array.from({ length: f.streams }, (_, i) => decode(i)));
  const last = all.reduce((a, b) => (a.predicted_ms < b.predicted_ms ? a : b));
  many = Math.max(many, f.streams * 1000 * (f.tokens - 1) / last.predicted_ms);
}
console.log(`     one stream ${one.toFixed(1)} tokens/s, ${f.streams} streams ${many.toFixed(1)} tokens/s`);
check(`throughput of ${f.streams} streams`, many >= 3 * one, `${(many / one).toFixed(2)} times one`);
check("exit code after SIGTERM", (await server.stop()) === 0);
