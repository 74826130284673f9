// moend serve: an HTTP server with OpenAI's routes.
#include <fmt/format.h>
#include <malloc.h>
#include <sys/resource.h>

#include <cstdio>
#include <limits>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/cli/sampler_flags.h"
#include "moend/cli/stop_signal.h"
#include "moend/serve/engine_backend.h"
#include "moend/serve/server.h"

namespace moend::cli {
namespace {

constexpr const char* kServeFooter = R"(
Examples:
  moend serve -m model.gguf
  moend serve -m model.gguf --profile profile.json --compression 14 --kv-budget-mib 256 -np 16
  moend serve -m model.gguf --plan plan.json --api-key-file keys --kv-dir /var/cache/moend --metrics

Routes: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health, /slots, /metrics,
and a page to chat with at /. With --profile, idle contexts are compressed further when memory is short.
SIGTERM or Ctrl-C finishes the accepted requests and ends; a second one, or one that comes before the server is
ready, ends at once.)";

struct ServeFlags {
  ModelFlags model;
  PlanFlags plan;
  serve::ServerOptions server;
  int64_t n_ctx = 0;
  double kv_budget_mib = 0, drain_seconds = 60;
  std::vector<std::string> api_keys, cors_origins;
  std::string api_key_file, kv_dir, kv_store;
  int64_t kv_dir_mib = 4096, kv_store_ttl = 86400;
  bool no_prefix_cache = false, no_page = false;
};

void Write(serve::LogLevel level, const std::string& text) {
  const char* prefix = level == serve::LogLevel::kInfo      ? ""
                       : level == serve::LogLevel::kWarning ? "warning: "
                                                            : "error: ";
  fmt::print(stderr, "moend: {}{}\n", prefix, text);
}

// A thread a connection would otherwise leave up to eight heaps a core behind, each with holes of its own.
void FewHeaps() {
#ifdef M_ARENA_MAX
  mallopt(M_ARENA_MAX, 4);
#endif
}

// What bursts of long requests leave in the heaps goes back to the system.
void TrimHeaps() {
#ifdef M_TRIM_THRESHOLD
  malloc_trim(0);
#endif
}

void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

// The plan, and the ones that idle contexts are compressed to when memory is short.
Expected<serve::EngineBackendOptions> MakePlans(const ServeFlags& flags, const Engine& engine) {
  serve::EngineBackendOptions options;
  options.n_ctx = flags.n_ctx > 0 ? flags.n_ctx : engine.model().hparams().n_ctx_train;
  options.scorer = flags.plan.scorer;
  PlanFlags plan = flags.plan;
  const bool from_budget =
      plan.plan.empty() && !plan.profile.empty() && plan.compression <= 0 && plan.budget_mib <= 0;
  const int64_t slots = flags.server.scheduler.slots;
  // All slots full, and as much again for what is kept and for reading prompts.
  if (from_budget) plan.budget_mib = flags.kv_budget_mib / 2 / static_cast<double>(slots);
  auto made = plan.Make(engine, options.n_ctx);
  if (!made && from_budget)
    return Fail(made.error().code,
                "half of --kv-budget-mib {} is {:.3g} MiB for each of {} slots (-np): {}; fewer slots or "
                "shorter contexts (-c) need less",
                flags.kv_budget_mib, plan.budget_mib, slots, made.error().message);
  MOEND_ASSIGN(options.plan, std::move(made));
  if (!flags.plan.profile.empty()) {
    MOEND_ASSIGN(const Profile profile, LoadProfile(flags.plan.profile));
    options.further = serve::FurtherPlans(profile, options.plan, options.n_ctx, 4);
  }
  return options;
}

Expected<std::unique_ptr<serve::PrefixStore>> OpenStores(const ServeFlags& flags, const serve::Log& log) {
  std::vector<std::unique_ptr<serve::KvStore>> stores;
  if (!flags.kv_dir.empty()) {
    MOEND_ASSIGN(auto store, serve::OpenDiskStore(flags.kv_dir, flags.kv_dir_mib << 20));
    stores.push_back(std::move(store));
  }
  if (!flags.kv_store.empty()) {
    MOEND_ASSIGN(auto store, serve::OpenRedisStore(flags.kv_store, flags.kv_store_ttl));
    stores.push_back(std::move(store));
  }
  if (stores.empty()) return nullptr;
  return std::make_unique<serve::PrefixStore>(std::move(stores), log);
}

// Most tokens, prompt and answer, that a lone request can have within `budget` bytes.
int64_t LongestContext(const serve::Backend& backend, int64_t budget) {
  int64_t low = 0, high = backend.info().n_ctx;
  while (low < high) {
    const int64_t n = low + (high - low + 1) / 2;
    if (backend.ContextBound(n) + backend.PrefillScratch(0, n) <= budget) {
      low = n;
    } else {
      high = n - 1;
    }
  }
  return low;
}

// `given` is the budget in MiB as the flag had it. A budget that no request fits is an error, one that only
// short ones fit a warning.
Expected<void> CheckBudget(const serve::Backend& backend, int64_t budget, double given,
                           const serve::Log& log) {
  if (budget <= 0) return {};
  constexpr int64_t kLeast = 2;  // a token of prompt and one of answer
  const auto bytes = [&](int64_t n) { return backend.ContextBound(n) + backend.PrefillScratch(0, n); };
  const int64_t longest = LongestContext(backend, budget), n_ctx = backend.info().n_ctx;
  if (longest < kLeast)
    return Fail(ErrorCode::kBudget,
                "--kv-budget-mib {} holds not even the shortest request; that takes {:.4g} MiB, and one "
                "with a context of {} tokens {:.4g} MiB",
                given, MiB(bytes(kLeast)), n_ctx, MiB(bytes(n_ctx)));
  if (longest < n_ctx)
    log.Warning(
        "--kv-budget-mib {} holds no context of {} tokens ({:.4g} MiB with what reading it takes); "
        "requests of more than about {} tokens are refused",
        given, n_ctx, MiB(bytes(n_ctx)), longest);
  return {};
}

Expected<serve::ApiKeys> LoadKeys(const ServeFlags& flags) {
  std::vector<std::string> keys = flags.api_keys;
  if (!flags.api_key_file.empty()) {
    MOEND_ASSIGN(const std::string text, ReadFile(flags.api_key_file, 1 << 20));
    MOEND_ASSIGN(const auto more, serve::ApiKeys::ParseFile(text, flags.api_key_file));
    keys.insert(keys.end(), more.begin(), more.end());
  }
  return serve::ApiKeys::Create(keys);
}

Expected<void> Serve(ServeFlags& flags) {
  StopSignal stop;
  RaiseDescriptorLimit();
  FewHeaps();
  const serve::Log log(Write);
  MOEND_ASSIGN(flags.server.keys, LoadKeys(flags));
  MOEND_ASSIGN(flags.server.cors, serve::Cors::Create(flags.cors_origins));
  if (flags.server.cors.any() && !flags.server.keys.required())
    log.Warning(
        "every web page that a browser on this network opens can use the server: --cors-origin * "
        "without an API key");
  MOEND_ASSIGN(auto store, OpenStores(flags, log));
  flags.server.prefix_cache = !flags.no_prefix_cache;
  flags.server.page = !flags.no_page;
  if (flags.kv_budget_mib > 0) {
    MOEND_ASSIGN(flags.server.scheduler.kv_budget_bytes, BudgetBytes(flags.kv_budget_mib));
  }
  const int64_t budget = flags.server.scheduler.kv_budget_bytes;
  const std::string host = flags.server.host;
  serve::Server server(std::move(flags.server), log);
  MOEND_ASSIGN(const int port, server.Start());
  const bool is_unix = host.starts_with("unix:");
  if (is_unix) stop.RemoveAtEnd(host.substr(5));
  log.Info("listening on {}, loading {}",
           is_unix ? host : fmt::format("http://{}:{}", host.contains(':') ? "[" + host + "]" : host, port),
           flags.model.path);

  MOEND_ASSIGN(auto engine, flags.model.Load());
  if (const int64_t trained = engine->model().hparams().n_ctx_train; flags.n_ctx > trained)
    log.Warning("contexts of {} tokens; {} was trained for {}", flags.n_ctx, flags.model.path, trained);
  if (const std::string note = engine->model().tokenizer().chat_template_note(); !note.empty())
    log.Warning("{}", note);
  MOEND_ASSIGN(const auto plans, MakePlans(flags, *engine));
  MOEND_ASSIGN(auto backend, serve::MakeEngineBackend(engine, plans));
  MOEND_TRY(CheckBudget(*backend, budget, flags.kv_budget_mib, log));
  const serve::BackendInfo info = backend->info();
  const int64_t context = backend->ContextBound(info.n_ctx);
  server.Serve(std::move(backend), std::move(store));
  stop.Ready();
  log.Info("ready: {}, plan {}, context {} tokens of at most {:.1f} MiB, K/V budget {} MiB, {} threads",
           info.model_name, info.plan_name, info.n_ctx, MiB(context),
           MiBText(server.gauges().kv_budget_bytes), engine->n_threads());

  constexpr int kTrimInterval = 10;  // seconds
  while (!stop.Wait(kTrimInterval)) {
    const serve::Gauges now = server.gauges();
    if (now.slots_busy == 0 && now.queued == 0) TrimHeaps();
  }
  log.Info("finishing the accepted requests");
  server.Drain(std::chrono::duration<double>(flags.drain_seconds));
  return {};
}

void AddLimits(CLI::App& command, serve::Limits& l) {
  const auto whole = [&](const char* name, int64_t& value, int64_t low, const char* help) {
    command.add_option(name, value, help)
        ->capture_default_str()
        ->check(CLI::Range(low, int64_t{1} << 40))
        ->type_name("N")
        ->group("Limits");
  };
  const auto seconds = [&](const char* name, double& value, const char* help) {
    command.add_option(name, value, help)
        ->capture_default_str()
        ->check(Between(0.001, 1e6))
        ->type_name("S")
        ->group("Limits");
  };
  whole("--max-connections", l.connections, 1,
        "open connections; beyond, the slowest sender is cut off, or 503");
  whole("--max-header-bytes", l.header_bytes, 256, "of a request's head; 431");
  whole("--max-headers", l.header_count, 1, "header fields of a request; 431");
  whole("--max-body-bytes", l.body_bytes, 1024, "of a request's body; 413");
  whole("--max-total-body-bytes", l.total_body_bytes, 1024, "of all bodies being read together; 503");
  whole("--max-json-depth", l.json_depth, 4, "nesting of a body; 400");
  whole("--max-json-values", l.json_values, 16, "values in a body; 400");
  whole("--max-json-fields", l.json_fields, 16, "fields of an object in a body; 400");
  whole("--max-messages", l.messages, 1, "of a chat; 400");
  whole("--max-tools", l.tools, 0, "of a chat; 400");
  whole("--max-stops", l.stops, 0, "stop strings of a request; 400");
  whole("--max-stop-bytes", l.stop_bytes, 1, "of a stop string; 400");
  whole("--max-logit-bias", l.logit_bias, 0, "entries of logit_bias; 400");
  whole("--max-prompt-tokens", l.prompt_tokens, 0, "0: the context less one; 400");
  whole("--max-tokens", l.max_tokens, 0, "most that a request may ask for; 0: the context; 400");
  whole("--default-max-tokens", l.default_max_tokens, 1, "for requests that do not say");
  whole("--max-top-logprobs", l.top_logprobs, 0, "alternatives a token with logprobs; 400");
  whole("--max-queue", l.queue, 1, "waiting requests; 429");
  whole("--max-queue-per-key", l.queue_per_key, 1, "the same of one API key; 429");
  whole("--max-requests-per-connection", l.requests_per_connection, 1, "then it is closed");
  seconds("--queue-timeout", l.queue_seconds, "a request that waited longer gets 503");
  seconds("--header-timeout", l.header_seconds, "for a request's head; 408");
  seconds("--body-timeout", l.body_seconds, "for a request's body; 408");
  seconds("--idle-timeout", l.idle_seconds, "between two requests of a connection");
  seconds("--write-timeout", l.write_seconds, "for a client that reads nothing of its answer");
}

}  // namespace

