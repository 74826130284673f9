#include "moend/serve/engine_backend.h"

#include <algorithm>
#include <filesystem>

#include "moend/engine/layer_scratch.h"
#include "moend/engine/queries.h"
#include "moend/engine/repetition.h"
#include "moend/engine/session_state.h"
#include "moend/plan/query_stats.h"
#include "moend/score/scorer.h"
#include "moend/serve/sha256.h"
#include "moend/solve/solve.h"

namespace moend::serve {
namespace {

struct SessionContext : Context {
  explicit SessionContext(Session s) : session(std::move(s)) {}
  Session session;
  const std::vector<int32_t>& tokens() const override { return session.tokens(); }
  std::span<const float> logits() const override { return session.logits(); }
  KvStats stats() const override { return session.stats(); }
  int64_t bytes() const override { return session.stats().bytes; }
};

Session& Of(Context& context) {
  return static_cast<SessionContext&>(context).session;
}
const Session& Of(const Context& context) {
  return static_cast<const SessionContext&>(context).session;
}

int64_t CountParameters(const Weights& weights) {
  int64_t n = 0;
  const auto add = [&](const ggml_tensor* t) {
    if (t) n += ggml_nelements(t);
  };
  add(weights.tok_embd);
  add(weights.head.norm);
  if (!weights.tied) add(weights.head.output);
  for (const LayerWeights& l : weights.layers) ForEachWeight(l, add);
  return n;
}

Expert Smaller(const Expert& a, const Expert& b) {
  return {std::min(a.keep, b.keep), std::min(a.k_bits, b.k_bits), std::min(a.v_bits, b.v_bits)};
}

class EngineBackend : public Backend {
 public:
  EngineBackend(std::shared_ptr<Engine> engine, const EngineBackendOptions& options, ScorerNeeds needs,
                BackendInfo info)
      : engine_(std::move(engine)),
        plan_(options.plan),
        further_(options.further),
        scorer_(options.scorer),
        needs_(needs),
        info_(std::move(info)) {}

  const BackendInfo& info() const override { return info_; }

  Expected<std::vector<int32_t>> Tokenize(std::string_view text, bool add_special, bool parse_special,
                                          const std::function<bool()>& stop) const override {
    return tokenizer().Tokenize(text, add_special, parse_special, stop);
  }
  std::string Piece(int32_t token) const override { return tokenizer().Piece(token, false); }
  std::string SpecialPiece(int32_t token) const override { return tokenizer().Piece(token, true); }
  std::string Detokenize(std::span<const int32_t> tokens) const override {
    return tokenizer().Detokenize(tokens, true);
  }
  bool IsEndOfGeneration(int32_t token) const override { return tokenizer().IsEndOfGeneration(token); }

  Expected<ChatTokens> Chat(std::span<const ChatMessage> messages, const ChatOptions& options,
                            const std::function<bool()>& stop) const override {
    MOEND_ASSIGN(ChatPrompt prompt, tokenizer().PrepareChat(messages, options));
    ChatTokens out;
    MOEND_ASSIGN(out.tokens, tokenizer().TokenizePrompt(prompt.prompt, true, 0, stop));
    out.format = std::move(prompt.format);
    return out;
  }
  Expected<std::unique_ptr<Grammar>> MakeGrammar(const GrammarSource& source) const override {
    return tokenizer().MakeGrammar(source);
  }
  Expected<GrammarSource> SchemaGrammar(const std::string& schema) const override {
    return tokenizer().SchemaGrammar(schema);
  }

  Expected<std::unique_ptr<Context>> NewContext() override {
    MOEND_ASSIGN(Session session, Session::Create(engine_, plan_, SessionSettings()));
    return std::make_unique<SessionContext>(std::move(session));
  }

  Expected<void> Prefill(Context& context, std::span<const int32_t> tokens,
                         const std::function<bool(double)>& between) override {
    return Of(context).Prefill(tokens, between);
  }

  Expected<void> DecodeBatch(std::span<Context* const> contexts, std::span<const int32_t> tokens) override {
    std::vector<Session*> sessions;
    for (Context* c : contexts) sessions.push_back(&Of(*c));
    return Session::DecodeBatch(sessions, tokens);
  }

  Expected<std::unique_ptr<Context>> Fork(const Context& context) override {
    MOEND_ASSIGN(Session fork, Of(context).Fork());
    return std::make_unique<SessionContext>(std::move(fork));
  }

  Expected<void> Compress(Context& context, int level) override {
    return RecompressSession(Of(context), further_[static_cast<std::size_t>(level - 1)]);
  }

  Expected<std::string> Serialize(const Context& context) override { return SaveSession(Of(context)); }

  Expected<std::unique_ptr<Context>> Restore(std::string_view bytes) override {
    MOEND_ASSIGN(Session session, RestoreSession(engine_, plan_, SessionSettings(), bytes));
    return std::make_unique<SessionContext>(std::move(session));
  }

  int64_t live_bytes() const override { return ledger_->live(); }
  int64_t peak_bytes() const override { return ledger_->peak(); }

