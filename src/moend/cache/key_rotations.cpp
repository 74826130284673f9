#include "moend/cache/key_rotations.h"

#include <cmath>

namespace moend {

Expected<std::shared_ptr<const KeyRotations>> KeyRotations::Create(const KvShape& shape,
                                                                   std::vector<float> balance) {
  if (std::ssize(balance) != shape.n_kv_heads * shape.head_size)
    return Fail(ErrorCode::kInvalidArgument, "{} factors for {} KV heads of {} channels", balance.size(),
                shape.n_kv_heads, shape.head_size);
  std::shared_ptr<KeyRotations> made(new KeyRotations);
  made->shape_ = shape;
  for (const float b : balance) {
    if (!(b > 0) || !std::isfinite(b) || !std::isfinite(1 / b))
      return Fail(ErrorCode::kInvalidArgument, "a channel of K cannot be multiplied by {}", b);
    made->inverse_.push_back(1 / b);
  }
  made->balance_ = std::move(balance);
  for (int64_t h = 0; h < shape.n_kv_heads; ++h)
    made->heads_.push_back(
        {made->balance_.data() + h * shape.head_size, made->inverse_.data() + h * shape.head_size});
  return made;
}

}  // namespace moend
