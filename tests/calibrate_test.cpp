// Calibration on small random models: what the cells mean, chunks, and resuming.
#include "moend/calibrate/calibrate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "moend/engine/capture.h"
#include "tests/support/calibration.h"
#include "tests/support/test_model.h"

namespace moend {
namespace {

using test::Chunks;
using test::Kl;

struct TinyEngine {
  test::TempDir dir;
  std::shared_ptr<Engine> engine;
  TinyEngine() {
    test::TestModelOptions options;
    options.n_layers = 3;
    options.n_embd = 64;
    const std::string path = dir / "tiny.gguf";
    EXPECT_TRUE(test::WriteTestModel(options, path));
    auto model = Model::Load(path);
    EXPECT_TRUE(model) << model.error().message;
    auto made = Engine::Create(*model, {1, 128});
    EXPECT_TRUE(made) << made.error().message;
    engine = *made;
  }
};

CalibrateOptions Options() {
  CalibrateOptions options;
  options.length = 600;
  options.evaluated = 40;
  options.chunks = 0;
  options.experts = {{0.2, 4, 4}, {0.6, 4, 4}, {1.0, 2, 2},  {1.0, 4, 2},
                     {1.0, 4, 4}, {1.0, 8, 8}, {1.0, 16, 16}};
  return options;
}

Profile MustCalibrate(const std::shared_ptr<Engine>& engine, std::span<const std::vector<int32_t>> chunks,
                      const CalibrateOptions& options, Profile start = {}) {
  auto profile = Calibrate(engine, chunks, options, std::move(start), {}, {});
  EXPECT_TRUE(profile) << profile.error().message;
  return profile ? *profile : Profile();
}

TEST(Calibrate, LossesFallWithBitsAndTokens) {
  const TinyEngine tiny;
  const CalibrateOptions options = Options();
  const Profile p = MustCalibrate(tiny.engine, Chunks(2), options);
  ASSERT_EQ(p.cells.size(), 3u);
  ASSERT_EQ(p.experts, options.experts);
  EXPECT_EQ(p.chunks, 2);
  const auto at = [&](const std::vector<ProfileCell>& row, const Expert& e) {
    return row[static_cast<std::size_t>(std::find(p.experts.begin(), p.experts.end(), e) -
                                        p.experts.begin())];
  };
  for (const auto& row : p.cells) {
    for (const ProfileCell& cell : row) {
      EXPECT_TRUE(std::isfinite(cell.l2) && std::isfinite(cell.kl));
      EXPECT_GE(cell.kl, 0);
    }
    EXPECT_EQ(at(row, {1.0, 16, 16}).l2, 0);
    EXPECT_EQ(at(row, {1.0, 16, 16}).kl, 0);
    EXPECT_LT(at(row, {1.0, 8, 8}).l2, at(row, {1.0, 4, 4}).l2);
    EXPECT_LT(at(row, {1.0, 4, 4}).l2, at(row, {1.0, 4, 2}).l2);
    EXPECT_LT(at(row, {1.0, 4, 2}).l2, at(row, {1.0, 2, 2}).l2);
    EXPECT_LT(at(row, {1.0, 4, 4}).l2, at(row, {0.6, 4, 4}).l2);
    EXPECT_LT(at(row, {0.6, 4, 4}).l2, at(row, {0.2, 4, 4}).l2);
    EXPECT_GT(at(row, {1.0, 8, 8}).l2, 0);
  }
}

// The definition, by the slow way that a user takes: a session whose plan compresses one layer only, against
// the full one.
TEST(Calibrate, KlIsThatOfASessionWithOneLayerCompressed) {
  const TinyEngine tiny;
  CalibrateOptions options = Options();
  options.evaluated = 1;
  options.experts = {{0.2, 2, 2}, {1.0, 3, 2}};
  const auto chunks = Chunks(1);
  const Profile p = MustCalibrate(tiny.engine, chunks, options);
  const auto context = std::span(chunks[0]).first(599);
  const auto logits = [&](const Plan& plan) {
    auto session = Session::Create(tiny.engine, plan);
    EXPECT_TRUE(session && session->Prefill(context) && session->Decode(chunks[0].back()));
    return std::vector<float>(session->logits().begin(), session->logits().end());
  };
  const Plan full = FullPlan(tiny.engine->fingerprint(), 600);
  const auto want = logits(full);
  for (std::size_t l = 0; l < p.cells.size(); ++l) {
    for (std::size_t e = 0; e < options.experts.size(); ++e) {
      Plan plan = full;
      plan.layers[l] = options.experts[e];
      const double kl = Kl(want, logits(plan));
      EXPECT_NEAR(p.cells[l][e].kl, kl, 0.02 * kl + 1e-6) << "layer " << l << " expert " << e;
      EXPECT_GT(kl, 1e-7);
    }
  }
}

TEST(Calibrate, HeadsAreMeasuredAlone) {
  const TinyEngine tiny;
  CalibrateOptions options = Options();
  options.evaluated = 1;
  options.heads = true;
  options.experts = {{0.2, 2, 2}, {0.2, 16, 16}, {1.0, 2, 2}, {1.0, 16, 16}};
  const auto chunks = Chunks(1);
  const Profile p = MustCalibrate(tiny.engine, chunks, options);
  ASSERT_EQ(p.head_cells.size(), 6u);
  const auto logits = [&](const Plan& plan) {
    auto session = Session::Create(tiny.engine, plan);
    EXPECT_TRUE(session && session->Prefill(std::span(chunks[0]).first(599)) &&
                session->Decode(chunks[0].back()));
    return std::vector<float>(session->logits().begin(), session->logits().end());
  };
  const Plan full = FullPlan(tiny.engine->fingerprint(), 600);
  const auto want = logits(full);
  for (std::size_t row = 0; row < p.head_cells.size(); ++row) {
    const auto& cells = p.head_cells[row];
    Plan plan = full;
    plan.heads.assign(6, Expert{});
    plan.heads[row] = {0.2, 16, 16};
    const double kl = Kl(want, logits(plan));
    EXPECT_NEAR(cells[1].kl, kl, 0.02 * kl + 1e-6);
    EXPECT_NEAR(cells[0].kl, cells[1].kl + cells[2].kl, 1e-9);
    EXPECT_NEAR(cells[0].l2, std::hypot(cells[1].l2, cells[2].l2), 1e-9);
    EXPECT_EQ(cells[3].kl, 0);
  }
  // What any change costs counts once.
  options.experts = {{0.2, 2, 2}, {0.2, 8, 8}, {0.2, 16, 16}, {1.0, 2, 2}, kNoiseExpert, {1.0, 16, 16}};
  const Profile noisy = MustCalibrate(tiny.engine, chunks, options);
  for (const auto& cells : noisy.head_cells) {
    const double sum = cells[2].kl + cells[3].kl - cells[4].kl;
    EXPECT_NEAR(cells[0].kl, std::max({cells[2].kl, cells[3].kl, sum}), 1e-9);
    EXPECT_NEAR(cells[1].kl, std::max(cells[2].kl, cells[4].kl), 1e-9);
    EXPECT_GT(cells[4].kl, 0);
  }
  auto parsed = ParseProfile(ToJson(p), "heads");
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->head_cells.size(), 6u);
  EXPECT_EQ(parsed->head_cells[5][0].kl, p.head_cells[5][0].kl);
}

TEST(Calibrate, AutoTakesTheScorerThatClearlyLosesLess) {
  const TinyEngine tiny;
  CalibrateOptions options = Options();
  options.experts = {{0.05, 16, 16}, {0.3, 16, 16}, {1.0, 4, 4}};
  const auto chunks = Chunks(2);
  const auto with = [&](const char* scorer) {
    CalibrateOptions o = options;
    o.scorer = scorer;
    return MustCalibrate(tiny.engine, chunks, o);
  };
  const Profile each[] = {with("keydiff"), with("expected")};
  const Profile chosen = with(kAutoScorer);
  std::string names;
  for (std::size_t l = 0; l < 3; ++l) {
    const auto mean = [&](const Profile& p) {
      return (std::log(std::max(1e-5, p.cells[l][0].kl)) + std::log(std::max(1e-5, p.cells[l][1].kl))) / 2;
    };
    const bool other = mean(each[1]) < mean(each[0]) - std::log(1.5);
    names += (l > 0 ? "," : "") + std::string(other ? "expected" : "keydiff");
    for (std::size_t e = 0; e < chosen.experts.size(); ++e) {
      EXPECT_EQ(chosen.cells[l][e].kl, each[other].cells[l][e].kl) << "layer " << l;
      EXPECT_EQ(chosen.cells[l][e].l2, each[other].cells[l][e].l2) << "layer " << l;
    }
  }
  const bool same = names.find(names.substr(0, 7) == "keydiff" ? "expected" : "keydiff") == std::string::npos;
  EXPECT_EQ(chosen.scorer, same ? names.substr(0, names.find(',')) : names);

  // Resumed, the choice stays; with another scorer it is refused.
  options.scorer = kAutoScorer;
  Profile saved;
  const auto stopped = Calibrate(
      tiny.engine, chunks, options, {}, [&](const CalibrateProgress& p) { return p.index < 1; },
      [&](const Profile& p) -> Expected<void> {
        saved = p;
        return {};
      });
  ASSERT_FALSE(stopped);
  EXPECT_EQ(saved.chunks, 1);
  EXPECT_EQ(saved.scorer, chosen.scorer);
  const Profile resumed = MustCalibrate(tiny.engine, chunks, options, saved);
  EXPECT_EQ(resumed.scorer, chosen.scorer);
  for (std::size_t l = 0; l < 3; ++l) EXPECT_DOUBLE_EQ(resumed.cells[l][0].kl, chosen.cells[l][0].kl);
  options.scorer = "streaming";
  EXPECT_EQ(Calibrate(tiny.engine, chunks, options, saved, {}, {}).error().code, ErrorCode::kMismatch);
  options.scorer = kAutoScorer;
  saved.scorer = "streaming";
  EXPECT_EQ(Calibrate(tiny.engine, chunks, options, saved, {}, {}).error().code, ErrorCode::kMismatch);
  const auto cancelled = Calibrate(tiny.engine, chunks, options, {}, [](auto&) { return false; }, {});
  ASSERT_FALSE(cancelled);
  EXPECT_EQ(cancelled.error().code, ErrorCode::kCancelled);
}

TEST(Calibrate, ResumesWhereItWasStopped) {
  const TinyEngine tiny;
  const CalibrateOptions options = Options();
  const auto chunks = Chunks(3);
  const Profile whole = MustCalibrate(tiny.engine, chunks, options);
  Profile saved;
  const auto stopped = Calibrate(
      tiny.engine, chunks, options, {}, [&](const CalibrateProgress& p) { return p.index < 2; },
      [&](const Profile& p) -> Expected<void> {
        saved = p;
        return {};
      });
  ASSERT_FALSE(stopped);
  EXPECT_EQ(stopped.error().code, ErrorCode::kCancelled);
  EXPECT_EQ(saved.chunks, 2);
  EXPECT_EQ(saved.chunks_wanted, 3);
  auto parsed = ParseProfile(ToJson(saved), "saved");
  ASSERT_TRUE(parsed) << parsed.error().message;
  const Profile resumed = MustCalibrate(tiny.engine, chunks, options, *parsed);
  EXPECT_EQ(resumed.chunks, 3);
  EXPECT_EQ(ToJson(resumed), ToJson(whole)) << "byte for byte";
  for (std::size_t l = 0; l < whole.cells.size(); ++l) {
    for (std::size_t e = 0; e < whole.experts.size(); ++e) {
      EXPECT_DOUBLE_EQ(resumed.cells[l][e].kl, whole.cells[l][e].kl);
      EXPECT_DOUBLE_EQ(resumed.cells[l][e].l2, whole.cells[l][e].l2);
    }
  }
}

TEST(Calibrate, RefusesToResumeAnotherCalibration) {
  const TinyEngine tiny;
  const auto chunks = Chunks(1);
  CalibrateOptions options = Options();
  options.experts = {{1.0, 4, 4}};
  const Profile p = MustCalibrate(tiny.engine, chunks, options);
  const auto refused = [&](const CalibrateOptions& changed, const char* what) {
    const auto r = Calibrate(tiny.engine, chunks, changed, p, {}, {});
    ASSERT_FALSE(r);
    EXPECT_EQ(r.error().code, ErrorCode::kMismatch);
    EXPECT_NE(r.error().message.find(what), std::string::npos) << r.error().message;
  };
  CalibrateOptions changed = options;
  changed.scorer = "streaming";
  refused(changed, "scorer");
  changed = options;
  changed.guard.window = 60;
  refused(changed, "window");
  changed = options;
  changed.experts = {{1.0, 4, 2}};
  refused(changed, "experts");
  changed = options;
  changed.evaluated = 30;
  refused(changed, "evaluated");
}

TEST(Calibrate, SaveErrorsStopIt) {
  const TinyEngine tiny;
  CalibrateOptions options = Options();
  options.experts = {{1.0, 4, 4}};
  const auto r = Calibrate(tiny.engine, Chunks(1), options, {}, {}, [](const Profile&) -> Expected<void> {
    return Fail(ErrorCode::kIo, "disk full");
  });
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().message, "disk full");
}

