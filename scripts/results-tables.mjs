// The tables of docs/results.md from the files that `moend eval -o` wrote: node results-tables.mjs OUT.json...
import { readFileSync } from "node:fs";
import { basename } from "node:path";

const FIVE = ["niah", "qa", "hop", "vt", "kv"];
const ORDER = ["full", "2d_heads", "2d_hetero", "2d", "2d_uniform", "1d", "pyramid", "adakv", "kvtuner", "q8", "q4", "q3", "q2"];
const percent = (x) => (100 * x).toFixed(1);
const rank = (run) => [ORDER.indexOf(run.variant), run.compression, run.scorer].map((v) => (v < 0 ? 99 : v));
const before = (a, b) => rank(a).reduce((r, v, i) => r || (v < rank(b)[i] ? -1 : v > rank(b)[i] ? 1 : 0), 0);

// Mean over data sets; the distances to the ends of their intervals add up as independent errors do.
function mean(run, names) {
  const sets = names.map((n) => run.datasets[n]).filter(Boolean);
  if (!sets.length) return null;
  const score = sets.reduce((s, d) => s + d.score, 0) / sets.length;
  const side = (end) => Math.hypot(...sets.map((d) => d.score - d[end])) / sets.length;
  return { score, low: score - side("low"), high: score + side("high"), n: sets.reduce((s, d) => s + d.n, 0) };
}
const cell = (e) => (e ? `${percent(e.score)} [${Math.round(100 * e.low)}, ${Math.round(100 * e.high)}]` : "");
const scorer = (run) => (run.scorer.includes(",") ? "scorers of the profile" : run.scorer);
const name = (run) => run.variant + (["1d", "pyramid", "adakv"].includes(run.variant) ? `, ${scorer(run)}` : "");
const row = (cells) => `| ${cells.join(" | ")} |`;
const rule = (n) => row(["---", ...Array(n - 1).fill("---:")]);

for (const file of process.argv.slice(2)) {
  const results = JSON.parse(readFileSync(file, "utf8"));
  const runs = results.runs.filter((r) => r.answers.length).sort(before);
  const title = basename(file, ".json").replace("eval-", "");
  const sets = [...new Set(runs.flatMap((r) => Object.keys(r.datasets)))];
  const tasks = FIVE.some((n) => sets.includes(n)) ? FIVE : sets;
  const full = runs.find((r) => r.variant === "full");
  const base = full && mean(full, tasks);
  console.log(`### ${title}\n`);
  console.log(`${results.n_contexts} contexts, ${results.n_questions} questions; mean over ${tasks.join(", ")} in percent with its 95% interval, ` +
    "the ratio of allocated bytes behind the @.\n");
  const ratios = [...new Set(runs.map((r) => r.compression))].filter((c) => c > 0).sort((a, b) => a - b);
  console.log(row(["method", ...ratios.map((c) => `${c}x`)]));
  console.log(rule(ratios.length + 1));
  const names = [...new Set(runs.filter((r) => r.compression > 0).map(name))];
  for (const n of names)
    console.log(row([n, ...ratios.map((c) => {
      const run = runs.find((r) => name(r) === n && r.compression === c);
      return run ? `${cell(mean(run, tasks))} @${run.ratio.toFixed(1)}` : "–";
    })]));
  for (const run of runs.filter((r) => r.compression === 0))
    console.log(row([`${name(run)} (${run.ratio.toFixed(1)}x)`, cell(mean(run, tasks)), ...Array(Math.max(0, ratios.length - 1)).fill("")]));
  console.log("");
  console.log(row(["method", "asked", "ratio", "MiB", "mean", ...(base ? ["of full"] : []), ...sets]));
  console.log(rule(sets.length + 5 + (base ? 1 : 0)));
  for (const run of runs) {
    const m = mean(run, tasks);
    console.log(row([name(run), run.compression || "–", `${run.ratio.toFixed(1)}x`, (run.kv_bytes / 2 ** 20).toFixed(2), percent(m.score),
      ...(base ? [`${percent(m.score / base.score)}%`] : []), ...sets.map((s) => cell(run.datasets[s]))]));
  }
  console.log("");
}
