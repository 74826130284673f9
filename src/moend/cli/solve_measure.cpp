#include "moend/cli/solve_measure.h"

#include <fmt/format.h>

#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "moend/base/file.h"
#include "moend/calibrate/trials.h"
#include "moend/cli/progress.h"

namespace moend::cli {
namespace {

Rows RowsOf(const SolveRequest& request) {
  return request.variant == Variant::k2dHeads ? Rows::kHeads : Rows::kLayers;
}

Expected<std::vector<std::vector<int32_t>>> Chunks(const MeasureFlags& flags, const Engine& engine,
                                                   const Profile& profile, int64_t length) {
  const Tokenizer& tokenizer = engine.model().tokenizer();
  MOEND_ASSIGN(const auto texts, ReadTexts(flags.files, tokenizer));
  CalibrateOptions options;
  options.length = std::min(length, engine.model().hparams().n_ctx_train);
  options.guard = profile.guard;
  options.chunks = flags.chunks;
  return MakeChunks(texts, tokenizer.bos(), options);
}

Expected<Trials> Read(const std::shared_ptr<Engine>& engine, std::span<const std::vector<int32_t>> chunks,
                      const Profile& profile, int64_t evaluated) {
  ProgressBar bar("reading", 0);
  return Trials::Create(engine, chunks, profile, evaluated, [&](double share) {
    bar.Update(share);
    return !Interrupt::requested();
  });
}

double Mean(const std::vector<double>& x) {
  return x.empty() ? 0 : std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

std::string PairsJson(const Validation& validation, const Profile& profile, const SolveRequest& request) {
  nlohmann::ordered_json pairs = nlohmann::ordered_json::array();
  for (const ValidatedPlan& plan : validation.plans) {
    nlohmann::ordered_json experts = nlohmann::ordered_json::array();
    for (const Expert& e : plan.experts) experts.push_back({e.keep, e.k_bits, e.v_bits});
    pairs.push_back({{"compression", plan.compression},
                     {"predicted", plan.predicted},
                     {"measured_kl", plan.measured},
                     {"experts", std::move(experts)}});
  }
  const Correlation& c = validation.spearman;
  return nlohmann::ordered_json{{"moend", "validation"},
                                {"schema", 1},
                                {"model", profile.model.name},
                                {"hash", profile.model.hash},
                                {"metric", Name(request.metric)},
                                {"rows", RowsOf(request) == Rows::kHeads ? "heads" : "layers"},
                                {"context_length", request.context_length},
                                {"spearman", c.value},
                                {"low", c.low},
                                {"high", c.high},
                                {"spearman_within_compression", validation.within},
                                {"plans", std::move(pairs)}}
             .dump(1) +
         "\n";
}

}  // namespace

void MeasureFlags::AddTo(CLI::App& app) {
  model.AddTo(app);
  app.get_option("--model")->required(false);
  app.add_option("-f,--file", files, "texts for --refine and --validate; - is standard input")
      ->type_name("TEXT...");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto number = [&](const char* flag, int64_t& value, const char* text, int64_t least) {
    app.add_option(flag, value, text)->capture_default_str()->check(CLI::Range(least, kMost))->type_name("N");
  };
  number("--chunks", chunks, "of text; --refine keeps the last one for checking; 0: all", 0);
  number("--evaluated", evaluated, "tokens at the end of a chunk that are measured", 1);
  app.add_flag("--refine", refine, "measure the plan on text and improve it");
  app.add_option("--time-limit", seconds, "of --refine; what it has by then is the result")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e9))
      ->type_name("S");
  app.add_option("--validate", validate,
                 "instead of a plan: predict and measure N random plans, and correlate the two")
      ->check(CLI::Range(int64_t{3}, int64_t{100000}))
      ->type_name("N")
      ->excludes("--refine");
}

void MeasureFlags::Check() const {
  if (wanted() && (model.path.empty() || files.empty()))
    throw CLI::RequiredError("--refine and --validate measure a model (-m) on text (-f), which");
}

Expected<void> RunValidate(const MeasureFlags& flags, const Profile& profile, const SolveRequest& request,
                           const std::string& output) {
  MOEND_ASSIGN(auto engine, flags.model.Load());
  MOEND_ASSIGN(const auto chunks, Chunks(flags, *engine, profile, request.context_length));
  const Interrupt interrupt;
  MOEND_ASSIGN(Trials trials, Read(engine, chunks, profile, flags.evaluated));
  ValidateOptions options;
  options.plans = flags.validate;
  options.metric = request.metric;
  options.rows = RowsOf(request);
  options.context_length = request.context_length;
  options.score_bytes = request.score_bytes;
  ProgressBar bar("measuring plans", 0);
  auto validation = Validate(trials, profile, options, [&](double share) {
    bar.Update(share);
    return !Interrupt::requested();
  });
  bar.Clear();
  if (!validation) return Forward(validation);
  const Correlation& c = validation->spearman;
  fmt::print(
      "{} random plans from {:g}x to {:g}x, {} of a sum over {} against the measured KL\n"
      "Spearman {:.3f} [{:.3f}, {:.3f}], among plans of one compression {:.3f}\n",
      validation->plans.size(), options.least, options.most, Name(request.metric),
      options.rows == Rows::kHeads ? "KV heads" : "layers", c.value, c.low, c.high, validation->within);
  if (output.empty()) return {};
  MOEND_TRY(WriteFileAtomically(output, PairsJson(*validation, profile, request)));
  Note(fmt::format("wrote {}", output));
  return {};
}

Expected<Plan> RunRefine(const MeasureFlags& flags, const Profile& profile, const SolveRequest& request,
                         const Plan& plan) {
  MOEND_ASSIGN(auto engine, flags.model.Load());
  MOEND_ASSIGN(const auto chunks, Chunks(flags, *engine, profile, request.context_length));
  const Interrupt interrupt;
  const std::size_t checks = chunks.size() > 1 ? 1 : 0;
  const auto all = std::span(chunks);
  MOEND_ASSIGN(Trials trials, Read(engine, all.first(chunks.size() - checks), profile, flags.evaluated));
  RefineOptions options;
  options.seconds = flags.seconds;
  options.rows = RowsOf(request);
  options.score_bytes = request.score_bytes;
  options.min_keep = request.min_keep;
  ProgressBar bar("refining", 0);
  auto refined = Refine(trials, profile, plan, options, [&](double share) {
    bar.Update(share);
    return !Interrupt::requested();
  });
  bar.Clear();
  if (!refined) return Forward(refined);
  fmt::print("refined: KL {:.5g} -> {:.5g} nats a token, {} steps taken, {} plans measured, {}\n",
             refined->before, refined->after, refined->accepted, refined->measured,
             refined->finished ? "nothing nearby is better" : "the time was up");
  if (checks == 0) {
    Note("the text has one chunk only, so that nothing is left to check the refined plan on");
    return refined->plan;
  }
  MOEND_ASSIGN(Trials check, Read(engine, all.last(checks), profile, flags.evaluated));
  const bool heads = options.rows == Rows::kHeads;
  MOEND_ASSIGN(const auto before, check.Kl(heads ? plan.heads : plan.layers));
  MOEND_ASSIGN(const auto after, check.Kl(heads ? refined->plan.heads : refined->plan.layers));
  fmt::print("on text it was not refined on: KL {:.5g} -> {:.5g}\n", Mean(before), Mean(after));
  return refined->plan;
}

}  // namespace moend::cli
