// kill -9 while prefixes are being saved: the next server finds the old file, the new one, or none; never a mixed
// one that it trusts. The answers from saved prefixes are those of a server that read them.
import { mkdtempSync, readdirSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { check, filler, flags, random, request, secret, sleep } from "./client.mjs";
import { startServer } from "./server.mjs";

const f = flags({ moend: "build/moend", model: "models/moend-reference-23m-q8_0.gguf", plan: "", kills: 200, tokens: 700 });
const dir = mkdtempSync(join(tmpdir(), "moend-kill9-"));
const args = ["-m", f.model, ...(f.plan ? ["--plan", f.plan] : []), "--metrics"];
const pick = random(9);
const prompt = (i) => filler(f.tokens, i + 1) + " " + secret(i).fact + " " + filler(150, i + 900) + secret(i).question;
const ask = async (url, i) => {
  const r = await request(url + "/v1/completions", { body: { prompt: prompt(i), max_tokens: 8, temperature: 0 } });
  return { text: r.json.choices[0].text, cached: r.json.usage.prompt_tokens_details.cached_tokens };
};
const isFile = (n) => { try { return statSync(join(dir, n)).isFile(); } catch { return false; } };  // renamed meanwhile
const files = () => readdirSync(dir, { recursive: true }).filter(isFile);
const halfWritten = () => files().filter((n) => n.endsWith(".tmp")).length;

const distinct = 12, plain = await startServer(f.moend, args), wanted = [];
for (let i = 0; i < distinct; ++i) wanted.push((await ask(plain.url, i)).text);
await plain.stop();

let served = 0, wrong = 0, warned = 0, restored = 0, halves = 0;
for (let k = 0; k < f.kills; ++k) {
  const server = await startServer(f.moend, [...args, "--kv-dir", dir]);
  const i = (k * 5 + Math.floor(k / distinct)) % distinct;
  if (k % 2 === 0) for (const n of files()) if (pick(2)) rmSync(join(dir, n));  // so that there is something to save
  const before = halfWritten();
  const watch = ask(server.url, i).then((a) => { ++served; restored += a.cached > 0; wrong += a.text !== wanted[i]; return true; }, () => false);
  // A quarter of the kills come at any time, a quarter when the answer is there, and half of them, however fast the
  // machine is, as soon as a temporary file is: before, while, or just after it gets its name.
  let answered = false;
  watch.then(() => { answered = true; });
  if (k % 4 === 1) await watch;
  if (k % 4 > 1) while (!answered && halfWritten() === before) await sleep(1);
  await sleep(pick(k % 4 === 0 ? 1000 : k % 4 === 1 ? 12 : 4));
  server.signal("SIGKILL");
  await server.exited;
  await watch;
  warned += /ignored/.test(server.log());
  halves += halfWritten() > before;
}
const last = await startServer(f.moend, [...args, "--kv-dir", dir]);
for (let i = 0; i < distinct; ++i) {
  const a = await ask(last.url, i);
  restored += a.cached > 0;
  wrong += a.text !== wanted[i];
}
check("exit code after SIGTERM", (await last.stop()) === 0);
check(`${f.kills} kills: wrong answers`, wrong === 0, `${wrong} of ${served + distinct}`);
check("files that were not whole", warned === 0, `${warned}`);
check("prefixes came back", restored > 0, `${restored} times; ${halves} kills left a half-written temporary file`);
rmSync(dir, { recursive: true });
