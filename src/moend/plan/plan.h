// The two files in which offline and run time meet: the Profile (what each expert costs each layer) and the
// Plan (which expert each layer gets). Both are JSON with a schema version and the fingerprint of the model
// they were made for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/expert.h"
#include "moend/plan/layout.h"
#include "moend/plan/learned_scores.h"
#include "moend/plan/query_stats.h"

namespace moend {

// The scorer unless another is asked for. Of all it keeps answers best when the question comes after the
// compression: 4k facts and records with one plan of 28x: keydiff 0.37, streaming 0.17, snapkv 0.08, expected
// attention 0.01.
inline constexpr const char* kDefaultScorer = "keydiff";
// The scorer that reads a prompt twice, and whose second reading a refit needs.
inline constexpr const char* kReconstructScorer = "reconstruct";
// The one that expects what that reading would tell, from the first.
inline constexpr const char* kLearnedScorer = "learned";

// Tells models apart: a Plan or Profile is refused by any other model.
struct Fingerprint {
  std::string architecture;  // "llama", "qwen2", "qwen3"
  std::string name;          // general.name, for people
  int64_t n_layers = 0;
  KvShape shape;
  std::string
      hash;  // 16 hex digits over the hyper-parameters, tensor names, types, shapes and samples of their data
  // Of each layer: the newest tokens that a sliding layer sees, 0 for a full one, kHoldsState for one that
  // remembers a state of fixed size instead of K/V; empty where all are full. A sliding layer remembers its
  // window at 16 bit, a state is float32: neither is a matter of plans, whose expert for it is Expert{}.
  static constexpr int64_t kHoldsState = INT64_MAX;
  std::vector<int64_t> windows = {};
  int64_t state_bytes = 0;  // of a layer that holds a state; a multiple of the number of KV heads
  int64_t window(int64_t layer) const {
    return windows.empty() ? 0 : windows[static_cast<std::size_t>(layer)];
  }
  bool holds_state(int64_t layer) const { return window(layer) == kHoldsState; }
  int64_t sliding_layers() const;
  int64_t state_layers() const;
  bool operator==(const Fingerprint&) const = default;
};

inline constexpr std::size_t kLongestScorer = 16384;  // characters of a name for each layer of a large model
// The names in a `scorer` of a Plan or Profile: one, or one for each layer with commas between them. They
// point into `scorer`.
std::vector<std::string_view> ScorersOf(std::string_view scorer);

// Its kl is taken for the noise of a row. Any change of a layer's attention output, however small, makes the
// later layers round otherwise (ggml multiplies weights with activations rounded to 8 bits) and moves the
// logits: on the reference model by 7e-4 nats from layer 0, falling to 7e-5 from layer 11. Added up over 24
// KV heads that is about as much as a plan of 14x loses.
inline constexpr Expert kNoiseExpert{1.0, 8, 8};

struct ProfileCell {
  double l2 = 0;  // relative L2 error of the layer's attention output, when this layer alone has the expert
  double kl = 0;  // KL(full || compressed) of the logits in nats a token, likewise
};

// How a Profile's losses were measured: by the logits of runs with one row compressed at a time, or by what
// compression does to the queries of a repetition (calibrate/reconstruction.h), of which kl has no unit until
// it is weighted by sensitivities.
enum class ProfileMethod { kLogits, kReconstruction };

// A whole plan, predicted by the profile and measured on text.
struct ProfileCheck {
  double compression = 0, predicted = 0;
  double measured = 0;  // mean KL(full || compressed) in nats a token
};

// Of KV heads compressed alone (calibrate/sensitivity.h): the losses that were predicted from their errors,
// and the KL(full || compressed) that was measured, each summed over the probed texts.
struct Sensitivity {
  double error = 0, kl = 0;
};

struct Profile {
  // 2: measured with rotated keys whose rounding errors are passed on; 3: the noise counts once for a KV head
  // that is evicted and quantized. What older ones say is no longer true.
  static constexpr int kSchema = 3;
  Fingerprint model;
  ProfileMethod method = ProfileMethod::kLogits;
  std::string scorer = kDefaultScorer;
  Protected guard;
  int64_t length = 0;     // tokens of a calibration chunk
  int64_t evaluated = 0;  // of which the last ones, after compression, were measured
  int64_t chunks = 0;     // finished chunks; the cells are means over them
  int64_t chunks_wanted = 0;
  std::vector<Expert> experts;                  // ascending; the same list for every layer
  std::vector<std::vector<ProfileCell>> cells;  // [layer][expert]
  // The same for a single KV head compressed alone: [layer * n_kv_heads + head][expert]; empty when not
  // measured.
  std::vector<std::vector<ProfileCell>> head_cells;
  // [layer * n_kv_heads + head], by which the kl of the cells is weighted; empty when not measured.
  std::vector<Sensitivity> sensitivity;
  int64_t probed = 0;                            // texts that these are sums over
  std::vector<ProfileCheck> checks;              // by ascending prediction; may be empty
  std::shared_ptr<const QueryStats> queries;     // null in profiles of older versions
  std::shared_ptr<const LearnedScores> learned;  // null when nothing was learned
};

const char* Name(ProfileMethod method);

// The KL in nats a token that a whole plan with this sum of losses is to be expected to have, going by the
// profile's checks: between two of them log KL is linear in log loss, outside it stays proportional to the
// nearest one. NaN without checks, or where a check measured nothing.
double ExpectedKl(const Profile& profile, double loss);

struct Plan {
  static constexpr int kSchema = 1;
  Fingerprint model;
  std::string variant = "2d_hetero";  // full, 1d, 2d_uniform, 2d, 2d_hetero, 2d_heads, ...
  std::string scorer = kDefaultScorer;
  std::string solver;  // greedy, hull, exact; empty when nothing was solved
  std::string metric;  // kl or l2
  Protected guard;
  int64_t context_length = 0;  // the budget holds up to this many tokens
  int64_t budget_bytes = 0;    // asked for
  int64_t bytes = 0;           // LayerBytes() of all layers at context_length
  std::vector<Expert> layers;
  // Routing by KV head (variant 2d_heads): [layer * n_kv_heads + head]; empty when all heads of a layer have
  // its expert. The layer's own entry then sums its heads up for people: the mean keep ratio, the bits of the
  // head with most bytes.
  std::vector<Expert> heads;
  // The KV heads of a layer share the tokens that its expert keeps: each prompt deals them out anew, to where
  // its scores are highest (Ada-KV). Then `heads` is empty, but for the plan of a session that has read.
  bool adaptive_heads = false;
  // The values of kept tokens are moved so that attention to them gives what attention to all tokens gave
  // (cache/value_refit.h). Takes a scorer that repeats the prompt (ScorerNeeds::repetition).
  bool refit = false;
  std::vector<double> predicted;                 // loss of each layer by the profile; may be empty
  std::shared_ptr<const QueryStats> queries;     // for scorers that need them (ScorerNeeds); else null
  std::shared_ptr<const LearnedScores> learned;  // likewise

