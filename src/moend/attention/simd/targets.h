// What Highway compiles the kernels for. Include before any Highway header.
#pragma once

// AVX-512 with VNNI, VBMI ...: Ice Lake, Zen 4 and later.
#define HWY_WANT_AVX3_DL
// Kernels keep arrays of vectors in registers, which types of unknown size cannot do; SSE4 is the floor on
// x86 and NEON serves SVE machines.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
