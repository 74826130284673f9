#!/usr/bin/env node
// More `chain` questions than a suite has: its own contexts with the amounts of all steps, the start and so the result
// drawn anew, three times each. Six questions a length tell little; these are for telling more.
//   scripts/chain-redraw.mjs SUITE.jsonl >OUT.jsonl
import { readFileSync } from "node:fs";

const [suite] = process.argv.slice(2);
if (!suite) {
  console.error("usage: scripts/chain-redraw.mjs SUITE.jsonl >OUT.jsonl");
  process.exit(2);
}

// mulberry32: the same draws on every machine.
let state = 1;
const random = () => {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
};
const between = (low, high) => low + Math.floor(random() * (high - low + 1));

const step = /Step (\d+): (?:add|subtract) \d+\./g;
const rows = readFileSync(suite, "utf8").trim().split("\n").map((line) => JSON.parse(line));
for (let draw = 1; draw <= 3; ++draw) {
  for (const row of rows.filter((r) => r.kind === "chains")) {
    const start = between(20, 80);
    let value = start;
    // As the suite's: amounts of 1 to 49, values that stay between 0 and 99.
    const context = row.context.replace(step, (_, number) => {
      for (;;) {
        const amount = between(1, 49);
        const add = random() < 0.5;
        const next = add ? value + amount : value - amount;
        if (next < 0 || next > 99) continue;
        value = next;
        return `Step ${number}: ${add ? "add" : "subtract"} ${amount}.`;
      }
    });
    const question = { ...row.questions[0], answers: [] };
    question.input = question.input.replace(/from \d+/, `from ${start}`);
    question.answers.push(String(value));
    console.log(JSON.stringify({ ...row, _id: `${row._id}-draw${draw}`, context, questions: [question] }));
  }
}
