#include "moend/model/ggml_guard.h"

#include <ggml.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace moend {
namespace {

struct GgmlGaveUp {};

thread_local const GgmlStage* guarded = nullptr;  // null: ggml may end the process
ggml_abort_callback_t previous = nullptr;

// ggml.c holds its general allocations, and none that a running graph makes.
bool InGeneralPart(const char* message) {
  const char* at = std::strstr(message, "ggml.c:");
  return at && (at == message || at[-1] == '/' || at[-1] == '\\');
}

// ggml's functions are C, but compiled with unwind tables, and hold no lock where they allocate.
void OnAbort(const char* message) {
  if (guarded && (*guarded == GgmlStage::kBuild || InGeneralPart(message))) throw GgmlGaveUp();
  if (previous) {
    previous(message);
  } else {
    std::fprintf(stderr, "%s\n", message);  // as ggml itself does; the process ends behind this
  }
}

}  // namespace

Expected<void> GuardGgml(GgmlStage stage, void (*call)(void* user), void* user) {
  static std::once_flag installed;
  std::call_once(installed, [] { previous = ggml_set_abort_callback(OnAbort); });
  const GgmlStage* const outer = guarded;
  guarded = &stage;
  try {
    call(user);
  } catch (const GgmlGaveUp&) {
    guarded = outer;
    return std::unexpected(Error{ErrorCode::kOutOfMemory, "out of memory"});
  } catch (...) {
    guarded = outer;
    throw;
  }
  guarded = outer;
  return {};
}

bool HasMemoryFor(int64_t bytes) {
  void* const volatile p = std::malloc(static_cast<std::size_t>(bytes));
  std::free(p);
  return p != nullptr;
}

}  // namespace moend