  int64_t ContextBound(int64_t n_tokens) const override {
    // Between two evictions a head holds up to kEvictInterval tokens too many; a page more is open, which may
    // be the copy of a shared one, and another is being written while its run of pages is compacted.
    constexpr int64_t kSlackPages = kEvictInterval / kPageTokens + 3;
    int64_t bytes = 0;
    bool evicts = false;
    ForEachHead([&](const Expert& e) {
      bytes += HeadBytes(e, n_tokens) + kSlackPages * PageBytes(e);
      evicts |= e.keep < 1;
    });
    bytes += FixedLayersBytes(n_tokens);
    // Queries that are observed before an eviction.
    if (evicts)
      bytes += std::min<int64_t>(kDecodeObserved, needs_.observed_queries) * QueryBytes() *
               std::ssize(plan_.layers);
    return bytes;
  }

  int64_t PrefillScratch(int64_t n_past, int64_t n_new) const override {
    const KvShape& shape = plan_.model.shape;
    const HyperParams& hp = engine_->model().hparams();
    const int64_t tokens = RoundUp(std::max<int64_t>(n_new, 1), kPageTokens);
    ScorerNeeds needs = needs_;
    needs.repetition &= n_past == 0 && Evicts(plan_);
    needs.learned &= n_past == 0 && Evicts(plan_);
    if (plan_.refit) needs.reference_tokens = LayerScratch::ReferenceTokens(n_new);
    int64_t bytes = LayerScratch::Bytes(shape, hp.n_heads, tokens, n_new, needs, hp.state_floats());
    bytes += RoundUp(n_new * hp.n_embd * 4, kCacheLine);  // hidden states
    // Each thread's share of what a layer's tokens received.
    if (needs.accumulated) bytes += engine_->n_threads() * RoundUp(shape.n_kv_heads * n_new * 4, kCacheLine);
    if (needs.repetition) bytes += Repetition::MostBytes(hp, engine_->n_threads(), n_new);
    // A head is packed once more with the values of the refit.
    int64_t head = 0;
    ForEachHead([&](const Expert& e) { head = std::max(head, HeadBytes(e, n_new)); });
    if ((needs.repetition || needs.learned) && plan_.refit) bytes += head;
    // A further turn is packed whole before its layer is evicted.
    int64_t page = 0;
    ForEachHead([&](const Expert& e) { page = std::max(page, PageBytes(e)); });
    if (n_past > 0) bytes += shape.n_kv_heads * (tokens / kPageTokens + 1) * (page + kCacheLine);
    return bytes;
  }

  int64_t CompressScratch(int64_t n_tokens) const override {
    // Pages that a fork shares stay where they are: in the worst case the smaller copy is all extra.
    int64_t bytes = FixedLayersBytes(n_tokens);
    ForEachHead([&](const Expert& e) { bytes += HeadBytes(e, n_tokens) + PageBytes(e); });
    return bytes;
  }

 private:
  const Tokenizer& tokenizer() const { return engine_->model().tokenizer(); }

  SessionOptions SessionSettings() const {
    return {.n_ctx = info_.n_ctx, .scorer = scorer_, .ledger = ledger_};
  }

  // The heads of full layers.
  template <class F>
  void ForEachHead(F&& f) const {
    for (int64_t l = 0; l < std::ssize(plan_.layers); ++l)
      for (int64_t h = 0; h < plan_.model.shape.n_kv_heads && plan_.model.window(l) == 0; ++h)
        f(plan_.expert(l, h));
  }
  // Of the other layers.
  int64_t FixedLayersBytes(int64_t n_tokens) const {
    int64_t bytes = 0;
    for (const int64_t window : plan_.model.windows)
      if (window > 0)
        bytes += FixedBytes(plan_.model, window, plan_.model.shape.n_kv_heads, n_tokens).value_or(0);
    return bytes;
  }
  int64_t HeadBytes(const Expert& e, int64_t n_tokens) const {
    const KvShape head{1, plan_.model.shape.head_size};
    return LayerBytes(head, e, plan_.guard, n_tokens, ScoreBytes()).value_or(0);  // checked when made
  }
  int64_t PageBytes(const Expert& e) const {
    const auto layout = MakePageLayout(plan_.model.shape.head_size, e.k_bits, e.v_bits);
    return layout ? layout->bytes + kPageTokens * ScoreBytes() : 0;
  }
  int64_t ScoreBytes() const { return needs_.accumulated ? 4 : 0; }
  int64_t QueryBytes() const {  // one token's queries of one layer, f32
    const HyperParams& hp = engine_->model().hparams();
    return hp.n_heads * hp.head_size * 4;
  }

