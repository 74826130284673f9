#!/usr/bin/env node
// Makes models/calibration-mixed.txt, the text that `moend calibrate` measures on when no other is given:
//   scripts/calibration-text.mjs >models/calibration-mixed.txt      (--check: whether that is what it would make)
// What is predicted must need the context, so every document is followed by questions about it, or by a part of it
// word for word; and every stretch of some 8,000 tokens should hold prose, code, tables, dialogue, records, labels and
// another language. Prose and languages are written for this purpose, technical prose and code are this project's own
// (models/calibration/), everything else is drawn here: nothing in it is from elsewhere. Profiles are made on this text:
// one that is made anew is another profile.
//
// Lines that begin with %%% divide it: "%%% text" begins plain text, "%%% user" and "%%% assistant" the turns of a
// conversation, which calibrate puts into the model's own chat template.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const read = (path) => readFileSync(join(root, path), "utf8");

// The same every time: mulberry32.
let state = 20260721;
const random = () => {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
};
const below = (n) => Math.floor(random() * n);
const pick = (list) => list[below(list.length)];
const shuffle = (list) => {
  const out = [...list];
  for (let i = out.length - 1; i > 0; --i) {
    const j = below(i + 1);
    [out[i], out[j]] = [out[j], out[i]];
  }
  return out;
};
const take = (list, n) => shuffle(list).slice(0, n);
const digits = (n) => String(10 ** (n - 1) + below(9 * 10 ** (n - 1)));
const hex = (n) => Array.from({ length: n }, () => below(16).toString(16)).join("");
const uuid = () => [8, 4, 4, 4, 12].map(hex).join("-");
const repeat = (n, make) => Array.from({ length: n }, (_, i) => make(i));

// ---- a document and what is asked about it ------------------------------------------------------------------------
// As a conversation, or as plain text where `plain`: real use has both.
const out = [];
function emit({ text, asked, lead = "", plain = false }) {
  if (plain) {
    out.push(`%%% text\n${text.trim()}\n\n${asked.map(([q, a]) => `Question: ${q}\nAnswer: ${a}\n`).join("\n")}`);
    return;
  }
  asked.forEach(([q, a], i) => {
    out.push(`%%% user\n${i === 0 ? `${lead ? `${lead}\n\n` : ""}${text.trim()}\n\n${q}` : q}`);
    out.push(`%%% assistant\n${a}`);
  });
}

const paragraphs = (text) => text.split(/\n\s*\n/).map((p) => p.trim()).filter((p) => p.length > 120);
// A paragraph that is to be said again, by how it begins.
function again(text) {
  const p = pick(paragraphs(text));
  const start = p.split(/\s+/).slice(0, 5).join(" ");
  return [`Repeat word for word the paragraph that begins with "${start}".`, p];
}

// ---- written pieces: "=== title", text, then "? question" and "! answer" -------------------------------------------
function pieces(path) {
  return read(path).split(/^=== /m).slice(1).map((part) => {
    const lines = part.split("\n");
    const title = lines.shift();
    const first = lines.findIndex((l) => l.startsWith("? "));
    const asked = [];
    for (const line of lines.slice(first)) {
      if (line.startsWith("? ")) asked.push([line.slice(2), ""]);
      if (line.startsWith("! ")) asked.at(-1)[1] = line.slice(2);
    }
    return { title, text: lines.slice(0, first).join("\n").trim(), asked };
  });
}
const prose = pieces("models/calibration/prose.txt");
const languages = pieces("models/calibration/languages.txt");

// ---- our own documents and code, as they were when the text was made ------------------------------------------------
const excerpts = (path) => read(path).split(/^=== /m).slice(1).map((part) => {
  const end = part.indexOf("\n");
  return { path: part.slice(0, end), text: part.slice(end + 1).trim() };
});
const technical = excerpts("models/calibration/technical.txt").map((e) => e.text);
const code = excerpts("models/calibration/code.txt");

