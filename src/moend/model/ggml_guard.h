// ggml ends the process where it is refused a little memory of its own (GGML_ASSERT after malloc). Within a
// guard that comes back as an error instead.
#pragma once

#include <cstdint>
#include <type_traits>

#include "moend/base/error.h"

namespace moend {

enum class GgmlStage {
  kBuild,  // nothing runs: graphs, tables and buffers are made
  kStart,  // a graph is started; only what ggml allocates before its threads begin is caught
};

// Runs call(user) on this thread; kOutOfMemory when ggml gave up in it for want of memory. What ggml was
// building then is half made: it must be forgotten, not freed.
Expected<void> GuardGgml(GgmlStage stage, void (*call)(void* user), void* user);

template <class F>
Expected<void> GuardGgml(GgmlStage stage, F&& f) {
  return GuardGgml(
      stage, [](void* user) { (*static_cast<std::remove_reference_t<F>*>(user))(); }, &f);
}

// Whether the system gives `bytes` at this moment. ggml uses some allocations without looking at them; asked
// first for as much, the system does not refuse them a moment later.
bool HasMemoryFor(int64_t bytes);

}  // namespace moend
