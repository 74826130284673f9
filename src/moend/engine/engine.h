// Runs a model: the threads, ggml's graphs, and the sessions that hold a context each.
//
// Engine is the machine (model, thread pool, work buffers); one computation runs at a time, callers are
// serialized by it. Session is one context: its tokens and its compressed K/V cache. A Session is used by one
// thread at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/base/ledger.h"
#include "moend/model/model.h"
#include "moend/plan/plan.h"

namespace moend {

struct EngineOptions {
  // 0: as many as the process may run at once (base/machine.h). Never more than the CPUs of its affinity
  // mask: threads wait for each other by spinning.
  int n_threads = 0;
  int64_t block_tokens = 512;  // of a prefill block
};

// Called now and then during long work with the share done, 0 to 1; returning false stops it (kCancelled).
using Progress = std::function<bool(double)>;

// Positions are 32 bit in ggml.
inline constexpr int64_t kMostContextTokens = INT32_MAX;

struct SessionOptions {
  // Most tokens, prompt and generated; 0: what the model was trained for. It may be more, as in llama.cpp,
  // but models get worse there.
  int64_t n_ctx = 0;
  std::string scorer = {};              // empty: the plan's
  std::shared_ptr<Ledger> ledger = {};  // counts the K/V bytes; null: one of the session's own
};

struct LayerKvStats {
  Expert expert;
  int64_t tokens = 0;  // live ones, mean over KV heads
  int64_t bytes = 0;
};

struct KvStats {
  int64_t bytes = 0;       // allocated now, scorer state included
  int64_t bytes_full = 0;  // what the same tokens take at 16 bit, uncompressed
  int64_t peak_bytes = 0;  // most that was allocated at once, the prefill's scratch included
  int64_t device_bytes =
      0;  // of a device, which hold copies of these bytes; a shared page counts in each sharer
  std::vector<LayerKvStats> layers;
  double compression() const {
    return bytes > 0 ? static_cast<double>(bytes_full) / static_cast<double>(bytes) : 0;
  }
};

class Engine {
 public:
  static Expected<std::shared_ptr<Engine>> Create(std::shared_ptr<const Model> model,
                                                  const EngineOptions& options = {});
  ~Engine();

  const Model& model() const;
  Fingerprint fingerprint() const;
  int n_threads() const;
  // Whether the device that has layers attends to them in decode steps; else the CPU does.
  bool device_attends() const;

  // The logits of hidden states as Session::Prefill and Session::DecodeBatch give them, all as one product:
  // hidden f32 [n][n_embd], logits f32 [n][n_vocab]. Far cheaper than row by row, since the output matrix is
  // read once.
  Expected<void> Logits(std::span<const float> hidden, std::span<float> logits);
  // Calls fn(i, thread) for 0 <= i < n on the engine's threads, in any order. fn may throw: then some are not
  // called, and the first exception is returned as an error.
  Expected<void> ParallelFor(int64_t n, const std::function<void(int64_t, int)>& fn);

  struct Impl;
  Impl& impl() { return *impl_; }  // for the engine's own files

 private:
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class Session {
 public:
  // kMismatch when the plan was made for another model; kBudget never (a plan is a ratio, not a limit).
  static Expected<Session> Create(std::shared_ptr<Engine> engine, const Plan& plan,
                                  const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  // Reads tokens, layer by layer: all of them through layer 0, whose K/V are then scored, evicted and packed,
  // then layer 1, and so on. May be called again (a further turn). Afterwards logits() are those of the last
  // token. kTooLong when the context would overflow; the session is as it was then. After any other error it
  // cannot be used further, and says so.
  // While `progress` runs, the engine is free: other sessions may decode in it (DecodeBatch), none may
  // prefill. `hidden`, if not null, gets every token's hidden state appended, f32 [tokens][n_embd], for
  // Engine::Logits.
  Expected<void> Prefill(std::span<const int32_t> tokens, const Progress& progress = {},
                         std::vector<float>* hidden = nullptr);

  // One token further. Every kEvictInterval tokens the cache is evicted back to the plan's ratio.
  Expected<void> Decode(int32_t token);

  // The same for several sessions of one engine in one step (continuous batching). Sessions are distinct.
  // With `hidden` the step ends before the logits: the hidden states are appended to it, f32
  // [sessions][n_embd], for Engine::Logits, and the sessions have no logits until a step without it.
  // After an error those that it concerned cannot be used further, and say so; usable() tells which.
  static Expected<void> DecodeBatch(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                                    std::vector<float>* hidden = nullptr);

  // False once something failed half way: all that remains is to destroy it.
  bool usable() const;
  std::span<const float> logits() const;  // [n_vocab], of the newest token
  const std::vector<int32_t>& tokens() const;
  int64_t n_ctx() const;
  const Plan& plan() const;

  // The same context once more; packed pages are shared until one of the two re-packs them.
  Expected<Session> Fork() const;

  KvStats stats() const;
  void ResetPeak();

  struct Impl;
  Impl& impl() { return *impl_; }
  const Impl& impl() const { return *impl_; }

 private:
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace moend