TEST(Chunks, EndWhereTextsEndAndNeverCrossThem) {
  CalibrateOptions options;
  options.length = 1000;
  options.chunks = 0;
  const int32_t bos = 7;
  std::vector<int32_t> text;
  const auto add = [&](int64_t n, int32_t token) {
    text.push_back(bos);
    text.insert(text.end(), static_cast<std::size_t>(n), token);
  };
  add(2500, 100);
  add(50, 101);  // too short for a chunk
  add(900, 102);
  text.back() = 200;
  const std::vector<std::vector<int32_t>> texts = {text};
  const auto chunks = MakeChunks(texts, bos, options);
  ASSERT_TRUE(chunks) << chunks.error().message;
  ASSERT_EQ(chunks->size(), 4u);
  for (const auto& chunk : *chunks) {
    EXPECT_LE(chunk.size(), 1000u);
    EXPECT_EQ(chunk[0], bos);
    EXPECT_EQ(std::count(chunk.begin(), chunk.end(), bos), 1);
    EXPECT_EQ(std::count(chunk.begin(), chunk.end(), 101), 0);
    EXPECT_FALSE(std::count(chunk.begin(), chunk.end(), 100) && std::count(chunk.begin(), chunk.end(), 102));
  }
  const auto with_end =
      std::find_if(chunks->begin(), chunks->end(), [](const auto& c) { return c.back() == 200; });
  ASSERT_NE(with_end, chunks->end());
  EXPECT_EQ(with_end->size(), 901u);

  options.chunks = 2;
  EXPECT_EQ(MakeChunks(texts, bos, options)->size(), 2u);
  options.length = 100000;
  const auto none = MakeChunks(texts, bos, options);
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().message.find("2500"), std::string::npos) << none.error().message;
}

TEST(Experts, DefaultsAscendAndFavourK) {
  const auto experts = DefaultExperts();
  EXPECT_TRUE(std::is_sorted(experts.begin(), experts.end()));
  EXPECT_EQ(std::adjacent_find(experts.begin(), experts.end()), experts.end());
  for (const Expert& e : experts) EXPECT_GE(e.k_bits, e.v_bits);
  EXPECT_TRUE(std::count(experts.begin(), experts.end(), Expert{}));
}

}  // namespace
}  // namespace moend