// A stretch of lines that is to be written again, by its first line.
function linesAgain(text) {
  const lines = text.split("\n");
  const once = lines.map((l, i) => [l, i]).filter(([l, i]) => l.trim().length > 24 && i + 9 < lines.length &&
    lines.filter((m) => m === l).length === 1);
  const [line, at] = pick(once);
  return [`Write the ten lines of this file that begin with the line \`${line.trim()}\`.`,
    `\`\`\`\n${lines.slice(at, at + 10).join("\n")}\n\`\`\``];
}
// What comes behind a line.
function nextLine(text) {
  const lines = text.split("\n");
  const once = lines.map((l, i) => [l, i]).filter(([l, i]) => l.trim().length > 24 && i + 1 < lines.length &&
    lines[i + 1].trim() && lines.filter((m) => m === l).length === 1);
  const [line, at] = pick(once);
  return [`Which line follows \`${line.trim()}\`?`, `\`${lines[at + 1].trim()}\``];
}

// ---- tables and records -------------------------------------------------------------------------------------------
const given = ["Amara", "Bastian", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hanh", "Ines", "Jonas", "Keiko", "Lars",
  "Malik", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Sunniva", "Tariq", "Ulla", "Viktor", "Wanda", "Xin", "Yusuf", "Zofia"];
const family = ["Abdi", "Bergström", "Castellano", "Dubois", "Eriksen", "Fontaine", "Grabowski", "Haddad", "Ivanova", "Jansen",
  "Kowalczyk", "Lindgren", "Moreau", "Nakamura", "Okafor", "Petrov", "Quispe", "Rossi", "Schneider", "Takahashi", "Ueda", "Vasquez",
  "Weber", "Yilmaz", "Zhang"];
const towns = ["Aarhus", "Bilbao", "Cluj", "Dundee", "Esbjerg", "Fremantle", "Gdynia", "Halifax", "Izmir", "Jaipur", "Kumasi",
  "Leuven", "Malmö", "Nantes", "Oulu", "Porto", "Quito", "Riga", "Sapporo", "Tromsø", "Uppsala", "Valdivia", "Wuhan", "Zadar"];
const goods = ["copper pipe", "oat flour", "garden hose", "lamp oil", "cedar plank", "wool blanket", "bicycle chain", "tin bucket",
  "glass jar", "seed drill", "felt hat", "paper roll", "clay pot", "steel bolt", "canvas sail", "honey", "brass hinge", "rope"];
const person = () => `${pick(given)} ${pick(family)}`;
const distinct = (n, make) => {
  const seen = new Set();
  while (seen.size < n) seen.add(make());
  return [...seen];
};

function orders(kind) {
  const ids = distinct(44, () => `${pick(["A", "K", "R", "T"])}-${digits(5)}`);
  const rows = ids.map((id) => ({ order: id, customer: person(), town: pick(towns), article: pick(goods), quantity: 1 + below(240),
    price: (below(9000) / 100 + 0.5).toFixed(2), date: `2026-${String(1 + below(12)).padStart(2, "0")}-${String(1 + below(28)).padStart(2, "0")}` }));
  const keys = Object.keys(rows[0]);
  const text = kind === "csv" ? [keys.join(","), ...rows.map((r) => keys.map((k) => r[k]).join(","))].join("\n")
    : kind === "markdown" ? [`| ${keys.join(" | ")} |`, `|${keys.map(() => "---").join("|")}|`, ...rows.map((r) => `| ${keys.map((k) => r[k]).join(" | ")} |`)].join("\n")
    : rows.map((r) => JSON.stringify(r)).join("\n");
  const asked = take(rows, 4).map((r, i) => {
    const key = ["customer", "quantity", "town", "price"][i];
    return [`What is the ${key} of order ${r.order}?`, String(r[key])];
  });
  const row = pick(rows);
  asked.push([`Write order ${row.order} as JSON.`, JSON.stringify(row)]);
  return { text, asked, lead: "These are the orders of the year." };
}

function register(kind) {
  const n = kind === "uuid" ? 26 : 70;
  const entries = kind === "uuid" ? repeat(n, () => [uuid(), uuid()])
    : kind === "lines" ? distinct(n, () => digits(4)).map((k) => [`parcel ${k}`, digits(5)])
    : distinct(n, () => `${pick(["north", "south", "upper", "lower", "old", "new", "red", "grey"])} ${pick(["gate", "cellar", "tower", "mill", "quay", "barn", "vault", "annex"])} ${1 + below(40)}`).map((k) => [k, digits(6)]);
  const text = kind === "uuid" ? `${entries.map(([k, v]) => `${k} -> ${v}`).join("\n")}`
    : kind === "lines" ? entries.map(([k, v]) => `${k}  weight ${v} g`).join("\n")
    : entries.map(([k, v]) => `In the ${k} lie ${v} nails.`).join(" ");
  return { text, asked: take(entries, 5).map(([k, v]) => [kind === "uuid" ? `To what does ${k} point?`
    : kind === "lines" ? `How heavy is ${k}?` : `How many nails lie in the ${k}?`, v]) };
}

// ---- a conversation of several people -----------------------------------------------------------------------------
const events = ["the harvest supper", "the school concert", "the boat race", "the museum night", "the winter market", "the hiking weekend"];
const things = ["the tents", "the projector", "forty folding chairs", "the coffee urn", "the first-aid kit", "a long extension cable", "the raffle box", "the banner", "two fire baskets", "the sheet music"];
const reactions = ["That is later than I thought.", "Good, then I can stop worrying about it.", "I had written down something else, but fine.", "You said that last year, too.",
  "Let us not forget to tell the neighbours.", "I would rather not, but I will.", "Somebody ought to write this down.", "Is that with or without the deposit?", "My sister asked me the same thing.",
  "We could ask the fire brigade for theirs.", "If it rains we go into the gymnasium.", "I have seen worse plans.", "Then the bus will be empty on the way back.", "Nobody reads the notices anyway."];
function meeting() {
  const people = take(given, 5);
  const event = pick(events), place = pick(towns);
  const facts = [], lines = [];
  const say = (who, what) => {
    lines.push(`${who}: ${what}`);
    if (random() < 0.75) lines.push(`${pick(people.filter((p) => p !== who))}: ${pick(reactions)}`);
  };
  say(people[0], `So, ${event}. It is in ${place} this time, if nobody minds.`);
  for (const thing of take(things, 7)) {
    const who = pick(people), cost = 10 + below(400), day = pick(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]);
    const form = below(3);
    say(who, form === 0 ? `I can bring ${thing}; I get it on ${day}, and it costs us ${cost} euros.`
      : form === 1 ? `About ${thing}: leave that to me. ${day} is when the shop has it, for ${cost}.`
      : `My cousin lends us ${thing} from ${day} on. He wants ${cost} euros as a deposit.`);
    facts.push([`Who takes care of ${thing}?`, who], [`On which day is ${thing} to be had?`, day], [`How much is asked for ${thing}?`, `${cost} euros`]);
  }
  const phone = digits(7);
  say(people[2], `And the caretaker's number has changed, it is ${phone} now.`);
  facts.push(["What is the caretaker's number?", phone], [`Where does ${event} take place?`, place]);
  const turn = pick(lines.filter((l) => l.length > 60));
  return { text: lines.join("\n"), lead: "This was said at the meeting.", asked: [...take(facts, 4), [`What exactly did ${turn.split(":")[0]} say that begins with "${turn.split(": ")[1].split(" ").slice(0, 4).join(" ")}"?`, turn.slice(turn.indexOf(": ") + 2)]] };
}

