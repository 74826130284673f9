#!/usr/bin/env node
// How far the worked answers of the data set `chain` are right, step by step: one slip in 96 steps makes a result wrong,
// so the share of right results (6 a length) tells methods apart only coarsely.
//   scripts/chain-steps.mjs SUITE.jsonl EVAL.json...
// A step is right when it takes up the value before it, reads the step of the context and adds rightly (two digits are
// kept: a sum beyond 0 to 99 moves by 10). Intervals are Wilson's, as if steps were independent.
import { readFileSync } from "node:fs";

const [suite, ...files] = process.argv.slice(2);
if (files.length === 0) {
  console.error("usage: scripts/chain-steps.mjs SUITE.jsonl EVAL.json...");
  process.exit(2);
}

const chains = new Map();
for (const line of readFileSync(suite, "utf8").split("\n")) {
  if (line === "") continue;
  const row = JSON.parse(line);
  if (row.kind !== "chains") continue;
  const [, start, n] = /from (\d+) and follow steps 1 to (\d+)/.exec(row.questions[0].input).map(Number);
  const steps = new Map();
  for (const [, k, verb, by] of row.context.matchAll(/Step (\d+): (add|subtract) (\d+)\./g))
    steps.set(Number(k), verb === "add" ? Number(by) : -Number(by));
  chains.set(row._id, { start, n, steps });
}

// Steps written and right, and the last one written.
function judge({ start, n, steps }, text) {
  let before = start, written = 0, right = 0, last = 0;
  for (const [, k, from, sign, by, to] of text.matchAll(/Step (\d+): (\d+) ([-+]) (\d+) = (\d+)/g)) {
    last = Number(k);
    if (last > n) break;
    const change = sign === "+" ? Number(by) : -Number(by);
    let sum = Number(from) + change;
    if (sum > 99) sum -= 10;
    if (sum < 0) sum += 10;
    written += 1;
    if (Number(from) === before && change === steps.get(last) && Number(to) === sum) right += 1;
    before = Number(to);
  }
  return { written, right, complete: last === n };
}

function wilson(k, n) {
  const z = 1.96, p = k / n, centre = p + (z * z) / 2 / n;
  const half = z * Math.sqrt((p * (1 - p)) / n + (z * z) / 4 / n / n);
  return [centre - half, centre + half].map((x) => (100 * x) / (1 + (z * z) / n));
}

console.log("| method | ratio | results right | steps right | percent | ended at the last step |");
console.log("| --- | ---: | ---: | ---: | ---: | ---: |");
for (const file of files) {
  for (const run of JSON.parse(readFileSync(file, "utf8")).runs) {
    const answers = run.answers.filter((a) => a.dataset === "chain" && chains.has(a.id));
    if (answers.length === 0) continue;
    let written = 0, right = 0, complete = 0;
    for (const a of answers) {
      const seen = judge(chains.get(a.id), a.text);
      written += seen.written;
      right += seen.right;
      complete += seen.complete ? 1 : 0;
    }
    const results = answers.filter((a) => a.score === 1).length;
    const [low, high] = wilson(right, Math.max(1, written));
    console.log(
      `| ${run.variant} | ${run.ratio.toFixed(1)}x | ${results} of ${answers.length} | ${right} of ${written} | ` +
        `${((100 * right) / Math.max(1, written)).toFixed(1)} [${low.toFixed(1)}, ${high.toFixed(1)}] | ` +
        `${complete} of ${answers.length} |`,
    );
  }
}
