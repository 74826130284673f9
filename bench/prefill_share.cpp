// What compression costs when a prompt is read: the time of scoring, choosing and packing, by scorer, against
// the time of reading.
//
//   prefill_share MODEL.gguf PLAN.json [tokens] [threads]
#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "moend/engine/capture.h"

namespace moend::bench {
namespace {

[[noreturn]] void Die(const std::string& why) {
  fmt::print(stderr, "prefill_share: {}\n", why);
  std::exit(1);
}

template <class T>
T Must(Expected<T> value) {
  if (!value) Die(value.error().message);
  return std::move(*value);
}

class Timer {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Scorers that want the same of the reading share one.
void Measure(const std::shared_ptr<Engine>& engine, const Plan& plan, const std::vector<int32_t>& tokens,
             const std::vector<std::string>& scorers, const char* what) {
  const Timer reading;
  const KvCapture capture = Must(KvCapture::Create(engine, tokens, scorers));
  const double read = reading.seconds();
  for (const std::string& scorer : scorers) {
    double best = 1e9;
    for (int i = 0; i < 3; ++i) {
      const Timer packing;
      const Session session = Must(SessionFromCapture(
          engine, plan, capture, {.n_ctx = static_cast<int64_t>(tokens.size()) + 1, .scorer = scorer}));
      best = std::min(best, packing.seconds());
    }
    fmt::print("| {} | {} | {:.2f} | {:.3f} | {:.1f} % |\n", scorer, what, read, best,
               100 * best / (read + best));
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  if (argc < 3) {
    fmt::print(stderr, "usage: prefill_share MODEL.gguf PLAN.json [tokens] [threads]\n");
    return 2;
  }
  const int64_t n = argc > 3 ? std::atoll(argv[3]) : 16384;
  const int threads = argc > 4 ? std::atoi(argv[4]) : 2;
  if (n < 1 || threads < 1) Die("tokens and threads are at least 1");
  const auto model = Must(Model::Load(argv[1], {.n_threads = threads, .vocabulary = false}));
  const auto engine = Must(Engine::Create(model, {.n_threads = threads}));
  const Plan plan = Must(LoadPlan(argv[2]));
  std::mt19937 random(1);
  std::vector<int32_t> tokens(static_cast<std::size_t>(n));
  for (int32_t& t : tokens)
    t = static_cast<int32_t>(random() % static_cast<uint64_t>(model->hparams().n_vocab));
  fmt::print("{} tokens, {} threads, {}\n\n", n, threads, argv[2]);
  fmt::print("| scorer | reading notes | reading s | scoring, choosing, packing s | share |\n");
  fmt::print("|---|---|---:|---:|---:|\n");
  Measure(engine, plan, tokens, {"streaming", "keydiff", "knorm"}, "nothing");
  Measure(engine, plan, tokens, {"snapkv", "tova", "expected"}, "newest queries");
  Measure(engine, plan, tokens, {"h2o"}, "attention received");
  return 0;
}

}  // namespace
}  // namespace moend::bench

int main(int argc, char** argv) {
  return moend::bench::Main(argc, argv);
}
