// Included before every C++ file of ggml that scripts/setup builds with GCC.
//
// `_tile_loadconfig` of GCC before 11.5, 12.4, 13.3 and 14.1 tells the optimizer that it reads 8 bytes, not
// 64 (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=114098). The rest of a configuration made on the stack is
// then dropped as unused, and the first AMX product faults: on a Xeon of Sapphire Rapids or later, any ggml
// built by Debian 12's GCC crashes in ggml_backend_amx_mul_mat. This names all 64 bytes.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
