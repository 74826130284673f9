// OpenAI's own client against a running server.
// Usage: MOEND=path/to/moend MODEL=model.gguf [PLAN=plan.json] node --test openai.test.mjs
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import OpenAI from "openai";
import { startServer } from "../soak/server.mjs";

const { MOEND, MODEL, PLAN } = process.env;
const kFact = "The access code of the blue tower is 73914.";
const kQuestion = "What is the access code of the blue tower?";
let server, client;

before(async () => {
  server = await startServer(MOEND, ["-m", MODEL, "-t", "1", ...(PLAN ? ["--plan", PLAN] : []), "--api-key", "sk-right",
    "--api-key", "sk-other", "--max-tokens", "512", "--max-stops", "4", "--alias", "reference"]);
  client = new OpenAI({ baseURL: server.url + "/v1", apiKey: "sk-right", maxRetries: 0 });
});
after(async () => {
  const code = await server?.stop();
  assert.equal(code, 0, server?.log());
});

const ask = (more = {}) => client.chat.completions.create({
  model: "reference", temperature: 0, max_tokens: 32,
  messages: [{ role: "system", content: kFact }, { role: "user", content: kQuestion }], ...more,
});
const complete = (more = {}) => client.completions.create({
  model: "reference", temperature: 0, max_tokens: 32, prompt: `${kFact}\nQuestion: ${kQuestion}\nAnswer:`, ...more,
});

test("lists its model", async () => {
  const models = [];
  for await (const m of client.models.list()) models.push(m.id);
  assert.deepEqual(models, ["reference"]);
  assert.equal((await client.models.retrieve("reference")).object, "model");
  await assert.rejects(client.models.retrieve("gpt-5"), OpenAI.NotFoundError);
});

test("chats", async () => {
  const answer = await ask();
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.choices[0].message.role, "assistant");
  assert.equal(answer.choices[0].message.content.trim(), "73914");
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.ok(answer.timings.kv.bytes > 0 && answer.timings.kv.full_bytes > 0 && answer.timings.kv.ratio > 0);
});

const kTool = {
  type: "function",
  function: {
    name: "open_door", description: "Opens a door by its access code.",
    parameters: {
      type: "object", additionalProperties: false, required: ["code", "floor"],
      properties: { code: { type: "string", maxLength: 8 }, floor: { type: "integer", minimum: 0, maximum: 3 } },
    },
  },
};
const kOpen = { type: "function", function: { name: "open_door" } };
const checkCall = (call) => {
  assert.equal(call.type, "function");
  assert.ok(call.id);
  assert.equal(call.function.name, "open_door");
  const { code, floor } = JSON.parse(call.function.arguments);
  assert.ok(typeof code === "string" && code.length <= 8 && Number.isInteger(floor) && floor >= 0 && floor <= 3);
};

test("calls a tool, and hears what it says", async () => {
  const more = { tools: [kTool], max_tokens: 256 };
  const answer = await ask({ ...more, tool_choice: kOpen });
  const { message, finish_reason } = answer.choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.equal(message.tool_calls.length, 1);
  checkCall(message.tool_calls[0]);
  const next = await client.chat.completions.create({
    model: "reference", temperature: 0, max_tokens: 16, tools: [kTool], tool_choice: "none",
    messages: [{ role: "user", content: kQuestion }, message,
      { role: "tool", tool_call_id: message.tool_calls[0].id, content: "The door is open." }],
  });
  assert.equal(typeof next.choices[0].message.content, "string");
  assert.equal(next.choices[0].message.tool_calls, undefined);
});

test("streams a call", async () => {
  const runner = client.chat.completions.stream({
    model: "reference", temperature: 0, max_tokens: 256, tools: [kTool], tool_choice: kOpen,
    messages: [{ role: "user", content: kQuestion }],
  });
  const whole = await runner.finalChatCompletion();
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  checkCall(whole.choices[0].message.tool_calls[0]);
});

test("keeps to a schema", async () => {
  const schema = {
    type: "object", additionalProperties: false, required: ["tower", "code"],
    properties: { tower: { enum: ["blue", "red"] }, code: { type: "string", pattern: "^[0-9]{5}$" } },
  };
  const answer = await ask({ max_tokens: 256, response_format: { type: "json_schema", json_schema: { name: "t", schema } } });
  assert.equal(answer.choices[0].finish_reason, "stop");
  const parsed = JSON.parse(answer.choices[0].message.content);
  assert.ok(["blue", "red"].includes(parsed.tower));
  assert.match(parsed.code, /^[0-9]{5}$/);
  await assert.rejects(ask({ response_format: { type: "json_schema", json_schema: { name: "t", schema: { not: {} } } } }),
    OpenAI.BadRequestError);
});

test("streams a chat", async () => {
  const stream = await ask({ stream: true, stream_options: { include_usage: true } });
  let text = "", reason = null, usage = null, chunks = 0;
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    ++chunks;
    text += chunk.choices[0]?.delta?.content ?? "";
    reason = chunk.choices[0]?.finish_reason ?? reason;
    usage = chunk.usage ?? usage;
  }
  assert.ok(chunks > 4);
  assert.equal(text.trim(), "73914");
  assert.equal(reason, "stop");
  assert.ok(usage.completion_tokens > 0);
});