// ---- labels from examples -----------------------------------------------------------------------------------------
const topics = {
  frost: ["the leaves turned black overnight", "how cold may it get for the young beans", "should I cover the beds this week", "the buds of the pear tree are brown"],
  watering: ["how often do the tomatoes want water", "the soil is dry again by noon", "is it too much if the pots stand in water", "the hose does not reach the last bed"],
  slugs: ["something eats the lettuce at night", "there is slime on the boards", "do beer traps work at all", "half of the seedlings are gone this morning"],
  pruning: ["when do I cut back the roses", "the apple tree has grown into the wires", "which of the shoots should stay", "my saw is too short for that branch"],
  compost: ["the heap smells like eggs", "may orange peel go in there", "it has not grown warm this year", "how long until I can spread it"],
  seeds: ["the packet says two years, are they still good", "none of the carrots came up", "how deep do broad beans go", "can I keep those of my own pumpkins"],
  fence: ["the deer came in again", "two posts are rotten", "my neighbour wants it moved", "which wire keeps rabbits out"],
  fees: ["what does a half plot cost a year", "I have paid twice", "until when must it be paid", "is the water in it"],
  keys: ["the lock of the shed is stuck", "I left mine at home on Sunday", "who has the one to the pump house", "may I have another made"],
  bees: ["there is a swarm in the plum tree", "who takes honeycombs off the wall", "the hives stand too near to the path", "they do not fly although it is warm"],
};
const endings = ["", "", ", any ideas", " and it is getting worse", ", what now", " since Monday", ", could someone come", " although I asked before", ", thanks"];
function labels() {
  const codes = random() < 0.5;
  const name = Object.fromEntries(Object.keys(topics).map((k, i) => [k, codes ? `${pick(["blue", "green", "amber", "violet"])}_${10 + i * 7 + below(6)}` : k]));
  const all = shuffle(Object.entries(topics).flatMap(([k, texts]) => texts.flatMap((t) => repeat(2, () => [t + pick(endings), name[k]]))));
  const shown = all.slice(0, 60), asked = all.slice(60, 68);
  return `%%% text\n${[...shown, ...asked].map(([t, l]) => `"${t}" goes to ${l}\n`).join("\n")}`;
}

