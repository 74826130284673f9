// Runs a suite under many methods: a context is read once with nothing compressed, compressed for each
// method, and asked each of its questions from a fork. Beside the answer that is generated, each method's
// predictions of the right answer are compared with the full cache's (judge.h).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/engine/engine.h"
#include "moend/eval/methods.h"
#include "moend/eval/prompt.h"
#include "moend/eval/results.h"
#include "moend/eval/suite.h"

namespace moend::eval {

// Makes the sessions of a context that has been read. Behind an interface, so that the runner does not depend
// on how a context is kept.
class ContextSource {
 public:
  virtual ~ContextSource() = default;
  virtual Expected<void> Read(std::span<const int32_t> tokens, const Progress& progress) = 0;
  // A session that has prefilled those tokens under the method's plan, with room for n_ctx tokens.
  virtual Expected<Session> Open(const Method& method, int64_t n_ctx) = 0;
};

// Prefills once per Read, keeps every layer's K/V at 16 bit and compresses them at each Open. `scorers`: all
// that will be asked for. `ledger` and `learned` as in KvCapture::Create.
std::unique_ptr<ContextSource> CapturedContext(std::shared_ptr<Engine> engine,
                                               std::vector<std::string> scorers,
                                               std::shared_ptr<Ledger> ledger = {},
                                               std::shared_ptr<const LearnedScores> learned = {});
// Prefills at every Open: slower, but never holds more than one layer uncompressed.
std::unique_ptr<ContextSource> PlainContext(std::shared_ptr<Engine> engine);

struct EvalOptions {
  bool aware = false;      // compress with the question in the prompt, instead of before it is known
  Lengths lengths;         // as the suite was prepared with
  bool capture = true;     // CapturedContext or PlainContext
  std::string spill = {};  // a folder for the captured K/V; empty: they stay in memory
};

struct EvalProgress {
  double share = 0;     // of all the work left at the start, 0 to 1
  std::string context;  // being worked on
  std::string method;
};

// The settings that results are stored with, and that a continued run must share.
Settings SettingsOf(const Suite& suite, const EvalOptions& options, int64_t context_length);

// Continues `results` (whose settings must be equal; an empty one has no runs) with what is missing for the
// methods; runs of other methods stay in it. `save` is called after each context and at least every half
// minute; a method's answers to a context are in it wholly or not at all. Returning false from `progress`
// stops with kCancelled; what was answered is saved first.
Expected<Results> Evaluate(std::shared_ptr<Engine> engine, const Suite& suite, const PreparedSuite& prepared,
                           std::span<const Method> methods, const EvalOptions& options, Results results,
                           const std::function<bool(const EvalProgress&)>& progress,
                           const std::function<Expected<void>(const Results&)>& save);

// kMismatch says which setting differs.
Expected<void> CheckContinues(const Results& previous, const Fingerprint& model, const Settings& settings,
                              const std::string& source);

}  // namespace moend::eval
