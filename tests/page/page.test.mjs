// The page at / in headless Chromium: works with the keyboard alone, offline, light and dark.
// Usage: MOEND=path/to/moend MODEL=model.gguf [PLAN=plan.json] [SHOTS=folder] node --test page.test.mjs
import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { startServer } from "../soak/server.mjs";
import { startBrowser } from "./webdriver.mjs";

const { MOEND, MODEL, PLAN, SHOTS } = process.env;
let server, browser;

const text = (id) => browser.run(`return document.getElementById("${id}").textContent`);
const shot = async (name) => SHOTS && writeFile(`${SHOTS}/${name}.png`, await browser.screenshot());
const focused = () => browser.run("return document.activeElement.id");

before(async () => {
  server = await startServer(MOEND, ["-m", MODEL, "-t", "1", ...(PLAN ? ["--plan", PLAN] : [])]);
  browser = await startBrowser();
  await browser.go(server.url + "/");
  await browser.until(`document.getElementById("model").textContent.includes("context")`);
});
after(async () => {
  await browser?.close();
  assert.equal(await server?.stop(), 0);
});

test("names the model and its plan", async () => {
  assert.match(await text("model"), /reference-23m\S* · context 16,384 tokens · plan /);
  await shot("empty");
});

test("is used with the keyboard alone", async () => {
  assert.equal(await focused(), "input");
  await browser.press("Shift+Tab", "Shift+Tab");
  assert.equal(await browser.run("return document.activeElement.tagName"), "SUMMARY");
  await browser.press("Space");  // opens the settings
  assert.equal(await browser.run(`return document.getElementById("settings").open`), true);
  await browser.press("Tab");
  assert.equal(await focused(), "context");
  const filler = "The river was low that summer and the boats lay idle. ".repeat(60);
  await browser.run(`document.getElementById("context").value = arguments[0]`,
    filler + "The access code of the blue tower is 73914. " + filler);
  await browser.press("Tab", "Tab", "Tab", "Tab");
  assert.equal(await focused(), "input");
  await browser.type("What is the access code of the blue tower?");
  await browser.press("Enter");
  await browser.until(`document.querySelector(".assistant") && !document.getElementById("send").disabled`, 120);
  assert.match(await browser.run(`return document.querySelector(".assistant").textContent`), /\d{5}/);
  assert.equal(await focused(), "input");
});

test("shows what the cache is doing", async () => {
  assert.match(await text("ratio"), /^\d+\.\d×$/);
  assert.match(await text("bytes-now"), /iB$/);
  assert.match(await text("bytes-full"), /MiB$/);
  assert.ok(Number((await text("tokens")).replace(",", "")) > 1000);
  assert.equal(await browser.run(`return document.querySelectorAll("#layers li").length`), 12);
  assert.match(await browser.run(`return document.querySelector("#layers li .expert").textContent`), /% · K\d+ V\d+ · \d+%/);
  const widths = await browser.run(`return [...document.querySelectorAll("#layers b")].map((b) => parseFloat(b.style.width))`);
  assert.ok(widths.every((w) => w > 0 && w <= 100), String(widths));
  if (PLAN) {
    assert.ok(parseFloat(await text("ratio")) > 3, await text("ratio"));
    assert.ok(new Set(widths).size > 3);
  }
  await shot("light");
});

test("a second question reuses the context", async () => {
  await browser.type("Was the river low that summer?");
  await browser.press("Enter");
  await browser.until(`document.querySelectorAll(".assistant").length === 2 && !document.getElementById("send").disabled`, 60);
  assert.ok(Number((await text("cached")).replace(",", "")) > 1000, await text("cached"));
});

test("Escape stops an answer, and the slot is free", async () => {
  await browser.run(`document.getElementById("max-tokens").value = 4000; document.getElementById("temperature").value = 1.5`);
  await browser.type("Tell me everything about the boats");
  await browser.press("Enter");
  await browser.until(`!document.getElementById("stop").disabled`);
  await browser.press("Escape");
  await browser.until(`document.getElementById("stop").disabled`, 5);
  for (const end = Date.now() + 2000; ;) {
    const slots = await (await fetch(server.url + "/slots")).json();
    if (slots.every((s) => !s.is_processing)) break;
    assert.ok(Date.now() < end, "a slot is still busy");
    await new Promise((r) => setTimeout(r, 50));
  }
});

test("text of the model and of the user is never markup", async () => {
  await browser.type("<img src=x onerror=alert(1)><b>bold</b>");
  await browser.run(`document.getElementById("max-tokens").value = 1`);
  await browser.press("Enter");
  await browser.until(`document.getElementById("stop").disabled`, 30);
  assert.equal(await browser.run(`return document.querySelectorAll("#log img, #log b").length`), 0);
});

test("loads nothing from elsewhere and reports no error", async () => {
  const origins = await browser.run(`return [...new Set(performance.getEntriesByType("resource").map((e) => new URL(e.name).origin))]`);
  assert.deepEqual(origins, [server.url]);
  assert.deepEqual((await browser.log()).filter((m) => m.level === "SEVERE"), []);
});

test("follows the system's colours and lets one choose", async () => {
  const ground = () => browser.run("return getComputedStyle(document.body).backgroundColor");
  const scheme = (value) => browser.devtools("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value }] });
  await scheme("light");
  const light = await ground();
  await scheme("dark");
  const dark = await ground();
  assert.notEqual(light, dark);
  await shot("dark");
  await browser.run(`document.getElementById("theme").focus()`);
  await browser.press("Enter");  // Light
  assert.equal(await ground(), light);
  await browser.press("Enter");  // Dark
  await scheme("light");
  assert.equal(await ground(), dark);
  await browser.press("Enter");  // as the system again
  assert.equal(await ground(), light);
});

// WCAG 2: 4.5 : 1 for text.
test("has readable contrast in both", async () => {
  const ratios = `
    const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = (c) => rgb(c).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const under = (e) => { for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } };
    return [...document.querySelectorAll("p, dt, dd, summary, label, button:not(:disabled), .message, .expert, h2, small, kbd, output")]
      .filter((e) => e.textContent.trim() && e.offsetParent)
      .map((e) => { const a = light(getComputedStyle(e).color), b = light(under(e));
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "#" + e.id + "." + e.className]; })
      .filter(([r]) => r < 4.5)`;
  for (const value of ["light", "dark"]) {
    await browser.devtools("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value }] });
    assert.deepEqual(await browser.run(ratios), [], value);
  }
});

test("fits a phone", async () => {
  await browser.resize(390, 800);
  const [inner, wide] = await browser.run("return [innerWidth, document.documentElement.scrollWidth]");
  assert.ok(wide <= inner, `${wide} > ${inner}`);
  await shot("phone");
});

test("says so when the server is gone", async () => {
  await server.stop();
  await browser.resize(1280, 900);
  await browser.run(`document.getElementById("input").focus()`);
  await browser.type("anyone there?");
  await browser.press("Enter");
  await browser.until(`document.querySelector(".error")`, 10);
});
