// The tables of pretrained models in docs/results.md, from what scripts/results-real has written so far:
//   node results-real-tables.mjs OUT_DIR
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";

const out = process.argv[2];
const load = (path) => JSON.parse(readFileSync(path, "utf8"));
const percent = (x) => (100 * x).toFixed(1);
const signed = (x) => `${x < 0 ? "−" : "+"}${percent(Math.abs(x))}`;
const row = (cells) => console.log(`| ${cells.join(" | ")} |`);
const head = (cells) => { row(cells); row(cells.map((_, i) => (i ? "---:" : "---"))); };

// What guessing gives, by metric: a set counts where the full cache is above it with its whole interval and by ten points.
const GUESS = { leval_sci_fi: 0.5, bamboo_abshallu_4k: 0.5, bamboo_senhallu_4k: 0.5 };
const guess = (set, run) => GUESS[set] ?? (run.answers.some((a) => a.letters) ? 0.25 : 0);
const counts = (set, full) => full.mean.low > guess(set, full) && full.mean.score > guess(set, full) + 0.1;
const name = (run) => run.variant + (run.scorer && !["2d_heads", "2d_hetero"].includes(run.variant) ? `, ${run.scorer.includes(",") ? "scorers of the profile" : run.scorer}` : "");

// Each set weighs the same; the distances to the ends of their intervals add up as independent errors do. A set of one
// context has no interval, and so a mean with it has none.
function mean(parts) {
  const all = parts.filter(Boolean);
  if (!all.length) return null;
  const value = all.reduce((s, p) => s + p.mean, 0) / all.length;
  if (all.some((p) => p.low === undefined)) return { mean: value, sets: all.length };
  const side = (end) => Math.hypot(...all.map((p) => p.mean - p[end])) / all.length;
  return { mean: value, low: value - side("low"), high: value + side("high"), sets: all.length };
}
const withInterval = (m, show) => show(m.mean) + (m.low === undefined ? "" : ` [${show(m.low)}, ${show(m.high)}]`);

for (const model of readdirSync(out).filter((f) => statSync(join(out, f)).isDirectory())) {
  const folder = join(out, model);
  const sets = Object.fromEntries(readdirSync(folder).filter((f) => f.startsWith("eval-") && f.endsWith(".json"))
    .map((f) => [f.slice(5, -5), load(join(folder, f))]));
  const full = (set) => sets[set].runs.find((r) => r.variant === "full");
  const names = Object.keys(sets).filter((s) => full(s)?.answers.length);
  console.log(`## ${model}\n`);
  if (names.length) {
    console.log("### Which sets count\n");
    head(["set", "contexts", "questions", "full cache", "guessing", "counts"]);
    for (const s of names) {
      const r = full(s);
      row([s, r.contexts.length, r.answers.length, `${percent(r.mean.score)} [${Math.round(100 * r.mean.low)}, ${Math.round(100 * r.mean.high)}]`,
        percent(guess(s, r)), counts(s, r) ? "yes" : "no"]);
    }
    console.log("");
  }
  const counting = names.filter((s) => counts(s, full(s)));
  const runs = names.flatMap((s) => sets[s].runs.filter((r) => r.variant !== "full").map((r) => ({ set: s, ...r })));
  const ratios = [...new Set(runs.map((r) => r.compression))].sort((a, b) => a - b);
  const methods = [...new Set(runs.map(name))];
  if (methods.length) {
    const table = (title, sets, get, show) => {
      console.log(`### ${title}\n`);
      head(["method", ...ratios.map((c) => (c ? `${c}x` : "as it is"))]);
      for (const m of methods)
        row([m, ...ratios.map((c) => {
          const here = runs.filter((r) => name(r) === m && r.compression === c && sets.includes(r.set));
          const all = mean(here.map(get));
          return all ? `${show(all)} (${all.sets})` : "–";
        })]);
      console.log("");
    };
    table(`Points against the full cache on the same questions, mean over the ${counting.length} sets that count`, counting, (r) => r.paired.difference,
      (m) => withInterval(m, signed));
    table(`KL to the full cache, nats a token of the right answers, mean over all ${names.length} sets`, names, (r) => r.paired.kld,
      (m) => withInterval(m, (x) => x.toFixed(4)));
    console.log("The number of sets stands in brackets behind a mean.\n\n### Set by set\n");
    head(["set", "method", "asked", "ratio", "score", "vs full", "KL", "KL, 99%", "same top", "same tokens"]);
    for (const s of names)
      for (const r of sets[s].runs) {
        const p = r.paired ?? {}, d = p.difference;
        row([s, name(r), r.compression || "–", `${r.ratio.toFixed(2)}x`, percent(r.mean.score),
          d ? withInterval(d, signed) : "–",
          p.kld ? p.kld.mean.toFixed(4) : "–", p.kld ? p.kld_99.toFixed(3) : "–", p.kld ? percent(p.same_top) : "–",
          p.answer_tokens ? `${p.agreed.toFixed(1)} of ${p.answer_tokens.toFixed(1)}` : "–"]);
      }
    console.log("");
  }
  if (existsSync(join(folder, "kl.md"))) console.log(`### KL on 8k text, beside llama.cpp's caches\n\n${readFileSync(join(folder, "kl.md"), "utf8")}`);
  const kinds = ["prose", "code", "mixed"];
  const transfer = (made, on) => join(folder, `transfer-${made}-${on}.json`);
  if (kinds.some((m) => kinds.some((o) => existsSync(transfer(m, o))))) {
    console.log("### Transfer: KL at 14x by KV head, of the profile in the row on the text in the column\n");
    head(["profile made on", ...kinds]);
    for (const m of kinds)
      row([m, ...kinds.map((o) => (existsSync(transfer(m, o)) ? load(transfer(m, o)).results.at(-1).kld.mean.toFixed(4) : "–"))]);
    console.log("");
  }
}
