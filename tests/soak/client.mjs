// What the soak programs share: requests whose connection can be cut at will, the reference model's prompts,
// and a look at the server's process.
import { readFileSync } from "node:fs";
import http from "node:http";
import net from "node:net";

// One request on a connection of its own. Resolves with {status, body, json, ms, firstMs}; firstMs is the time to
// the first byte of the body. onData(text, cut) sees the body as it comes; cut() ends the connection.
export function request(url, { method = "POST", body, headers = {}, onData, signal } = {}) {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    const payload = body === undefined ? undefined : typeof body === "string" ? body : JSON.stringify(body);
    const req = http.request(url, {
      method, agent: false, signal,
      headers: { ...(payload === undefined ? {} : { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(payload) }), ...headers },
    }, (res) => {
      let text = "", firstMs = 0;
      res.setEncoding("utf8");
      res.on("data", (d) => {
        firstMs ||= performance.now() - start;
        text += d;
        onData?.(text, () => req.destroy());
      });
      res.on("end", () => {
        let json;
        try { json = JSON.parse(text); } catch { json = undefined; }
        resolve({ status: res.statusCode, body: text, json, ms: performance.now() - start, firstMs });
      });
      res.on("error", reject);
    });
    req.on("error", reject);
    req.end(payload);
  });
}

export const get = (url) => request(url, { method: "GET" });

// Raw bytes on a connection of its own; resolves with what came back when the server closes, or after `seconds`.
export function raw(url, bytes, seconds = 15) {
  const { hostname, port } = new URL(url);
  return new Promise((resolve) => {
    const socket = net.connect({ host: hostname, port: Number(port) });
    const parts = [];
    const done = () => { socket.destroy(); resolve(Buffer.concat(parts).toString("latin1")); };
    const timer = setTimeout(done, 1000 * seconds);
    socket.on("data", (d) => parts.push(d));
    socket.on("close", () => { clearTimeout(timer); done(); });
    socket.on("error", () => {});
    socket.write(bytes);
  });
}

// Resident and peak memory of a process, MiB.
export function memory(pid) {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const kib = (name) => Number(new RegExp(`${name}:\\s+(\\d+)`).exec(status)[1]);
  return { rss: kib("VmRSS") / 1024, peak: kib("VmHWM") / 1024, threads: kib("Threads") };
}

// The value of one of the server's metrics.
export async function metric(url, name) {
  const { body } = await get(url + "/metrics");
  return Number(new RegExp(`^moend_${name} (.*)$`, "m").exec(body)[1]);
}

export async function busySlots(url) {
  return (await get(url + "/slots")).json.filter((s) => s.is_processing).length;
}

// Milliseconds until every slot is idle and nothing waits.
export async function untilIdle(url, seconds = 60) {
  const start = performance.now();
  while ((await busySlots(url)) > 0 || (await metric(url, "queued")) > 0) {
    if (performance.now() - start > 1000 * seconds) throw new Error(`still busy after ${seconds} s`);
    await sleep(20);
  }
  return performance.now() - start;
}

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// A repeatable sequence of numbers below n (xorshift).
export function random(seed) {
  let x = seed | 1;
  return (n) => {
    x ^= x << 13; x ^= x >>> 17; x ^= x << 5;
    return (x >>> 0) % n;
  };
}

const corpus = readFileSync(new URL("../../models/suite/heldout.txt", import.meta.url), "utf8").split(/\n+/).filter((l) => l.length > 80);

// About `words` words of English from the held-out text, beginning somewhere else for each seed.
export function filler(words, seed = 1) {
  const out = [];
  for (let i = random(seed * 7919 + 1)(corpus.length); out.length < words; i = (i + 1) % corpus.length) out.push(...corpus[i].split(" "));
  return out.slice(0, words).join(" ");
}

export const colours = ["red", "blue", "green", "white", "black", "silver", "golden", "purple", "brown", "grey", "amber", "ivory"];
export const things = ["door", "tower", "vault", "gate", "bridge", "cellar", "garden", "chapel", "mill", "harbour", "library", "archive"];

// A planted fact, its question, and its answer; the model was trained on such.
export function secret(i, colour = colours[i % 12], thing = things[Math.floor(i / 12) % 12]) {
  const code = String(10000 + (i * 48271 + 12345) % 90000);
  return {
    code,
    fact: `The access code of the ${colour} ${thing} is ${code}.`,
    question: `\nQuestion: What is the access code of the ${colour} ${thing}?\nAnswer:`,
  };
}

// Runs fn(0) .. fn(n - 1), `width` at a time.
export async function parallel(n, width, fn) {
  let next = 0;
  await Promise.all(Array.from({ length: Math.min(width, n) }, async () => {
    while (next < n) await fn(next++);
  }));
}

// Prints a line of results and remembers failures for the exit code.
export function check(what, ok, detail = "") {
  console.log(`${ok ? "ok  " : "FAIL"} ${what}${detail ? ": " + detail : ""}`);
  if (!ok) process.exitCode = 1;
}

// --name value flags of the program.
export function flags(defaults) {
  const out = { ...defaults };
  const args = process.argv.slice(2);
  for (let i = 0; i < args.length; i += 2) {
    const name = args[i].replace(/^--/, "");
    if (!(name in out) || i + 1 >= args.length) {
      console.error(`usage: ${process.argv[1]} ${Object.entries(defaults).map(([k, v]) => `[--${k} ${v}]`).join(" ")}`);
      process.exit(2);
    }
    out[name] = typeof defaults[name] === "number" ? Number(args[i + 1]) : args[i + 1];
  }
  return out;
}
