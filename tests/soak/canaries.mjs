// 64 clients x 50 requests, each with a secret of its own: nothing lost, nothing mixed up, and the greedy text is
// what the same request gets alone.
import { check, filler, flags, metric, parallel, request, secret } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", clients: 64, requests: 50, slots: 8, solo: 200 });
const keys = ["one", "two", "three", "four"];
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "--metrics", "-np", String(f.slots),
  ...keys.flatMap((k) => ["--api-key", k])]);
const url = server.url + "/v1/completions";

const body = (i) => {
  const s = secret(i);
  return { prompt: filler(20 + (i % 7) * 12, i) + " " + s.fact + " " + filler(10, i + 5000) + s.question, max_tokens: 24, temperature: 0, stream: i % 3 === 0 };
};
// A stream may begin with a comment, and end with an error: then its request is lost.
const text = (r) => {
  if (r.json !== undefined) return r.json?.choices?.[0].text;
  const events = r.body.split("\n\n").filter((l) => l.startsWith("data: {")).map((l) => JSON.parse(l.slice(6)));
  return events.some((e) => e.error) ? undefined : events.map((e) => e.choices[0]?.text ?? "").join("");
};
const ask = (i) => request(url, { body: body(i), headers: { Authorization: "Bearer " + keys[i % keys.length] } });

const n = f.clients * f.requests, answers = new Map();
let lost = 0, right = 0, foreign = 0;
const codes = new Map(Array.from({ length: n }, (_, i) => [secret(i).code, i]));
const start = performance.now();
await parallel(n, f.clients, async (i) => {
  const r = await ask(i).catch(() => undefined);
  const got = r && text(r);
  if (r?.status !== 200 || got === undefined) return void ++lost;
  answers.set(i, got);
  if (got.trim() === secret(i).code) ++right;
  else if (codes.has(got.trim()) && !body(i).prompt.includes(got.trim())) ++foreign;
});
const seconds = (performance.now() - start) / 1000;
let different = 0;
const step = Math.max(1, Math.floor(n / f.solo));
for (let i = 0; i < n; i += step) if (text(await ask(i)) !== answers.get(i)) ++different;

check(`${n} requests by ${f.clients} clients: lost`, lost === 0, `${lost}`);
check("answers with another request's secret", foreign === 0, `${foreign}`);
check(`greedy text differs from the solo run (${Math.ceil(n / step)} compared)`, different === 0, `${different}`);
console.log(`     ${right} of ${n} answers name their own secret; ${(n / seconds).toFixed(1)} requests/s`);
check("exit code after SIGTERM", (await server.stop()) === 0);
