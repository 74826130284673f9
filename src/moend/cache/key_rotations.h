// The rotations of a cache's KV heads (attention/rotation.h): what a model's weights say, kept once and
// shared by all caches of the same heads.
#pragma once

#include <memory>
#include <vector>

#include "moend/attention/params.h"
#include "moend/base/error.h"
#include "moend/plan/expert.h"

namespace moend {

class KeyRotations {
 public:
  // balance: [n_kv_heads][head_size]. kInvalidArgument unless every number is one whose inverse is finite,
  // too.
  static Expected<std::shared_ptr<const KeyRotations>> Create(const KvShape& shape,
                                                              std::vector<float> balance);

  const KvShape& shape() const { return shape_; }
  const KeyRotation* head(int64_t h) const { return &heads_[static_cast<std::size_t>(h)]; }

 private:
  KeyRotations() = default;
  KvShape shape_;
  std::vector<float> balance_, inverse_;  // [n_kv_heads][head_size]
  std::vector<KeyRotation> heads_;        // point into the above
};

}  // namespace moend
