// _tile_loadconfig for ggml's AMX code: compiled before each of its files (cmake/amx.cmake).
// GCC up to 12.3 and 13.2 tells the optimiser that ldtilecfg reads 8 of its 64 bytes (its bug 114098), and the stores to the
// others may be dropped: the first tile product is then an illegal instruction. This one names all 64 bytes.
// ggml calls it in a function of its own, once a thread: it then notes that this is done. But another library, such as PyTorch,
// may load other tiles in that thread, or release them, and the next product of ggml is an illegal instruction. So this returns
// before ggml notes it, and ggml comes here before each product.

#pragma once

#if defined(__AMX_TILE__) && defined(__GNUC__)
    #include <immintrin.h>

static inline void deltamem_tile_loadconfig(const void * config) {
    __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const char (*)[64]) config));
}

    #undef _tile_loadconfig
    #define _tile_loadconfig(config) return deltamem_tile_loadconfig(config)
#endif
