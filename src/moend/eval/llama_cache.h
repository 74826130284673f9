// libllama over the same tokens, with the K/V cache types that its users have (--cache-type-k, -v): what our
// caches are compared with at equal bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moend/base/error.h"
#include "moend/plan/plan.h"

struct llama_context;
struct llama_model;

namespace moend::eval {

// f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl: what llama.cpp offers for a cache.
std::vector<std::string> LlamaCacheTypes();

// One file, for any number of caches.
class LlamaModel {
 public:
  static Expected<std::shared_ptr<LlamaModel>> Load(const std::string& path);
  ~LlamaModel();
  llama_model* get() const { return model_; }
  const std::string& path() const { return path_; }

 private:
  LlamaModel() = default;
  llama_model* model_ = nullptr;
  std::string path_;
};

class LlamaCache {
 public:
  // K and V of one type, flash attention on, room for n_ctx tokens. kNotFound lists the types. `shape` is the
  // model's, for bytes().
  static Expected<std::unique_ptr<LlamaCache>> Create(std::shared_ptr<LlamaModel> model,
                                                      const Fingerprint& shape, const std::string& type,
                                                      int64_t n_ctx, int n_threads);
  ~LlamaCache();
  LlamaCache(const LlamaCache&) = delete;
  LlamaCache& operator=(const LlamaCache&) = delete;

  void Clear();
  Expected<void> Read(std::span<const int32_t> tokens);
  // Reads tokens and returns the logits behind each of them, f32 [tokens][n_vocab].
  Expected<std::vector<float>> Predict(std::span<const int32_t> tokens);
  // What so many tokens take in this cache: rows of ggml's type, K and V, every layer.
  int64_t bytes(int64_t tokens) const;

 private:
  LlamaCache() = default;
  Expected<void> Decode(std::span<const int32_t> tokens, bool logits);

  std::shared_ptr<LlamaModel> model_;
  llama_context* context_ = nullptr;
  int64_t n_read_ = 0, bytes_a_layer_ = 0, n_vocab_ = 0;  // bytes of a token
  Fingerprint shape_;
};

}  // namespace moend::eval
