"use strict";
const $ = (id) => document.getElementById(id);
let messages = [];     // of the chat, without the context
let running = null;    // AbortController of the answer that is coming
let poll = 0;

// ---- numbers --------------------------------------------------------------------------------------------
function bytes(n) {
  if (n < 1000) return n + " B";
  const units = ["KiB", "MiB", "GiB"];
  let i = -1;
  do { n /= 1024; ++i; } while (n >= 1000 && i < 2);  // never more than three digits
  return n.toFixed(n < 10 ? 2 : 1) + " " + units[i];
}
const seconds = (ms) => ms < 1000 ? Math.round(ms) + " ms" : (ms / 1000).toFixed(1) + " s";
const count = (n) => n.toLocaleString("en");

// ---- the cache's side -----------------------------------------------------------------------------------
function showKv(kv) {
  if (!kv.full_bytes || !kv.bytes) return;
  const ratio = kv.full_bytes / kv.bytes, most = Math.max(kv.full_bytes, kv.bytes);
  $("ratio").value = ratio.toFixed(1) + "×";
  $("bytes-now").value = bytes(kv.bytes);
  $("bytes-full").value = bytes(kv.full_bytes);
  $("bar-now").style.width = 100 * kv.bytes / most + "%";
  $("bar-full").style.width = 100 * kv.full_bytes / most + "%";
  $("compare").setAttribute("aria-label", `${bytes(kv.bytes)} now, ${bytes(kv.full_bytes)} uncompressed`);
  if (kv.layers) showLayers(kv.layers, kv.full_bytes / kv.layers.length);
}

function showLayers(layers, full) {
  $("layers").replaceChildren(...layers.map((l, i) => {
    const li = document.createElement("li"), name = document.createElement("span");
    const track = document.createElement("i"), bar = document.createElement("b"), expert = document.createElement("span");
    const share = 100 * l.bytes / full;
    name.textContent = i;
    bar.style.width = Math.min(100, share) + "%";
    track.append(bar);
    expert.className = "expert";
    expert.textContent = `${Math.round(100 * l.keep)}% · K${l.k_bits} V${l.v_bits} · ${share.toFixed(0)}%`;
    li.title = `Layer ${i}: keeps ${Math.round(100 * l.keep)}% of the tokens, K ${l.k_bits} bit, V ${l.v_bits} bit; ` +
      `${count(l.tokens)} tokens, ${bytes(l.bytes)}`;
    li.append(name, track, expert);
    return li;
  }));
}

function showTimings(t) {
  $("tokens").textContent = count(t.cache_n + t.prompt_n + t.predicted_n);
  $("cached").textContent = count(t.cache_n);
  $("first").textContent = seconds(t.queue_ms + t.prompt_ms);
  if (t.predicted_n > 1) $("speed").textContent = t.predicted_per_second.toFixed(1);
  showKv(t.kv);
}

// While an answer comes, /slots tells how the cache grows; a key sees its own slots only.
async function watch() {
  try {
    const slots = await (await fetch("slots")).json();
    const mine = slots.filter((s) => s.kv);
    if (!running || mine.length !== 1) return;
    const s = mine[0];
    if (s.state === "prefill") {
      $("status").textContent = `Reading ${count(s.prompt_tokens)} tokens: ${Math.round(100 * s.prefill_progress)}%`;
    } else {
      $("status").textContent = "";
      $("tokens").textContent = count(s.prompt_tokens + s.generated_tokens);
      showKv(s.kv);
    }
  } catch { /* the answer itself tells when the server is gone */ }
}

// ---- the chat's side ------------------------------------------------------------------------------------
function add(role, text) {
  const div = document.createElement("div");
  div.className = "message " + role;
  div.textContent = text;
  $("log").append(div);
  $("log").scrollTop = $("log").scrollHeight;
  return div;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}`;
  }
}

// Calls `take` with the data of each server-sent event.
async function readEvents(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const line = held.slice(0, end);
      if (line.startsWith("data: ") && line !== "data: [DONE]") take(JSON.parse(line.slice(6)));
    }
  }
}

async function answer() {
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  poll = setInterval(watch, 500);
  const div = add("assistant waiting", "");
  const context = $("context").value;
  const body = {
    messages: [...(context ? [{ role: "system", content: context }] : []), ...messages],
    stream: true, kv_layers: true,
    temperature: Number($("temperature").value) || 0,
    max_tokens: Math.max(1, Math.floor(Number($("max-tokens").value)) || 256),
  };
  let text = "", start = 0, chunks = 0;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    await readEvents(response, (event) => {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice && choice.delta.content) {
        text += choice.delta.content;
        div.classList.remove("waiting");
        div.textContent = text.trimStart();
        $("log").scrollTop = $("log").scrollHeight;
        if (chunks++ === 0) start = performance.now();
        else $("speed").textContent = ((chunks - 1) * 1000 / (performance.now() - start)).toFixed(1);
      }
      if (event.timings) showTimings(event.timings);
    });
  } catch (e) {
    if (e.name !== "AbortError") add("error", e.message);
  }
  clearInterval(poll);
  running = null;
  $("status").textContent = "";
  $("send").disabled = false;
  $("stop").disabled = true;
  div.classList.remove("waiting");
  if (text) messages.push({ role: "assistant", content: text });
  if (!text.trim()) div.remove();
  $("input").focus();
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  // An unanswered question (stopped, or an error) is replaced by the next one.
  if (messages.length && messages.at(-1).role === "user") messages.pop();
  messages.push({ role: "user", content: text });
  add("user", text);
  answer();
}

$("form").addEventListener("submit", (e) => { e.preventDefault(); send(); });
$("input").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); send(); }
});
document.addEventListener("keydown", (e) => { if (e.key === "Escape" && running) running.abort(); });
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  $("log").replaceChildren();
  $("input").focus();
});

// ---- colours --------------------------------------------------------------------------------------------
const themes = { "": ["Auto", "as the system"], light: ["Light", "light"], dark: ["Dark", "dark"] };
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  $("theme").textContent = themes[name][0];
  $("theme").setAttribute("aria-label", "Colours: " + themes[name][1]);
  try { localStorage.setItem("theme", name); } catch { /* private window */ }
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(themes);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme || "") + 1) % names.length]);
});
let kept = "";
try { kept = localStorage.getItem("theme") || ""; } catch { /* private window */ }
setTheme(kept in themes ? kept : "");

// ---- the model ------------------------------------------------------------------------------------------
async function connect() {
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw new Error(await problem(response));
    const m = (await response.json()).data[0];
    $("model").textContent = `${m.id} · context ${count(m.max_model_len)} tokens · plan ${m.meta.plan}`;
  } catch (e) {
    $("model").textContent = e.message;
    setTimeout(connect, 2000);
  }
}
connect();
