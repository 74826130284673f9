#include "moend/calibrate/calibrate.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <optional>

#include "moend/calibrate/choose_scorer.h"
#include "moend/calibrate/probe.h"
#include "moend/calibrate/reconstruction.h"
#include "moend/calibrate/sensitivity.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/queries.h"

namespace moend {
namespace {

constexpr double kChooseShare = 0.15;  // of all the time, for the progress bar only
// Time that it takes to probe a text, to check plans, and to learn from a text that is measured already,
// where reading one for its losses takes 1, likewise.
constexpr double kProbeTime = 1.5, kCheckTime = 1, kLearnTime = 0.6;

// Fills the cells of one chunk.
class Calibrator {
 public:
  Calibrator(Engine::Impl& machine, const CalibrateOptions& options, const Scorer& scorer)
      : machine_(machine),
        hp_(machine.model->hparams()),
        options_(options),
        needs_(scorer.needs()),
        probe_(machine, scorer, options.guard) {}

  // Adds to the cells of `sums`, and to sums.queries what it read. `tick` gets the share of the chunk done
  // and may stop.
  Expected<void> Measure(std::span<const int32_t> tokens, Profile& sums,
                         const std::function<bool(double)>& tick) {
    const auto read = [&](double share) { return !tick || tick(kReadShare * share); };
    MOEND_TRY(probe_.Read(tokens, options_.evaluated, read));
    sums.queries = MergeQueryStats(sums.queries, probe_.queries());
    if (needs_.query_stats) {
      MOEND_ASSIGN(auto expected, MakeQueryModel(*machine_.model, sums.queries));
      probe_.Expect(std::move(expected));
    }
    const std::vector<Expert> parts = options_.heads ? Parts() : std::vector<Expert>();
    const double per_layer = static_cast<double>(options_.experts.size()) +
                             static_cast<double>(parts.size()) * static_cast<double>(hp_.n_kv_heads);
    double work = 0, done = 0;
    for (int64_t l = 0; l < hp_.n_layers; ++l)
      if (Compresses(l)) work += LayerWork(l) * per_layer;
    const auto finished = [&](int64_t l) -> Expected<void> {
      done += LayerWork(l);
      if (tick && !tick(kReadShare + (1 - kReadShare) * done / work))
        return Fail(ErrorCode::kCancelled, "the calibration was stopped");
      return {};
    };
    for (int64_t l = 0; l < hp_.n_layers; ++l) {
      if (!Compresses(l)) continue;  // its cells stay 0: nothing of it is compressed
      for (std::size_t e = 0; e < options_.experts.size(); ++e) {
        const std::vector<Expert> all(static_cast<std::size_t>(hp_.n_kv_heads), options_.experts[e]);
        MOEND_ASSIGN(const ProfileCell cell, probe_.MeasureLayer(l, all));
        sums.cells[static_cast<std::size_t>(l)][e].l2 += cell.l2;
        sums.cells[static_cast<std::size_t>(l)][e].kl += cell.kl;
        MOEND_TRY(finished(l));
      }
      for (int64_t h = 0; options_.heads && h < hp_.n_kv_heads; ++h) {
        std::vector<ProfileCell> measured;
        for (const Expert& part : parts) {
          std::vector<Expert> one(static_cast<std::size_t>(hp_.n_kv_heads));
          one[static_cast<std::size_t>(h)] = part;
          MOEND_ASSIGN(const ProfileCell cell, probe_.MeasureLayer(l, one));
          measured.push_back(cell);
          MOEND_TRY(finished(l));
        }
        AddParts(parts, measured, sums.head_cells[static_cast<std::size_t>(l * hp_.n_kv_heads + h)]);
      }
    }
    return {};
  }

 private:
  static constexpr double kReadShare = 0.1;  // of a chunk's time, for the progress bar only

  // What the experts are made of: each keep ratio at 16 bit, each pair of bits with every token kept.
  std::vector<Expert> Parts() const {
    std::vector<Expert> parts;
    for (const Expert& e : options_.experts) {
      parts.push_back({e.keep, 16, 16});
      parts.push_back({1.0, e.k_bits, e.v_bits});
    }
    std::sort(parts.begin(), parts.end());
    parts.erase(std::unique(parts.begin(), parts.end()), parts.end());
    return parts;
  }

