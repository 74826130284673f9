// moend run: reads a prompt, compresses its cache, and goes on with the text.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "moend/cli/arguments.h"
#include "moend/cli/chat.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/sampler_flags.h"
#include "moend/cli/stats.h"
#include "moend/engine/generate.h"

namespace moend::cli {
namespace {

constexpr const char* kRunFooter = R"(
Examples:
  moend run -m model.gguf -p "It was a dark and" -n 64
  moend run -m model.gguf -f book.txt --plan plan.json -n 200 --temp 0
  moend run -m model.gguf -f book.txt --profile profile.json --compression 14 --json
  moend run -m model.gguf --chat
  moend run -m instruct.gguf --chat -p "Who wrote Emma?" -j '{"type": "object", "properties": {"name": {"type": "string"}}}'

The line at the end (on stderr) says how many tokens were read and generated, what the K/V cache takes against
what it would take at 16 bit, and the speed. Ctrl-C ends the text early; that line still comes, with exit
code 130.)";

struct RunOptions {
  ModelFlags model;
  PlanFlags plan;
  std::string prompt, file, system, template_variables;
  std::string grammar, grammar_file, json_schema, json_schema_file;
  bool has_prompt = false, has_file = false;
  int64_t n_predict = -1, n_ctx = 0, seed = -1;
  SamplerOptions sampler;
  bool chat = false, json = false, ignore_eos = false, escape = false, special = false;
};

// The text that the flags give; a last newline of a file is not part of it, as in llama.cpp.
Expected<std::string> PromptText(const RunOptions& options) {
  std::string text = options.prompt;
  if (options.has_file) {
    MOEND_ASSIGN(text, ReadInput(options.file));
    if (text.ends_with('\n')) text.pop_back();
  }
  return options.escape ? Unescape(text) : text;
}

// What the flags hold the text to, looked at before anything is read.
Expected<GrammarSource> Form(const RunOptions& options, const Tokenizer& tokenizer) {
  std::string grammar = options.grammar, schema = options.json_schema;
  if (!options.grammar_file.empty()) {
    MOEND_ASSIGN(grammar, ReadInput(options.grammar_file));
    if (grammar.empty()) return Fail(ErrorCode::kInvalidArgument, "{} is empty", options.grammar_file);
  }
  if (!options.json_schema_file.empty()) {
    MOEND_ASSIGN(schema, ReadInput(options.json_schema_file));
  }
  GrammarSource source{.text = std::move(grammar)};
  if (!schema.empty() || !options.json_schema_file.empty()) {
    MOEND_ASSIGN(source, tokenizer.SchemaGrammar(schema));
  }
  if (!source.text.empty()) MOEND_TRY(tokenizer.MakeGrammar(source));
  return source;
}

// More than the model was trained for is allowed, as in llama.cpp, but not in silence.
int64_t ContextLimit(const RunOptions& options, const Model& model) {
  const int64_t trained = model.hparams().n_ctx_train;
  if (options.n_ctx > trained)
    Note(
        fmt::format("{} was trained for contexts of {} tokens; beyond them, up to the {} asked for, it gets "
                    "worse",
                    model.path(), trained, options.n_ctx));
  return options.n_ctx > 0 ? options.n_ctx : trained;
}

void PrintJson(const RunStats& stats, const std::string& text, const KvStats& kv) {
  nlohmann::ordered_json out;
  out["text"] = text;
  out["prompt_tokens"] = stats.prompt_tokens;
  out["generated_tokens"] = stats.generated_tokens;
  auto layers = nlohmann::ordered_json::array();
  for (const LayerKvStats& l : kv.layers) {
    layers.push_back({{"keep", l.expert.keep},
                      {"k_bits", l.expert.k_bits},
                      {"v_bits", l.expert.v_bits},
                      {"tokens", l.tokens},
                      {"bytes", l.bytes}});
  }
  out["kv"] = {{"bytes", kv.bytes},
               {"bytes_full", kv.bytes_full},
               {"peak_bytes", kv.peak_bytes},
               {"device_bytes", kv.device_bytes},
               {"compression", kv.compression()},
               {"layers", std::move(layers)}};
  out["speed"] = {{"prefill_tps", stats.prefill_tps()}, {"decode_tps", stats.decode_tps()}};
  out["rss_peak_bytes"] = PeakResidentBytes();
  fmt::print("{}\n", out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

Expected<void> Run(RunOptions& options) {
  MOEND_ASSIGN(std::string text, options.has_prompt || options.has_file ? PromptText(options) : "");
  MOEND_ASSIGN(auto engine, options.model.Load());
  const Tokenizer& tokenizer = engine->model().tokenizer();
  const int64_t limit = ContextLimit(options, engine->model());
  GenerateOptions generate;
  MOEND_ASSIGN(generate.grammar, Form(options, tokenizer));
  generate.max_tokens = options.n_predict;
  generate.sampler = options.sampler;
  generate.sampler.seed =
      options.seed < 0 ? uint64_t{std::random_device()()} : static_cast<uint64_t>(options.seed);
  generate.ignore_end = options.ignore_eos;
  generate.special = options.special;

  if (options.chat && !options.has_prompt && !options.has_file) {
    MOEND_ASSIGN(const Plan plan, options.plan.Make(*engine, limit));
    SessionOptions session;
    session.n_ctx = limit;
    session.scorer = options.plan.scorer;
    return Chat(engine, plan, session, generate, options.system, options.template_variables);
  }
  moend::PromptText prompt{std::move(text)};
  if (options.chat) {
    std::vector<ChatMessage> messages;
    if (!options.system.empty()) messages.push_back({"system", options.system});
    messages.push_back({"user", std::move(prompt.text)});
    MOEND_ASSIGN(prompt, tokenizer.ApplyChatTemplate(messages, {.variables = options.template_variables}));
    if (const std::string note = tokenizer.chat_template_note(); !note.empty()) Note(note);
  }
  MOEND_ASSIGN(const auto tokens, tokenizer.TokenizePrompt(prompt, true));
  const auto n_prompt = static_cast<int64_t>(tokens.size());
  if (n_prompt == 0) return Fail(ErrorCode::kInvalidArgument, "the prompt is empty");
  if (n_prompt > limit || (n_prompt == limit && options.n_predict != 0))
    return Fail(ErrorCode::kTooLong, "the prompt has {} tokens, the context holds {}{}{}", n_prompt, limit,
                n_prompt == limit ? " and has no room for an answer" : "",
                options.n_ctx > 0 && options.n_ctx < engine->model().hparams().n_ctx_train
                    ? fmt::format("; -c can be up to {}", engine->model().hparams().n_ctx_train)
                    : "");

  SessionOptions session_options;
  session_options.n_ctx = limit;
  session_options.scorer = options.plan.scorer;
  const int64_t needed = options.n_predict < 0 ? limit : std::min(limit, n_prompt + options.n_predict);
  MOEND_ASSIGN(const Plan plan, options.plan.Make(*engine, needed));
  MOEND_ASSIGN(Session session, Session::Create(engine, plan, session_options));

  const Interrupt interrupt;
  RunStats stats;
  MOEND_TRY(TimedPrefill(session, tokens, stats));
  const auto emit = [&](std::string_view part) {
    if (!options.json) {
      fmt::print("{}", part);
      std::fflush(stdout);
    }
    return !Interrupt::requested();
  };
  MOEND_ASSIGN(const Generated result, TimedGenerate(session, generate, emit, stats));
  const KvStats kv = session.stats();
  if (options.json) {
    PrintJson(stats, result.text, kv);
  } else if (!result.text.ends_with('\n')) {
    fmt::print("\n");
  }
  std::fflush(stdout);
  Note(stats.Line(kv));
  if (result.reason == StopReason::kCancelled)
    return Fail(ErrorCode::kCancelled, "interrupted after {} generated tokens", stats.generated_tokens);
  if (result.reason == StopReason::kContextFull && options.n_predict >= 0)
    Note(fmt::format("stopped where the context of {} tokens is full", limit));
  return {};
}

}  // namespace

void AddRun(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("run", "Continue a text, or chat, with a compressed cache");
  auto options = std::make_shared<RunOptions>();
  RunOptions& o = *options;
  o.model.AddTo(*command);
  auto* prompt = command->add_option("-p,--prompt", o.prompt, "text to go on with")->type_name("TEXT");
  auto* file = command->add_option("-f,--file", o.file, "the same from a file; - is standard input")
                   ->type_name("FILE")
                   ->excludes(prompt);
  command->add_option("-n,--predict,--n-predict", o.n_predict, "most tokens to generate; -1: no limit")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{-1}, int64_t{std::numeric_limits<int32_t>::max()}))
      ->type_name("N");
  command->add_option("-c,--ctx-size", o.n_ctx, "most tokens in all; 0: what the model was trained for")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{std::numeric_limits<int32_t>::max()}))
      ->type_name("N");
  command->add_option("-s,--seed", o.seed, "of the sampling; -1: another one each time")
      ->capture_default_str()
      ->type_name("N");
  AddSamplerFlags(*command, o.sampler);
  o.plan.AddTo(*command);
  command->add_flag("--chat,--conversation", o.chat,
                    "use the model's chat template; without -p and -f, a conversation");
  command->add_option("--system-prompt", o.system, "with --chat: the system message")->type_name("TEXT");
  command
      ->add_option("--chat-template-kwargs", o.template_variables,
                   "with --chat: variables for the template, {\"enable_thinking\": false}")
      ->type_name("JSON");
  // One of them at most.
  CLI::Option* forms[] = {
      command->add_option("-j,--json-schema", o.json_schema, "the text is JSON of this schema; {} for any")
          ->type_name("SCHEMA"),
      command->add_option("--json-schema-file", o.json_schema_file, "the same from a file")
          ->type_name("FILE"),
      command->add_option("--grammar", o.grammar, "the text keeps to this grammar, in llama.cpp's GBNF")
          ->type_name("GBNF"),
      command->add_option("--grammar-file", o.grammar_file, "the same from a file")->type_name("FILE")};
  for (CLI::Option* one : forms)
    for (CLI::Option* other : forms)
      if (one != other) one->excludes(other);
  command->add_flag("--json", o.json, "one JSON object on stdout instead of the text as it comes");
  command->add_flag("--ignore-eos", o.ignore_eos, "go on where the model would end");
  command->add_flag("--special", o.special, "show special tokens in the text");
  command->add_flag("-e,--escape", o.escape, "\\n, \\t, \\\\, \\xHH in the prompt are escapes");
  command->footer(kRunFooter);
  command->callback([options, prompt, file, &exit_code] {
    options->has_prompt = prompt->count() > 0;
    options->has_file = file->count() > 0;
    if (!options->has_prompt && !options->has_file && !options->chat)
      throw CLI::RequiredError("-p TEXT or -f FILE (or --chat)");
    if (options->chat && options->json && !options->has_prompt && !options->has_file)
      throw CLI::RequiredError("--json needs a prompt: -p TEXT or -f FILE");
    options->plan.Check();
    exit_code = ExitCode(Run(*options));
  });
}

}  // namespace moend::cli
