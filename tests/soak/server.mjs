// Starts `moend serve` for the tests beside this folder, and stops it again.
import { spawn } from "node:child_process";
import { once } from "node:events";

// flags: as on the command line, without --port. Resolves when the model is loaded.
export async function startServer(moend, flags) {
  const child = spawn(moend, ["serve", "--port", "0", ...flags], { stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  const exited = once(child, "exit");
  const url = await new Promise((resolve, reject) => {
    child.once("error", reject);
    exited.then(([code]) => reject(new Error(`moend serve ended with ${code}:\n${log}`)));
    child.stderr.on("data", (d) => {
      log += d;
      const address = /listening on (\S+?),/.exec(log);
      if (address && log.includes("ready:")) resolve(address[1]);
    });
  });
  return {
    url,
    pid: child.pid,
    log: () => log,
    signal: (name) => child.kill(name),
    // The exit code after SIGTERM.
    async stop() {
      if (child.exitCode === null) child.kill("SIGTERM");
      return (await exited)[0];
    },
    exited,
  };
}