  const Expert& expert(int64_t layer, int64_t head) const {
    if (heads.empty()) return layers[static_cast<std::size_t>(layer)];
    return heads[static_cast<std::size_t>(layer * model.shape.n_kv_heads + head)];
  }
};

// Unknown fields are kept out, missing or ill-typed ones are an error that names `source` (a path) and the
// field.
Expected<Profile> ParseProfile(const std::string& json, const std::string& source);
Expected<Plan> ParsePlan(const std::string& json, const std::string& source);
std::string ToJson(const Profile& profile);
// Writes ToJson() to a file; kInvalidArgument when a loss is not finite, which no file can hold.
Expected<void> SaveProfile(const Profile& profile, const std::string& path);
std::string ToJson(const Plan& plan);

Expected<Profile> LoadProfile(const std::string& path);
Expected<Plan> LoadPlan(const std::string& path);

// kMismatch, naming both models, unless they are one and the same.
Expected<void> CheckSameModel(const Fingerprint& made_for, const Fingerprint& running,
                              const std::string& source);

// Whether any layer or KV head gives tokens up.
bool Evicts(const Plan& plan);

// kMismatch, naming the layer, for a plan that compresses one that is no matter of plans.
Expected<void> CheckFixedLayers(const Plan& plan, const std::string& source);

// Gives every layer that can be compressed the expert.
void CompressAlike(Plan& plan, const Expert& expert);

// A plan that compresses nothing.
Plan FullPlan(const Fingerprint& model, int64_t context_length);

// Most bytes of a layer that is no matter of plans, or of `n_heads` of its KV heads: window > 0 as
// Fingerprint::window() gives it.
Expected<int64_t> FixedBytes(const Fingerprint& model, int64_t window, int64_t n_heads, int64_t n_tokens);

// Sum of LayerBytes over the layers / of FullLayerBytes; sliding layers by their windows in both, and states
// in both as they are.
Expected<int64_t> PlanBytes(const Plan& plan, int64_t n_tokens, int64_t score_bytes);
int64_t FullBytes(const Fingerprint& model, int64_t n_tokens);

}  // namespace moend
