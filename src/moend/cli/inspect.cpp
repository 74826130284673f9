// moend inspect: explains a model, a profile or a plan.
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>

#include "moend/base/file.h"
#include "moend/cli/commands.h"
#include "moend/cli/common.h"
#include "moend/plan/json_reader.h"

namespace moend::cli {
namespace {

constexpr const char* kInspectFooter = R"(
Examples:
  moend inspect model.gguf
  moend inspect profile.json
  moend inspect plan.json

A model: what it is and what its K/V cache takes. A profile: a heat map, a row a layer, a column an expert. A
plan: what each layer keeps, with how many bits, in how many bytes.)";

// The first bytes of a file, fewer when it is shorter. None of what is no regular file, such as a pipe, which
// would be waited for: the reader that comes next says what is wrong with it.
std::string Head(const std::string& path, std::size_t n) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return {};
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) return {};
  std::string head(n, '\0');
  head.resize(std::fread(head.data(), 1, n, file.get()));
  return head;
}

constexpr int64_t kLongestContext = INT32_MAX;

void Row(const char* name, const std::string& value) {
  fmt::print("{:<22}{}\n", name, value);
}

Expected<void> ExplainModel(const std::string& path) {
  LoadOptions options;
  options.vocabulary = false;
  MOEND_ASSIGN(const auto model, Model::Load(path, options));
  const HyperParams& hp = model->hparams();
  Row("model", hp.name.empty() ? "(unnamed)" : Printable(hp.name));
  Row("file", fmt::format("{}, {:.1f} MiB", path, MiB(model->file_bytes())));
  Row("architecture", hp.architecture_name);
  Row("layers", fmt::format("{}", hp.n_layers));
  const FfnParams& ffn = hp.layers.back().ffn;
  Row("width", fmt::format("{}, feed-forward {}", hp.n_embd, ffn.n_ff));
  if (ffn.n_experts > 0)
    Row("experts", fmt::format("{}, of which a token goes through {}{}", ffn.n_experts, ffn.n_used,
                               ffn.n_ff_shared > 0 ? " and a shared one" : ""));
  Row("query heads", fmt::format("{}, {} to a KV head", hp.n_heads, hp.n_heads / hp.n_kv_heads));
  Row("KV heads", fmt::format("{}, head size {}", hp.n_kv_heads, hp.head_size));
  Row("vocabulary", fmt::format("{} tokens", hp.n_vocab));
  Row("trained context", fmt::format("{} tokens", hp.n_ctx_train));
  Row("RoPE", fmt::format("base {:g}, scale {:g}{}", hp.rope.freq_base, hp.rope.freq_scale,
                          hp.rope.ext_factor != 0 ? ", YaRN" : ""));
  if (const auto none = std::ranges::count(hp.layers, 0, [](const LayerParams& l) { return l.rope.n_dims; });
      none > 0)
    Row("layers without RoPE", fmt::format("{}", none));
  std::map<int64_t, int64_t> sliding;  // layers of each window
  for (const LayerParams& l : hp.layers)
    if (l.window > 0) ++sliding[l.window];
  int64_t full = hp.n_layers, states = 0;
  for (const LayerParams& l : hp.layers) {
    if (!l.holds_state()) continue;
    states += l.delta_net.state_floats() * static_cast<int64_t>(sizeof(float));
    --full;
  }
  if (states > 0)
    Row("delta net layers",
        fmt::format("{}, which remember {} bytes of any context", hp.n_layers - full, states));
  for (const auto& [window, layers] : sliding) {
    Row("sliding layers", fmt::format("{}, which see the newest {} tokens", layers, window));
    full -= layers;
  }
  if (states > 0 || !sliding.empty()) Row("full layers", fmt::format("{}, which plans compress", full));
  if (hp.layers.back().soft_cap > 0)
    Row("soft cap", fmt::format("{:g} of attention scores", hp.layers.back().soft_cap));
  if (hp.layers.back().sinks) Row("sinks", "a learned logit in the softmax of each query head");
  Row("fingerprint", model->hash());

  const KvShape shape{hp.n_kv_heads, hp.head_size};
  const auto bytes = [&](int64_t tokens) {
    int64_t sum = states;
    for (const LayerParams& l : hp.layers)
      if (!l.holds_state()) sum += FullLayerBytes(shape, l.window > 0 ? std::min(l.window, tokens) : tokens);
    return sum;
  };
  fmt::print("\nK/V cache at 16 bit: {} bytes a token", full * FullLayerBytes(shape, 1));
  if (!sliding.empty())
    fmt::print(" and {} of windows", bytes(kLongestContext) - full * FullLayerBytes(shape, kLongestContext));
  if (states > 0) fmt::print(" and {} of states", states);
  fmt::print("\n\n{:>10}", "tokens");
  constexpr double kRatios[] = {1, 4, 8, 14, 20, 40};
  for (const double r : kRatios) fmt::print("{:>12}", r == 1 ? "full" : fmt::format("{:g}x", r));
  fmt::print("\n");
  for (int64_t tokens = 1024;; tokens = tokens * 4 < hp.n_ctx_train ? tokens * 4 : hp.n_ctx_train) {
    const int64_t shown = std::min(tokens, hp.n_ctx_train);
    fmt::print("{:>10}", shown);
    // Windows and states stay as they are, so that short contexts cannot be made small.
    const int64_t fixed = bytes(shown) - full * FullLayerBytes(shape, shown);
    for (const double r : kRatios) {
      const double mib = MiB(bytes(shown)) / r;
      fmt::print("{:>12}", r > 1 && mib <= MiB(fixed) ? "-" : fmt::format("{:.2f} MiB", mib));
    }
    fmt::print("\n");
    if (shown >= hp.n_ctx_train) break;
  }
  return {};
}

Expected<void> Run(const std::string& path) {
  const std::string head = Head(path, 64);
  const std::size_t first = head.find_first_not_of(" \t\r\n\xEF\xBB\xBF");
  if (first == std::string::npos || head[first] != '{') return ExplainModel(path);
  MOEND_ASSIGN(const std::string text, ReadFile(path, int64_t{128} << 20));
  MOEND_ASSIGN(const auto document, ParseJson(text, path));
  const JsonNode root(document, path);
  MOEND_ASSIGN(const JsonNode kind, root.At("moend"));
  MOEND_ASSIGN(const std::string name, kind.Text(64));
  if (name == "profile") {
    MOEND_ASSIGN(const Profile profile, ParseProfile(text, path));
    fmt::print("{}", DescribeProfile(profile, OutputStyle()));
    return {};
  }
  if (name == "plan") {
    MOEND_ASSIGN(const Plan plan, ParsePlan(text, path));
    fmt::print("{}", DescribePlan(plan, OutputStyle()));
    return {};
  }
  return Fail(ErrorCode::kUnsupported, "{} is a moend file of kind '{}'; inspect knows profile and plan",
              path, Printable(name));
}

}  // namespace

void AddInspect(CLI::App& app, int& exit_code) {
  auto* command = app.add_subcommand("inspect", "Explain a model, a profile or a plan");
  auto path = std::make_shared<std::string>();
  command->add_option("file", *path, "a GGUF model, a profile or a plan")->required()->type_name("FILE");
  command->footer(kInspectFooter);
  command->callback([path, &exit_code] { exit_code = ExitCode(Run(*path)); });
}

}  // namespace moend::cli