  std::shared_ptr<Engine> engine_;
  Plan plan_;
  std::vector<Plan> further_;
  std::string scorer_;
  ScorerNeeds needs_;
  BackendInfo info_;
  std::shared_ptr<Ledger> ledger_ = std::make_shared<Ledger>();
};

}  // namespace

std::string CacheId(const Plan& plan, const std::string& scorer, const std::string& model_hash) {
  std::string text =
      fmt::format("moend kv 1|{}|{}|{} {}", model_hash, scorer, plan.guard.sinks, plan.guard.window);
  if (plan.adaptive_heads) text += "|adaptive";
  if (plan.queries) {
    static_assert(sizeof(QueryPair) == 3 * sizeof(double), "no padding, which could hold anything");
    const auto& pairs = plan.queries->pairs;
    text += '|';
    text += Hex(Sha256Of({reinterpret_cast<const char*>(pairs.data()), pairs.size() * sizeof(QueryPair)}));
  }
  if (plan.learned) {
    const auto& weights = plan.learned->weights;
    text += '|';
    text += Hex(Sha256Of({reinterpret_cast<const char*>(weights.data()), weights.size() * sizeof(float)}));
  }
  for (int64_t l = 0; l < std::ssize(plan.layers); ++l) {
    for (int64_t h = 0; h < plan.model.shape.n_kv_heads; ++h) {
      const Expert& e = plan.expert(l, h);
      text += fmt::format("|{:.17g} {} {}", e.keep, e.k_bits, e.v_bits);
    }
  }
  return model_hash + "-" + Hex(Sha256Of(text)).substr(0, 16);
}

Expected<std::unique_ptr<Backend>> MakeEngineBackend(std::shared_ptr<Engine> engine,
                                                     const EngineBackendOptions& options) {
  const Fingerprint model = engine->fingerprint();
  const HyperParams& hp = engine->model().hparams();
  MOEND_TRY(CheckSameModel(options.plan.model, model, "the plan"));
  for (const Plan& p : options.further) MOEND_TRY(CheckSameModel(p.model, model, "a further plan"));
  if (options.n_ctx < 0 || options.n_ctx > kMostContextTokens)
    return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens is not possible; 0 to {} are",
                options.n_ctx, kMostContextTokens);
  const std::string& scorer = options.scorer.empty() ? options.plan.scorer : options.scorer;
  MOEND_ASSIGN(const auto made, MakeScorer(scorer));
  if (made->needs().learned && Evicts(options.plan))
    MOEND_TRY(CheckLearned(engine->model(), options.plan.learned.get()));
  engine->model().tokenizer().StartWorkers();
  BackendInfo info;
  info.n_ctx = options.n_ctx > 0 ? options.n_ctx : hp.n_ctx_train;
  MOEND_ASSIGN(const int64_t bytes, PlanBytes(options.plan, info.n_ctx, made->needs().accumulated ? 4 : 0));
  info.model_name = std::filesystem::path(engine->model().path()).stem().string();
  info.model_hash = model.hash;
  info.plan_name =
      fmt::format("{} {:.1f}x", options.plan.variant,
                  static_cast<double>(FullBytes(model, info.n_ctx)) / static_cast<double>(bytes));
  info.cache_id = CacheId(options.plan, scorer, model.hash);
  info.n_vocab = hp.n_vocab;
  info.n_ctx_train = hp.n_ctx_train;
  info.n_params = CountParameters(engine->model().weights());
  info.model_bytes = engine->model().file_bytes();
  info.longest_token = engine->model().tokenizer().longest_token();
  info.levels = static_cast<int>(options.further.size());
  return std::make_unique<EngineBackend>(std::move(engine), options, made->needs(), std::move(info));
}

std::vector<Plan> FurtherPlans(const Profile& profile, const Plan& base, int64_t n_tokens, int count) {
  std::vector<Plan> plans;
  const auto start = PlanBytes(base, n_tokens, 0);
  if (!start || profile.model != base.model || !(profile.guard == base.guard)) return plans;
  double share = 1;
  int64_t last = *start;
  for (int tries = 0; tries < 2 * count && std::ssize(plans) < count; ++tries) {
    share /= 1.5;
    SolveRequest request;
    request.context_length = n_tokens;
    request.min_keep = kDefaultMinKeep;
    request.floor_price = kDefaultFloorPrice;
    request.budget_bytes = static_cast<int64_t>(static_cast<double>(*start) * share);
    auto solved = Solve(profile, request);
    if (!solved) break;  // the profile has nothing that small
    Plan plan = std::move(solved->plan);
    const Plan& before = plans.empty() ? base : plans.back();
    plan.heads.clear();
    for (int64_t i = 0; i < std::ssize(before.heads); ++i)  // a base that is routed by head stays so
      plan.heads.push_back(Smaller(plan.layers[static_cast<std::size_t>(i / base.model.shape.n_kv_heads)],
                                   before.heads[static_cast<std::size_t>(i)]));
    for (std::size_t l = 0; l < plan.layers.size(); ++l)
      plan.layers[l] = Smaller(plan.layers[l], before.layers[l]);
    plan.scorer = base.scorer;
    const auto bytes = PlanBytes(plan, n_tokens, 0);
    if (!bytes || static_cast<double>(*bytes) > 0.9 * static_cast<double>(last)) continue;
    last = *bytes;
    plans.push_back(std::move(plan));
  }
  return plans;
}

}  // namespace moend::serve
