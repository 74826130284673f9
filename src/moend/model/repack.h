// Weights copied into the layouts that ggml's CPU back end multiplies faster than a file's rows: blocks of
// several rows interleaved, so that a vector instruction works on all of them (ggml's "extra buffer types").
// Which types gain depends on the machine; ggml says so.
#pragma once

#include <ggml-cpp.h>

#include <cstdint>
#include <vector>

#include "moend/base/error.h"

namespace moend {

struct RepackedWeights {
  ggml_context_ptr context;
  std::vector<ggml_backend_buffer_ptr> buffers;
  int64_t bytes = 0;
};

class Repacker {
 public:
  // Room for `most` tensors.
  explicit Repacker(int64_t most);

  // A matrix of ne1 rows of ne0 elements whose rows lie at `data`, for products only (its rows cannot be read
  // any more). Null where ggml has no better layout for it, or no memory. What is returned can be part of a
  // graph when Finish() has succeeded.
  ggml_tensor* Add(ggml_type type, int64_t ne0, int64_t ne1, const void* data, const char* name);
  // The same for ne2 such matrices, one behind the other, of which a product picks some (experts).
  ggml_tensor* AddExperts(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void* data,
                          const char* name);

  // Allocates and copies all that was added. kOutOfMemory when that many bytes are not there.
  Expected<RepackedWeights> Finish();

 private:
  struct Copy {
    ggml_tensor* tensor;
    const void* from;
  };
  struct Layout {
    ggml_backend_buffer_type_t type;
    ggml_backend_buffer_ptr empty;  // for asking what the type can do
    std::vector<Copy> copies;
  };
  ggml_tensor* Place(bool experts, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void* data,
                     const char* name);
  ggml_context_ptr context_;
  ggml_backend_dev_t device_ = nullptr;
  std::vector<Layout> layouts_;
};

}  // namespace moend