  void AddParts(const std::vector<Expert>& parts, const std::vector<ProfileCell>& measured,
                std::vector<ProfileCell>& cells) const {
    const auto find = [&](const Expert& part) {
      return measured[static_cast<std::size_t>(std::find(parts.begin(), parts.end(), part) - parts.begin())];
    };
    // Both parts have it in them, their sum would have it twice.
    const bool known = std::ranges::find(parts, kNoiseExpert) != parts.end();
    const double noise = known ? find(kNoiseExpert).kl : 0;
    for (std::size_t e = 0; e < options_.experts.size(); ++e) {
      const Expert& expert = options_.experts[e];
      const ProfileCell evicted = find({expert.keep, 16, 16}),
                        packed = find({1.0, expert.k_bits, expert.v_bits});
      cells[e].kl += std::max({evicted.kl, packed.kl, evicted.kl + packed.kl - noise});
      cells[e].l2 += std::hypot(evicted.l2, packed.l2);
    }
  }

  bool Compresses(int64_t layer) const { return hp_.layers[static_cast<std::size_t>(layer)].compresses(); }
  double LayerWork(int64_t layer) const { return static_cast<double>(hp_.n_layers - layer) + 1; }

  Engine::Impl& machine_;
  const HyperParams& hp_;
  const CalibrateOptions& options_;
  const ScorerNeeds needs_;
  Probe probe_;
};

bool MadeByAuto(std::string_view scorer) {
  return std::ranges::all_of(ScorersOf(scorer), [](std::string_view name) {
    return std::ranges::find(AutoScorers(), name) != AutoScorers().end();
  });
}

Expected<void> CheckResumable(const Profile& have, const Profile& want) {
  MOEND_TRY(CheckSameModel(have.model, want.model, "the unfinished profile"));
  const auto differs = [](const char* what) {
    return Fail(
        ErrorCode::kMismatch,
        "the profile was started with another {}; calibrate into another file, or with the same options",
        what);
  };
  if (want.scorer == kAutoScorer ? !MadeByAuto(have.scorer) : have.scorer != want.scorer)
    return differs("scorer");
  if (have.method != want.method) return differs("way of measuring");
  if (have.guard != want.guard) return differs("sinks or window");
  if (have.length != want.length) return differs("chunk length");
  if (have.evaluated != want.evaluated) return differs("number of evaluated tokens");
  if (have.experts != want.experts) return differs("list of experts");
  if (have.head_cells.size() != want.head_cells.size()) return differs("choice of measuring KV heads or not");
  if (have.cells.size() != static_cast<std::size_t>(want.model.n_layers)) return differs("number of layers");
  return {};
}

// The cells are means over the finished chunks: adds one chunk to `old` of them.
void MixIn(std::vector<std::vector<ProfileCell>>& mean, const std::vector<std::vector<ProfileCell>>& chunk,
           int64_t old) {
  const auto n = static_cast<double>(old);
  for (std::size_t row = 0; row < mean.size(); ++row) {
    for (std::size_t e = 0; e < mean[row].size(); ++e) {
      ProfileCell& cell = mean[row][e];
      cell.l2 = (cell.l2 * n + chunk[row][e].l2) / (n + 1);
      cell.kl = RoundLoss((cell.kl * n + chunk[row][e].kl) / (n + 1));
    }
  }
}

}  // namespace

std::vector<Expert> DefaultExperts() {
  using Bits = std::pair<int, int>;
  // Layers that give nearly everything up do so at any bits: few are worth their time there.
  static constexpr Bits kHardly[] = {{2, 2}, {16, 16}}, kFew[] = {{2, 2}, {3, 2}, {4, 4}, {16, 16}},
                        kMany[] = {{2, 2}, {3, 2}, {3, 3}, {4, 2}, {4, 4}, {8, 4}, {8, 8}, {16, 16}};
  std::vector<Expert> experts;
  const auto add = [&](std::initializer_list<double> keeps, std::span<const Bits> bits) {
    for (const double keep : keeps)
      for (const auto& [k, v] : bits) experts.push_back({keep, k, v});
  };
  add({0.005}, kHardly);
  add({0.02, 0.05}, kFew);
  add({0.1, 0.25, 0.5, 0.75, 1.0}, kMany);
  std::sort(experts.begin(), experts.end());
  return experts;
}

Expected<std::vector<std::vector<int32_t>>> MakeChunks(std::span<const std::vector<int32_t>> texts,
                                                       int32_t bos, const CalibrateOptions& options) {
  // Pieces between BOS tokens; each is cut from its end so that a chunk ends where its text ends.
  std::vector<std::vector<int32_t>> chunks, shorter;
  std::size_t longest = 0;
  const auto length = static_cast<std::size_t>(options.length);
  const auto take = [&](std::span<const int32_t> piece) {
    longest = std::max(longest, piece.size());
    const std::size_t room = length - (bos >= 0 ? 1 : 0);
    // A piece a little short of the length still is a chunk; one below a quarter measures another thing.
    for (std::size_t end = piece.size(); end > 0;) {
      const std::size_t n = std::min(end, room);
      if (n < length / 4 ||
          static_cast<int64_t>(n) < 2 * (options.guard.sinks + options.guard.window + kPageTokens))
        break;
      std::vector<int32_t> chunk;
      if (bos >= 0) chunk.push_back(bos);
      chunk.insert(chunk.end(), piece.begin() + static_cast<std::ptrdiff_t>(end - n),
                   piece.begin() + static_cast<std::ptrdiff_t>(end));
      (n < room * 3 / 4 ? shorter : chunks).push_back(std::move(chunk));
      end -= n;
    }
  };
  for (const auto& text : texts) {
    std::size_t begin = 0;
    for (std::size_t i = 0; i <= text.size(); ++i) {
      if (i < text.size() && !(bos >= 0 && text[i] == bos)) continue;
      take(std::span(text).subspan(begin, i - begin));
      begin = i + 1;
    }
  }
  std::stable_sort(shorter.begin(), shorter.end(),
                   [](const auto& a, const auto& b) { return a.size() > b.size(); });
  chunks.insert(chunks.end(), std::make_move_iterator(shorter.begin()),
                std::make_move_iterator(shorter.end()));
  if (chunks.empty())
    return Fail(
        ErrorCode::kInvalidArgument,
        "the calibration text is too short: its longest part has {} tokens, a chunk of {} needs at least {}",
        longest, options.length, length / 4);
  if (options.chunks > 0 && chunks.size() > static_cast<std::size_t>(options.chunks)) {
    // Spread over the text: neighbouring chunks resemble each other.
    std::vector<std::vector<int32_t>> chosen;
    const auto wanted = static_cast<std::size_t>(options.chunks);
    for (std::size_t i = 0; i < wanted; ++i) chosen.push_back(std::move(chunks[i * chunks.size() / wanted]));
    chunks = std::move(chosen);
  }
  return chunks;
}

Expected<Profile> Calibrate(std::shared_ptr<Engine> engine, std::span<const std::vector<int32_t>> chunks,
                            const CalibrateOptions& given, Profile profile,
                            const std::function<bool(const CalibrateProgress&)>& progress,
                            const std::function<Expected<void>(const Profile&)>& save) {
  CalibrateOptions options = given;
  const bool by_logits = options.method == ProfileMethod::kLogits;
  if (options.experts.empty()) options.experts = by_logits ? DefaultExperts() : ReconstructionExperts();
  if (!by_logits) options.heads = true;
  if (!by_logits && options.scorer == kAutoScorer) options.scorer = kReconstructScorer;
  if (options.scorer == kLearnedScorer)
    return Fail(ErrorCode::kInvalidArgument,
                "the scorer learned is what calibrating by repetition makes, beside its losses; measure with "
                "another one and solve with it");
  std::sort(options.experts.begin(), options.experts.end());
  Profile wanted;
  wanted.model = engine->fingerprint();
  wanted.method = options.method;
  wanted.scorer = options.scorer;
  wanted.guard = options.guard;
  wanted.length = options.length;
  wanted.evaluated = options.evaluated = std::min(options.evaluated, options.length);
  wanted.experts = options.experts;
  wanted.chunks_wanted = static_cast<int64_t>(chunks.size());
  wanted.cells.assign(static_cast<std::size_t>(wanted.model.n_layers),
                      std::vector<ProfileCell>(options.experts.size()));
  if (options.heads)
    wanted.head_cells.assign(static_cast<std::size_t>(wanted.model.n_layers * wanted.model.shape.n_kv_heads),
                             std::vector<ProfileCell>(options.experts.size()));
  Engine::Impl& machine = engine->impl();
  const std::scoped_lock lock(machine.reading, machine.busy);
  const auto n_chunks = static_cast<int64_t>(chunks.size());
  double chosen_at = 0;
  if (profile.cells.empty()) {
    if (options.scorer == kAutoScorer) {
      chosen_at = kChooseShare;
      MOEND_ASSIGN(wanted.scorer, ChooseScorers(machine, chunks, options, [&](double share) {
                     return !progress || progress({0, n_chunks, kChooseShare * share});
                   }));
    }
    profile = wanted;
  } else {
    MOEND_TRY(CheckResumable(profile, wanted));
    wanted.scorer = profile.scorer;
    profile.chunks_wanted = std::max(profile.chunks, wanted.chunks_wanted);
  }
  MOEND_ASSIGN(const auto scorer, MakeScorer(wanted.scorer));
  Calibrator calibrator(machine, options, *scorer);
  const int64_t n_probes = by_logits ? 0 : std::min(n_chunks, kProbedTexts);
  // What the finished chunks of an interrupted run have to teach is in no file.
  const bool learns = !by_logits && options.learn && (profile.chunks < n_chunks || !profile.learned);
  const int64_t n_lessons = learns ? std::min(profile.chunks, n_chunks) : 0;
  const double work = static_cast<double>(n_chunks) + kLearnTime * static_cast<double>(n_lessons) +
                      kProbeTime * static_cast<double>(n_probes) + (by_logits ? 0 : kCheckTime);
  const auto tick_of = [&](const char* step, int64_t i, int64_t of, double before, double time) {
    return [=, &progress](double part) {
      const double share = (before + static_cast<double>(i) * time + part * time) / work;
      return !progress || progress({i, of, chosen_at + (1 - chosen_at) * share, step});
    };
  };
  if (profile.chunks < n_chunks) {
    // What follows is measured anew, for all chunks.
    UnweightLosses(profile);
    profile.sensitivity.clear();
    profile.probed = 0;
    profile.checks.clear();
    profile.learned = nullptr;
  }
  std::optional<ScoreLearner> learner;
  if (learns) {
    MOEND_ASSIGN(learner, ScoreLearner::Create(*machine.compute));
  }
  for (int64_t c = 0; c < n_lessons; ++c)
    MOEND_TRY(LearnReconstruction(*engine, chunks[static_cast<std::size_t>(c)], *learner,
                                  tick_of("lesson", c, n_lessons, 0, kLearnTime)));
  const auto learn = [&]() -> Expected<void> {
    MOEND_ASSIGN(LearnedScores learned, learner->Learn());
    profile.learned = std::make_shared<const LearnedScores>(std::move(learned));
    return {};
  };
  const double lessons = kLearnTime * static_cast<double>(n_lessons);
  for (int64_t c = profile.chunks; c < n_chunks; ++c) {
    Profile sums = wanted;
    sums.queries = profile.queries;
    const auto tick = tick_of("chunk", c, n_chunks, lessons, 1);
    const std::vector<int32_t>& chunk = chunks[static_cast<std::size_t>(c)];
    MOEND_TRY(by_logits ? calibrator.Measure(chunk, sums, tick)
                        : MeasureReconstruction(*engine, chunk, options.most_copy_loss, sums,
                                                learner ? &*learner : nullptr, tick));
    MixIn(profile.cells, sums.cells, profile.chunks);
    MixIn(profile.head_cells, sums.head_cells, profile.chunks);
    profile.queries = RoundQueryStats(sums.queries);
    ++profile.chunks;
    if (learner && profile.chunks == n_chunks) MOEND_TRY(learn());
    if (save) MOEND_TRY(save(profile));
  }
  if (learner && !profile.learned) {  // all chunks were there
    MOEND_TRY(learn());
    if (save) MOEND_TRY(save(profile));
  }
  learner.reset();
  auto before = lessons + static_cast<double>(n_chunks);
  for (int64_t i = profile.probed; i < n_probes; ++i) {
    const std::vector<int32_t>& chunk = chunks[static_cast<std::size_t>(i * n_chunks / n_probes)];
    MOEND_TRY(ProbeHeads(*engine, chunk, profile, tick_of("probe", i, n_probes, before, kProbeTime)));
    if (save) MOEND_TRY(save(profile));
  }
  before += kProbeTime * static_cast<double>(n_probes);
  if (!by_logits && profile.checks.empty() && n_chunks > 0) {
    MOEND_TRY(CheckPlans(*engine, chunks.back(), profile, tick_of("check", 0, 1, before, kCheckTime)));
    if (save) MOEND_TRY(save(profile));
  }
  return profile;
}

}  // namespace moend
