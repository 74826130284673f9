// Included before every C file of ggml that scripts/setup builds.
//
// ggml's threads wait for each other behind every operation, some hundred times a token, in a loop that never
// gives its CPU away. Where the machine has fewer free CPUs than there are threads, each wait lasts until the
// scheduler takes the CPU from the one that waits: milliseconds, a thousand times what the work takes. Now and
// then the loop yields; where no one else wants the CPU that is a system call of less than a microsecond.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <immintrin.h>
#include <sched.h>
static inline void moend_pause(void) {
  static __thread unsigned pauses;
  __builtin_ia32_pause();
  if ((++pauses & 255) == 0) sched_yield();  // about every ten microseconds
}
#define _mm_pause moend_pause
#endif