test("the client's own stream helper agrees", async () => {
  const runner = client.chat.completions.stream({
    model: "reference", temperature: 0, messages: [{ role: "system", content: kFact }, { role: "user", content: kQuestion }],
  });
  assert.equal((await runner.finalContent()).trim(), "73914");
});

test("completes, whole and streamed alike", async () => {
  const whole = await complete();
  assert.equal(whole.object, "text_completion");
  assert.equal(whole.choices[0].text.trim(), "73914");
  let text = "";
  for await (const chunk of await complete({ stream: true })) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

test("max_tokens ends an answer", async () => {
  const answer = await complete({ prompt: "It was a dark and", max_tokens: 3 });
  assert.equal(answer.choices[0].finish_reason, "length");
  assert.equal(answer.usage.completion_tokens, 3);
});

test("stop strings end an answer and are not part of it", async () => {
  const answer = await complete({ stop: ["39", "zzz"] });
  assert.equal(answer.choices[0].text.trim(), "7");
  assert.equal(answer.choices[0].finish_reason, "stop");
});

test("a seed repeats an answer", async () => {
  const one = (seed) => complete({ prompt: "It was a dark and", temperature: 1, max_tokens: 24, seed })
    .then((a) => a.choices[0].text);
  assert.equal(await one(7), await one(7));
  assert.notEqual(await one(7), await one(8));
});

test("top_p near 0 is greedy", async () => {
  const greedy = await complete({ prompt: "It was a dark and", max_tokens: 16 });
  const narrow = await complete({ prompt: "It was a dark and", max_tokens: 16, temperature: 1, top_p: 1e-9 });
  assert.equal(narrow.choices[0].text, greedy.choices[0].text);
});

test("logprobs", async () => {
  const chat = await ask({ logprobs: true, top_logprobs: 3 });
  const tokens = chat.choices[0].logprobs.content;
  assert.equal(tokens.map((t) => t.token).join(""), chat.choices[0].message.content);
  for (const t of tokens) {
    assert.equal(t.top_logprobs.length, 3);
    assert.ok(t.logprob <= 0 && t.logprob === t.top_logprobs[0].logprob);
    assert.deepEqual(Buffer.from(t.bytes).toString(), t.token);
  }
  const legacy = await complete({ logprobs: 2 });
  const l = legacy.choices[0].logprobs;
  assert.equal(l.tokens.join(""), legacy.choices[0].text);
  assert.equal(Object.keys(l.top_logprobs[0]).length, 2);
  assert.deepEqual(l.text_offset.slice(0, 2), [0, l.tokens[0].length]);
});

test("a long prefix is read once, per key", async () => {
  const context = kFact + " The river was low that summer and the boats lay idle. ".repeat(60);
  const cached = async (c) => {
    const answer = await c.chat.completions.create({
      model: "reference", temperature: 0, max_tokens: 8,
      messages: [{ role: "system", content: context }, { role: "user", content: kQuestion }],
    });
    assert.equal(answer.choices[0].message.content.trim(), "73914");
    return answer.usage.prompt_tokens_details.cached_tokens;
  };
  assert.equal(await cached(client), 0);
  assert.ok(await cached(client) > 600);
  const other = new OpenAI({ baseURL: server.url + "/v1", apiKey: "sk-other", maxRetries: 0 });
  assert.equal(await cached(other), 0);
});

test("many at once", async () => {
  const answers = await Promise.all(Array.from({ length: 16 }, (_, i) => {
    const code = String(10000 + 4321 * i).slice(0, 5);
    return complete({ prompt: `The access code of the red door is ${code}.\nQuestion: What is the access code of the red door?\nAnswer:` })
      .then((a) => [a.choices[0].text.trim(), code]);
  }));
  for (const [got, wanted] of answers) assert.equal(got, wanted);
});

test("an aborted stream frees its slot", async () => {
  const stream = await complete({ prompt: "It was a dark and", stream: true, max_tokens: 512, temperature: 1 });
  for await (const _ of stream) break;
  stream.controller.abort();
  for (const end = Date.now() + 2000; ;) {
    const slots = await (await fetch(server.url + "/slots", { headers: { Authorization: "Bearer sk-right" } })).json();
    if (slots.every((s) => !s.is_processing)) break;
    assert.ok(Date.now() < end, "a slot is still busy");
    await new Promise((r) => setTimeout(r, 50));
  }
});

test("errors are OpenAI's", async () => {
  const wrong = new OpenAI({ baseURL: server.url + "/v1", apiKey: "sk-wrong", maxRetries: 0 });
  await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
  const bad = async (more, param, code) => {
    const error = await complete(more).then(() => assert.fail("accepted"), (e) => e);
    assert.ok(error instanceof OpenAI.BadRequestError, String(error));
    assert.equal(error.param, param);
    assert.equal(error.code, code);
    assert.equal(error.type, "invalid_request_error");
  };
  await bad({ temperature: 3 }, "temperature", "out_of_range");
  await bad({ n: 2 }, "n", "unsupported");
  await bad({ max_tokens: 513 }, "max_tokens", "out_of_range");
  await bad({ stop: ["a", "b", "c", "d", "e"] }, "stop", "too_many");
  await bad({ prompt: "word ".repeat(40000) }, "prompt", "context_length_exceeded");
  await assert.rejects(ask({ messages: [] }), OpenAI.BadRequestError);
  await assert.rejects(ask({ tool_choice: "required" }), OpenAI.BadRequestError);
});
