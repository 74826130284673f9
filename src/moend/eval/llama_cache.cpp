#include "moend/eval/llama_cache.h"

#include <ggml.h>
#include <llama.h>

#include <algorithm>
#include <array>

#include "moend/model/tokenizer.h"

namespace moend::eval {
namespace {

constexpr int64_t kBatch = 512;

constexpr std::array<ggml_type, 9> kTypes = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                             GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                             GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL};

}  // namespace

std::vector<std::string> LlamaCacheTypes() {
  std::vector<std::string> names;
  for (const ggml_type type : kTypes) names.emplace_back(ggml_type_name(type));
  return names;
}

Expected<std::shared_ptr<LlamaModel>> LlamaModel::Load(const std::string& path) {
  StartLibllama();
  std::shared_ptr<LlamaModel> out(new LlamaModel);
  out->path_ = path;
  llama_model_params params = llama_model_default_params();
  params.n_gpu_layers = 0;
  try {
    out->model_ = llama_model_load_from_file(path.c_str(), params);
  } catch (const std::exception& e) {
    return Fail(ErrorCode::kUnsupported, "libllama cannot load {}: {}", path, e.what());
  }
  if (!out->model_) return Fail(ErrorCode::kUnsupported, "libllama cannot load {}", path);
  return out;
}

LlamaModel::~LlamaModel() {
  llama_model_free(model_);
}

Expected<std::unique_ptr<LlamaCache>> LlamaCache::Create(std::shared_ptr<LlamaModel> model,
                                                         const Fingerprint& shape, const std::string& name,
                                                         int64_t n_ctx, int n_threads) {
  const auto type = std::ranges::find_if(kTypes, [&](ggml_type t) { return name == ggml_type_name(t); });
  if (type == kTypes.end())
    return Fail(ErrorCode::kNotFound, "llama.cpp has no cache of type \"{}\"; possible: {}", name,
                fmt::join(LlamaCacheTypes(), ", "));
  if (n_ctx < 1 || n_ctx > INT32_MAX / 2)
    return Fail(ErrorCode::kInvalidArgument, "a context of {} tokens is not possible", n_ctx);
  std::unique_ptr<LlamaCache> out(new LlamaCache);
  out->model_ = std::move(model);
  // As libllama lays a cache out: a row of all KV heads a token and layer.
  const int64_t row = shape.shape.head_size * shape.shape.n_kv_heads;
  if (row % ggml_blck_size(*type) != 0)
    return Fail(ErrorCode::kUnsupported,
                "{} has {} numbers a token and layer, no multiple of {}'s block of {}", out->model_->path(),
                row, name, ggml_blck_size(*type));
  out->bytes_a_layer_ = 2 * static_cast<int64_t>(ggml_row_size(*type, row));
  out->shape_ = shape;
  out->n_vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(out->model_->get()));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(n_ctx);
  params.n_batch = params.n_ubatch = static_cast<uint32_t>(std::min(kBatch, n_ctx));
  params.n_threads = params.n_threads_batch = n_threads;
  params.type_k = params.type_v = *type;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // quantized V needs it
  try {
    out->context_ = llama_init_from_model(out->model_->get(), params);
  } catch (const std::exception& e) {
    return Fail(ErrorCode::kUnsupported, "libllama makes no {} cache of {} tokens: {}", name, n_ctx,
                e.what());
  }
  if (!out->context_)
    return Fail(ErrorCode::kUnsupported, "libllama makes no {} cache of {} tokens for {}", name, n_ctx,
                out->model_->path());
  return out;
}

LlamaCache::~LlamaCache() {
  llama_free(context_);
}

int64_t LlamaCache::bytes(int64_t tokens) const {
  int64_t seen = 0;
  for (int64_t l = 0; l < shape_.n_layers; ++l)
    if (!shape_.holds_state(l)) seen += shape_.window(l) > 0 ? std::min(tokens, shape_.window(l)) : tokens;
  return seen * bytes_a_layer_ + shape_.state_layers() * shape_.state_bytes;
}

void LlamaCache::Clear() {
  llama_memory_clear(llama_get_memory(context_), true);
  n_read_ = 0;
}

Expected<void> LlamaCache::Decode(std::span<const int32_t> tokens, bool logits) {
  llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
  batch.n_tokens = static_cast<int32_t>(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = static_cast<int32_t>(n_read_ + static_cast<int64_t>(i));
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = logits ? 1 : 0;
  }
  int32_t status = 0;
  try {
    status = llama_decode(context_, batch);
  } catch (const std::exception&) {
    status = -1;
  }
  llama_batch_free(batch);
  if (status != 0)
    return Fail(ErrorCode::kInternal, "libllama cannot read {} tokens behind {} (status {})", tokens.size(),
                n_read_, status);
  n_read_ += std::ssize(tokens);
  return {};
}

Expected<void> LlamaCache::Read(std::span<const int32_t> tokens) {
  for (std::size_t done = 0; done < tokens.size();) {
    const std::size_t n = std::min(tokens.size() - done, static_cast<std::size_t>(kBatch));
    MOEND_TRY(Decode(tokens.subspan(done, n), false));
    done += n;
  }
  return {};
}

Expected<std::vector<float>> LlamaCache::Predict(std::span<const int32_t> tokens) {
  std::vector<float> out;
  for (std::size_t done = 0; done < tokens.size();) {
    const std::size_t n = std::min(tokens.size() - done, static_cast<std::size_t>(kBatch));
    MOEND_TRY(Decode(tokens.subspan(done, n), true));
    for (std::size_t i = 0; i < n; ++i) {
      const float* row = llama_get_logits_ith(context_, static_cast<int32_t>(i));
      if (!row) return Fail(ErrorCode::kInternal, "libllama gives no logits");
      try {
        out.insert(out.end(), row, row + n_vocab_);
      } catch (const std::exception&) {
        return Fail(ErrorCode::kOutOfMemory, "no memory for the logits of {} tokens", tokens.size());
      }
    }
    done += n;
  }
  return out;
}

}  // namespace moend::eval
