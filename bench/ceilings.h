// What this machine can do at most, measured, so that a kernel's speed can be told as a share of it.
#pragma once

namespace moend::bench {

struct Ceilings {
  double bytes_per_second = 0;  // reading a buffer that is far larger than the caches
  double flops_per_second = 0;  // float32 multiply-add (2 operations each), registers only
};

// `threads` threads at once; the sum over them, each by its own CPU time. Best of several runs, less than a
// second. Where other programs keep the threads from running at the same time, the bandwidth they share comes
// out too high.
Ceilings MeasureCeilings(int threads);

}  // namespace moend::bench
