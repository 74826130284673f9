// Runs a function where deep recursion has room.
#pragma once

#include <cstdint>
#include <functional>

#include "moend/base/error.h"

namespace moend {

// Calls `work` on a thread of its own with a stack of `bytes` and waits for it. Memory is taken only as deep
// as the recursion goes. `work` must not throw. kOutOfMemory when the system refuses the thread.
Expected<void> RunWithStack(int64_t bytes, const std::function<void()>& work);

}  // namespace moend
