// The ways of compressing that an evaluation compares: the paper's variants and their rivals, all as plans at
// the same allocated bytes.
//
//   full                            nothing compressed
//   1d, 2d_uniform, 2d, 2d_hetero, 2d_heads   as in solve/solve.h
//   pyramid   16 bit, token budgets that fall linearly from the first layer to the last (PyramidKV, Cai et
//   al.
//             2024, with its beta of 20)
//   adakv     1d whose KV heads share their layer's tokens: each prompt deals them out to where the scores
//   are
//             highest, a fifth of the even share at least (Ada-KV, Feng et al. 2024)
//   kvtuner   no eviction, bits routed by layer (KVTuner, Li et al. 2025)
//   q8, q4, q3, q2   no eviction, the same bits everywhere, K per channel and V per token (KIVI, Liu et al.
//             2024); their ratio follows from the bits, whatever was asked for
// Rival scorers (StreamingLLM, H2O, SnapKV, TOVA, KeyDiff, ...) are 1d with that scorer.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/plan.h"
#include "moend/solve/solve.h"

namespace moend::eval {

struct Method {
  std::string variant;
  std::string scorer;      // empty for variants that never evict
  double compression = 0;  // asked for; 0: none
  Plan plan;
};

struct MethodRequest {
  std::vector<std::string> variants;
  std::vector<double> compressions;
  std::vector<std::string> scorers;  // empty: the profile's
  int64_t context_length = 0;        // at which the bytes are equal
  Solver solver = Solver::kExact;
  Metric metric = Metric::kKl;
  std::optional<double> min_keep = {};  // as SolveRequest::min_keep; empty: the default with its price
};

std::vector<std::string> MethodNames();
bool NeedsProfile(const std::string& variant);  // all but full and q8 ... q2

// All combinations, each once: `full` and q8 ... q2 do not depend on the ratio, nor a plan that evicts
// nothing on the scorer, of which it then gets the first. `profile` may be null when no variant needs it. A
// ratio that a variant cannot reach is left out, and `skipped` says so in a sentence each.
Expected<std::vector<Method>> MakeMethods(const Fingerprint& model, const Profile* profile,
                                          const MethodRequest& request, std::vector<std::string>& skipped);

// The one method of a plan from a file.
Method MethodOf(const Plan& plan, const std::string& scorer);

bool Compresses(const Plan& plan);  // evicts or quantizes anything
// "2d_hetero/snapkv 14x"
std::string LabelOf(const std::string& variant, const std::string& scorer, double compression);
std::string LabelOf(const Method& method);

// What the scorer `learned` goes by in those of the methods that have it; null where none has.
std::shared_ptr<const LearnedScores> LearnedOf(std::span<const Method> methods);

}  // namespace moend::eval