void AddServe(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("serve", "Answer OpenAI's API over HTTP");
  auto flags = std::make_shared<ServeFlags>();
  ServeFlags& f = *flags;
  f.model.AddTo(*command);
  f.plan.AddTo(*command);
  // Here a profile has a use beside a plan: it says how idle contexts can be made smaller still.
  CLI::Option *plan = command->get_option("--plan"), *profile = command->get_option("--profile");
  profile->description(
      "solve for contexts of -c tokens from a calibrated profile; beside --plan: how far idle contexts can "
      "go");
  plan->remove_excludes(profile);
  profile->remove_excludes(plan);
  constexpr auto kMost = int64_t{std::numeric_limits<int32_t>::max()};
  command->add_option("-c,--ctx-size", f.n_ctx, "most tokens of a context; 0: what the model was trained for")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, kMost))
      ->type_name("N");
  command->add_option("--parallel", f.server.scheduler.slots, "requests running at once (-np)")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1024}))
      ->type_name("N");
  command->add_option("--host", f.server.host, "address to listen on, or unix:PATH for a Unix socket")
      ->capture_default_str()
      ->type_name("ADDR");
  command->add_option("--port", f.server.port, "0: any free one")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535))
      ->type_name("N");
  command->add_option("--api-key", f.api_keys, "a key that clients must have; may be given several times")
      ->type_name("KEY");
  command->add_option("--api-key-file", f.api_key_file, "the same, one a line")->type_name("FILE");
  command
      ->add_option(
          "--cors-origin,--cors-origins", f.cors_origins,
          "let web pages of this origin use the server: https://host[:port], localhost (any port of this "
          "machine) or *; several, with commas between, too")
      ->delimiter(',')
      ->type_name("ORIGIN");
  command->add_option("-a,--alias", f.server.alias, "the model's name in answers")->type_name("NAME");
  command->add_flag("--metrics", f.server.metrics, "answer /metrics, for Prometheus");
  command->add_flag("--no-page", f.no_page, "do not answer /");
  command->add_option("--drain-timeout", f.drain_seconds, "for the accepted requests to finish after SIGTERM")
      ->capture_default_str()
      ->check(Between(0, 1e6))
      ->type_name("S");

  command
      ->add_option("--kv-budget-mib", f.kv_budget_mib,
                   "of all K/V caches together; 0: all slots full and as much again, at most half of the "
                   "memory that the process may have")
      ->capture_default_str()
      ->check(Between(0, 1e9))
      ->type_name("MIB")
      ->group("K/V cache");
  command->add_flag("--no-prefix-cache", f.no_prefix_cache, "keep no context for later requests")
      ->group("K/V cache");
  command->add_option("--min-prefix", f.server.scheduler.min_prefix_tokens, "shorter contexts are not kept")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, kMost))
      ->type_name("N")
      ->group("K/V cache");
  command->add_option("--kv-dir", f.kv_dir, "folder where prefixes outlive the server")
      ->type_name("DIR")
      ->group("K/V cache");
  command->add_option("--kv-dir-mib", f.kv_dir_mib, "most that the folder may hold")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->type_name("MIB")
      ->group("K/V cache");
  command
      ->add_option("--kv-store", f.kv_store, "Valkey or Redis that several servers share: redis://host:port")
      ->type_name("URL")
      ->group("K/V cache");
  command->add_option("--kv-store-ttl", f.kv_store_ttl, "seconds that it keeps a prefix after its last use")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, kMost))
      ->type_name("S")
      ->group("K/V cache");

  AddSamplerFlags(*command, f.server.sampler, "; for requests that do not say");
  AddLimits(*command, f.server.limits);
  command->footer(kServeFooter);
  command->callback([flags, &exit_code] {
    const PlanFlags& plan = flags->plan;
    if (!plan.profile.empty() && plan.plan.empty() && plan.compression == 0 && plan.budget_mib == 0 &&
        flags->kv_budget_mib == 0)
      throw CLI::RequiredError(
          "--profile alone is no plan; one of --compression, --budget-mib, --kv-budget-mib and --plan");
    exit_code = ExitCode(Serve(*flags));
  });
}

}  // namespace moend::cli