// ---- a chain that is worked out from facts spread over a text ------------------------------------------------------
function chain(filler) {
  const names = distinct(10, () => `${pick("BCDFGHKMPRSVZ")}${digits(3)}`);
  let value = 10 + below(80);
  const facts = [`The ledger opens ${names[0]} with ${value}.`], steps = [`${names[0]} = ${value}`];
  for (let i = 1; i < names.length; ++i) {
    const by = 2 + below(60);
    value += by;
    facts.push(`The entry ${names[i]} is ${names[i - 1]} and ${by} more.`);
    steps.push(`${names[i]} = ${names[i - 1]} + ${by} = ${value}`);
  }
  const sentences = filler.replaceAll("\n", " ").split(/(?<=[.!?]) /);
  const every = Math.floor(sentences.length / (facts.length + 1));
  const order = shuffle(facts);
  const text = sentences.map((s, i) => ((i + 1) % every === 0 && order.length ? `${s} ${order.pop()}` : s)).join(" ") + (order.length ? ` ${order.join(" ")}` : "");
  return { text, asked: [[`Work out ${names.at(-1)}, one step a line.`, steps.join("\n")]] };
}

// ---- eight rounds, each of every kind -------------------------------------------------------------------------------
const tables = ["csv", "markdown", "json"], registers = ["uuid", "lines", "codes"];
for (let round = 0; round < 8; ++round) {
  const piece = prose[round % prose.length], language = languages[round];
  if (round < prose.length) emit({ ...piece, lead: `# ${piece.title}`, asked: [...piece.asked, again(piece.text)], plain: round % 3 === 2 });
  else emit({ ...chain(piece.text), plain: round % 2 === 1 });
  const source = code[round];
  emit({ text: `\`\`\`\n${source.text}\n\`\`\``, lead: `This is from ${source.path}:`, asked: [nextLine(source.text), linesAgain(source.text), nextLine(source.text)] });
  emit({ ...orders(tables[round % 3]), plain: round % 4 === 3 });
  emit({ text: language.text, asked: language.asked, plain: round % 2 === 0 });
  emit({ ...meeting(), plain: round % 3 === 1 });
  if (technical[round]) emit({ text: technical[round], asked: [again(technical[round]), again(technical[round])], plain: round % 2 === 1 });
  else emit({ ...chain(prose[round % prose.length + 2].text), plain: round % 2 === 0 });
  emit({ ...register(registers[round % 3]), plain: round % 3 === 0 });
  out.push(labels());
}
const made = `${out.join("\n").trimEnd()}\n`;
if (process.argv[2] !== "--check") process.stdout.write(made);
else if (made !== read("models/calibration-mixed.txt")) {
  console.error("calibration-text: models/calibration-mixed.txt is not what this script makes");
  process.exitCode = 1;
}
