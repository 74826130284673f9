#include "moend/engine/session_state.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "moend/base/caught.h"
#include "moend/cache/serialize.h"
#include "moend/engine/compress.h"
#include "moend/engine/engine_impl.h"
#include "moend/engine/queries.h"

namespace moend {
namespace {

static_assert(std::endian::native == std::endian::little, "saved sessions are little endian");

constexpr std::string_view kMagic = "MOENDSS2";
constexpr std::string_view kSource = "the saved session";

void Append(std::string& out, int64_t value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

// Takes `n` bytes from the front; kCorrupt when there are fewer.
Expected<std::string_view> Take(std::string_view& left, int64_t n) {
  if (n < 0 || n > std::ssize(left))
    return Fail(ErrorCode::kCorrupt, "{} announces {} bytes where {} are left", kSource, n, left.size());
  const std::string_view taken = left.substr(0, static_cast<std::size_t>(n));
  left.remove_prefix(static_cast<std::size_t>(n));
  return taken;
}

Expected<int64_t> TakeNumber(std::string_view& left) {
  int64_t value = 0;
  MOEND_ASSIGN(const std::string_view bytes, Take(left, sizeof value));
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

}  // namespace

Expected<void> RecompressSession(Session& session, const Plan& plan) {
  return Caught("compressing a context further", [&]() -> Expected<void> {
    Session::Impl& s = session.impl();
    MOEND_TRY(s.CheckUsable());
    MOEND_TRY(CheckSameModel(plan.model, s.plan.model, "the plan"));
    if (plan.layers.size() != s.plan.layers.size() || plan.guard != s.plan.guard ||
        (!plan.heads.empty() && plan.heads.size() != s.caches.size()))
      return Fail(ErrorCode::kMismatch,
                  "the plan has {} layers and {} heads or protects other tokens; the session has {}",
                  plan.layers.size(), plan.heads.size(), s.plan.layers.size());
    if (s.scorer->needs().query_stats && !s.queries && Evicts(plan)) {
      MOEND_ASSIGN(s.queries, MakeQueryModel(s.engine->model(), plan.queries));
    }
    if (s.scorer->needs().learned && Evicts(plan) && !s.plan.learned) {
      MOEND_TRY(CheckLearned(s.engine->model(), plan.learned.get()));
      s.plan.learned = plan.learned;
    }
    MOEND_TRY(CheckFixedLayers(plan, "the plan"));
    const std::lock_guard lock(s.machine().busy);
    s.failed = true;
    const int64_t n_heads = s.plan.model.shape.n_kv_heads;
    for (int64_t i = 0; i < std::ssize(s.caches); ++i) {
      LayerCache& cache = s.caches[static_cast<std::size_t>(i)];
      if (cache.sliding()) continue;
      if (const Expert expert = plan.expert(i / n_heads, i % n_heads); expert != cache.expert()) {
        MOEND_ASSIGN(cache, cache.Repack(expert));
      }
      // Nobody is asking anything just now: the scorer goes by what it keeps with the cache.
      MOEND_TRY(EvictExcess(cache, s.scorer->of_layer(i / n_heads), s.prompt_tokens, QueryRows{nullptr, 0, 1},
                            s.queries_of(i)));
    }
    const std::string scorer = s.plan.scorer;
    s.plan = plan;
    s.plan.scorer = scorer;
    s.ring = {};
    s.since_eviction = 0;
    s.failed = false;
    return {};
  });
}

// "MOENDSS2" | tokens since the last eviction | tokens of the first prompt | n tokens, i32 each | n layers |
// n bytes, SerializeCache() each
Expected<std::string> SaveSession(const Session& session) {
  return Caught("saving a context", [&]() -> Expected<std::string> {
    const Session::Impl& s = session.impl();
    MOEND_TRY(s.CheckUsable());
    std::string out(kMagic);
    Append(out, s.since_eviction);
    Append(out, s.prompt_tokens);
    Append(out, std::ssize(s.tokens));
    out.append(reinterpret_cast<const char*>(s.tokens.data()), s.tokens.size() * sizeof(int32_t));
    Append(out, std::ssize(s.caches));
    const int64_t heads = s.plan.model.shape.n_kv_heads;
    for (int64_t i = 0; i < std::ssize(s.caches); ++i) {
      if (s.plan.model.holds_state(i / heads)) continue;
      MOEND_ASSIGN(const std::string blob, SerializeCache(s.caches[static_cast<std::size_t>(i)]));
      Append(out, std::ssize(blob));
      out += blob;
    }
    for (const Buffer<float>& state : s.states)
      out.append(reinterpret_cast<const char*>(state.data()),
                 static_cast<std::size_t>(state.size()) * sizeof(float));
    return out;
  });
}

Expected<Session> RestoreSession(std::shared_ptr<Engine> engine, const Plan& plan,
                                 const SessionOptions& options, std::string_view bytes) {
  return Caught("restoring a context", [&]() -> Expected<Session> {
    if (!bytes.starts_with(kMagic))
      return Fail(ErrorCode::kCorrupt, "{} does not begin with {}", kSource, kMagic);
    bytes.remove_prefix(kMagic.size());
    MOEND_ASSIGN(Session session, Session::Create(std::move(engine), plan, options));
    Session::Impl& s = session.impl();
    MOEND_ASSIGN(s.since_eviction, TakeNumber(bytes));
    if (s.since_eviction < 0 || s.since_eviction >= kEvictInterval)
      return Fail(ErrorCode::kCorrupt, "{} was evicted {} tokens ago; {} is the most", kSource,
                  s.since_eviction, kEvictInterval - 1);
    MOEND_ASSIGN(s.prompt_tokens, TakeNumber(bytes));
    MOEND_ASSIGN(const int64_t n, TakeNumber(bytes));
    if (s.prompt_tokens < 0 || s.prompt_tokens > n)
      return Fail(ErrorCode::kCorrupt, "{} has a prompt of {} tokens among {}", kSource, s.prompt_tokens, n);
    if (n <= 0 || n > s.n_ctx)
      return Fail(ErrorCode::kCorrupt, "{} has {} tokens; the context holds 1 to {}", kSource, n, s.n_ctx);
    MOEND_ASSIGN(const std::string_view ids, Take(bytes, n * static_cast<int64_t>(sizeof(int32_t))));
    s.tokens.resize(static_cast<std::size_t>(n));
    std::memcpy(s.tokens.data(), ids.data(), ids.size());
    const int64_t n_vocab = s.engine->model().hparams().n_vocab;
    for (const int32_t t : s.tokens)
      if (t < 0 || t >= n_vocab)
        return Fail(ErrorCode::kCorrupt, "{} has token {} of {}", kSource, t, n_vocab);
    MOEND_ASSIGN(const int64_t n_caches, TakeNumber(bytes));
    if (n_caches != std::ssize(s.caches))
      return Fail(ErrorCode::kMismatch, "{} has {} KV heads in all, the model {}", kSource, n_caches,
                  s.caches.size());
    int64_t kept = 0, allowed = 0;  // tokens of a layer's heads together
    for (int64_t i = 0; i < n_caches; ++i) {
      LayerCache& cache = s.caches[static_cast<std::size_t>(i)];
      const int64_t heads = plan.model.shape.n_kv_heads;
      if (plan.model.holds_state(i / heads)) continue;
      MOEND_ASSIGN(const auto rotations, s.machine().Rotations(i / heads));
      MOEND_ASSIGN(const int64_t size, TakeNumber(bytes));
      MOEND_ASSIGN(const std::string_view blob, Take(bytes, size));
      MOEND_ASSIGN(LayerCache restored,
                   DeserializeCache(s.ledger, blob, kSource, rotations[static_cast<std::size_t>(i % heads)]));
      if (restored.sliding() != cache.sliding())
        return Fail(ErrorCode::kMismatch, "{} was made for other sliding layers", kSource);
      Expert expert = cache.expert();
      kept += KeptTokens(restored.expert().keep, cache.guard(), n);
      allowed += KeptTokens(expert.keep, cache.guard(), n);
      if (plan.adaptive_heads) expert.keep = restored.expert().keep;  // as it was dealt out then
      if (restored.shape() != cache.shape() || restored.expert() != expert ||
          restored.guard() != cache.guard() || restored.tokens_seen() != n)
        return Fail(ErrorCode::kMismatch, "{} was made with another plan, or its layers differ in length",
                    kSource);
      // What a head holds beyond its share came since the last eviction; and heads that share their layer's
      // tokens do not have more of them together, but for a page each.
      if (restored.Excess(0) > s.since_eviction)
        return Fail(ErrorCode::kCorrupt, "{} holds {} tokens of a KV head more than its plan allows", kSource,
                    restored.Excess(0));
      if ((i + 1) % heads == 0) {
        if (kept > allowed + heads * kPageTokens)
          return Fail(ErrorCode::kCorrupt, "{} keeps {} tokens of a layer's heads where its plan allows {}",
                      kSource, kept, allowed);
        kept = allowed = 0;
      }
      cache = std::move(restored);
    }
    for (Buffer<float>& state : s.states) {
      MOEND_ASSIGN(const std::string_view floats,
                   Take(bytes, state.size() * static_cast<int64_t>(sizeof(float))));
      std::memcpy(state.data(), floats.data(), floats.size());
      if (!std::all_of(state.data(), state.data() + state.size(), [](float x) { return std::isfinite(x); }))
        return Fail(ErrorCode::kCorrupt, "{} has a layer's state that is no number", kSource);
    }
    s.NoteHeads();
    if (!bytes.empty()) return Fail(ErrorCode::kCorrupt, "{} has {} bytes too many", kSource, bytes.size());
    return session;
  });
}

}  // namespace moend
