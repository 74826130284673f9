// Clients that leave while they wait, while their prompt is read, while their answer is made, and while it is
// streamed. Every slot must be idle 2 s later, memory must not grow, and a control stream must not notice.
import { check, filler, flags, get, memory, metric, random, request, sleep } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", clients: 500, slots: 8, rounds: 6 });
const server = await startServer(f.moend, ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "--metrics", "-np", String(f.slots)]);
const url = server.url + "/v1/completions";
const pick = random(5);

// Leaves after `ms`, or at the first byte of the body.
async function leave({ prompt, stream, ms, atFirstByte }) {
  const abort = new AbortController();
  const timer = ms === undefined ? undefined : setTimeout(() => abort.abort(), ms);
  await request(url, {
    body: { prompt, stream, max_tokens: 400, temperature: 1 }, signal: abort.signal,
    onData: (_, cut) => atFirstByte && cut(),
  }).catch(() => {});
  clearTimeout(timer);
}

const control = { prompt: "It was a dark and", max_tokens: 48, temperature: 0 };
const alone = (await request(url, { body: control })).json.choices[0].text;
const phases = {
  queue: () => leave({ prompt: filler(200, pick(1000)), stream: false, ms: 5 + pick(200) }),
  prefill: () => leave({ prompt: filler(6000, pick(1000)), stream: pick(2) === 1, ms: 100 + pick(1500) }),
  decode: () => leave({ prompt: filler(30, pick(1000)), stream: false, ms: 300 + pick(1500) }),
  stream: () => leave({ prompt: filler(30, pick(1000)), stream: true, atFirstByte: true }),
};
const rest = [];
// All of it several times: buffers (for each batch size, say) stay behind once, and what a heap gives back at rest
// varies from round to round; a leak grows every time, and so shows in the smallest of the later rounds as well.
for (let round = 1; round <= f.rounds; ++round) {
  for (const [name, go] of Object.entries(phases)) await leaveIn(name, go);
  await sleep(12000);
  const m = memory(server.pid);
  console.log(`     round ${round}: resident ${m.rss.toFixed(1)} MiB at rest, ${m.peak.toFixed(1)} MiB at most, ${m.threads} threads`);
  check("threads ended", m.threads < 10, `${m.threads}`);
  rest.push(m.rss);
}
const half = Math.floor(rest.length / 2), before = Math.min(...rest.slice(0, half)), later = Math.min(...rest.slice(half));
if (half > 0) check("memory does not grow", later - before < 8, `${before.toFixed(1)} -> ${later.toFixed(1)} MiB, the smallest of the first and of the last rounds`);

async function leaveIn(name, go) {
  const per = Math.floor(f.clients / 4);
  const watcher = request(url, { body: control });
  await Promise.all(Array.from({ length: per }, async (_, i) => { await sleep(i * 5); await go(); }));
  const idle = await untilIdleBut(watcher);
  const text = (await watcher).json?.choices?.[0].text;
  check(`${name}: ${per} clients left, slots idle`, idle <= 2000, `${Math.round(idle)} ms`);
  check(`${name}: the control answer is what it was alone`, text === alone, text === alone ? "" : JSON.stringify(text));
}

// The control answer may still be running: it is not one of those that left.
async function untilIdleBut(watcher) {
  const start = performance.now();
  let left = 1;
  watcher.then(() => { left = 0; });
  for (;;) {
    const busy = (await get(server.url + "/slots")).json.filter((s) => s.is_processing).length;
    if (busy <= left && (await metric(server.url, "queued")) === 0) return performance.now() - start;
    await sleep(10);
  }
}

check("exit code after SIGTERM", (await server.stop()) === 0);
