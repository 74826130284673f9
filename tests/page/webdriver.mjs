// The few WebDriver commands (W3C) that the test needs, spoken to chromedriver.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

export async function startBrowser() {
  const driver = spawn("chromedriver", ["--port=0"], { stdio: ["ignore", "pipe", "inherit"] });
  const port = await new Promise((resolve, reject) => {
    let out = "";
    driver.once("error", reject);
    driver.stdout.on("data", (d) => {
      const m = /started successfully on port (\d+)/.exec((out += d));
      if (m) resolve(m[1]);
    });
  });
  const base = `http://127.0.0.1:${port}/session`;
  async function call(method, url, body) {
    const response = await fetch(url, { method, body: body === undefined ? undefined : JSON.stringify(body) });
    const { value } = await response.json();
    if (value && value.error) throw new Error(`${value.error}: ${value.message}`);
    return value;
  }
  const profile = await mkdtemp(join(tmpdir(), "moend-page-"));
  const args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
    "--force-device-scale-factor=1", `--user-data-dir=${profile}`];
  const { sessionId } = await call("POST", base, {
    capabilities: { alwaysMatch: { browserName: "chrome", "goog:chromeOptions": { args },
      "goog:loggingPrefs": { browser: "ALL" } } },
  });
  const session = `${base}/${sessionId}`;
  const keyNames = { Tab: "\uE004", Enter: "\uE007", Escape: "\uE00C", Shift: "\uE008", Space: " " };
  return {
    go: (url) => call("POST", `${session}/url`, { url }),
    run: (script, ...values) => call("POST", `${session}/execute/sync`, { script, args: values }),
    // Keys one after the other, as from a keyboard; "Shift+Tab" holds the first.
    async press(...names) {
      const actions = [];
      for (const name of names) {
        const keys = name.split("+").map((k) => keyNames[k] ?? k);
        for (const value of keys) actions.push({ type: "keyDown", value });
        for (const value of keys.reverse()) actions.push({ type: "keyUp", value });
      }
      await call("POST", `${session}/actions`, { actions: [{ type: "key", id: "keyboard", actions }] });
    },
    async type(text) {
      const actions = [...text].flatMap((value) => [{ type: "keyDown", value }, { type: "keyUp", value }]);
      await call("POST", `${session}/actions`, { actions: [{ type: "key", id: "keyboard", actions }] });
    },
    resize: (width, height) => call("POST", `${session}/window/rect`, { width, height }),
    devtools: (cmd, params) => call("POST", `${session}/goog/cdp/execute`, { cmd, params }),
    log: () => call("POST", `${session}/se/log`, { type: "browser" }),
    screenshot: async () => Buffer.from(await call("GET", `${session}/screenshot`), "base64"),
    async until(script, seconds = 30) {
      for (const end = Date.now() + 1000 * seconds; Date.now() < end;) {
        if (await call("POST", `${session}/execute/sync`, { script: `return ${script}`, args: [] })) return;
        await new Promise((r) => setTimeout(r, 100));
      }
      throw new Error(`never true: ${script}`);
    },
    async close() {
      await call("DELETE", session).catch(() => {});
      driver.kill();
      await once(driver, "exit");
      await rm(profile, { recursive: true, force: true });
    },
  };
}
