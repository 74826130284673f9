// Tests of kernels run once for every instruction set.
#pragma once

#include <gtest/gtest.h>
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "moend/attention/attention.h"

namespace moend::test {

// Calls f(), or f(its name), for each instruction set that was compiled and that this machine has.
template <class F>
void ForEachTarget(F f) {
  hwy::SetSupportedTargetsForTest(0);
  const int64_t supported = hwy::SupportedTargets();
  int seen = 0;
  for (int64_t left = supported; left; left &= left - 1) {
    const int64_t target = left & -left;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    // What was not compiled falls to another one, which has its own turn.
    if (std::string(simd::TargetName()) != hwy::TargetName(target)) continue;
    ++seen;
    SCOPED_TRACE(hwy::TargetName(target));
    if constexpr (std::is_invocable_v<F, std::string>) {
      f(std::string(hwy::TargetName(target)));
    } else {
      f();
    }
    if (testing::Test::HasFatalFailure()) break;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(supported);
  ASSERT_GE(seen, 1);
}

}  // namespace moend::test
