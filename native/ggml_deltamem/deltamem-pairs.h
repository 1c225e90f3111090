// Pairs of BF16, as the products of AVX512-BF16 and AMX take them: two elements of a row that follow each other. And how
// blocks of 16 rows are transposed.
#pragma once

#include "deltamem-simd.h"

#if defined(__AVX512F__) && !defined(DELTAMEM_SIMDE)
    #define DELTAMEM_TRANSPOSES

namespace deltamem {

    #if defined(__AVX512BF16__)
// 16 pairs of one row, each element rounded to the nearest, even of two
static inline __m512i pairs_of(__m512 lower, __m512 upper) {
    return (__m512i) _mm512_cvtne2ps_pbh(upper, lower);
}
    #endif

// 16 rows of 16 pairs, or of 16 float32, become columns: first within each quarter of four lanes, then the quarters.
static inline void transpose_pairs(__m512i (&row)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j]     = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    for (int half = 0; half < 16; half += 8) {
        for (int i = 0; i < 4; i++) {
            t[half + i]     = _mm512_shuffle_i32x4(row[half + i], row[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(row[half + i], row[half + i + 4], 0xdd);
        }
    }
    for (int i = 0; i < 8; i++) {
        row[i]     = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

} // namespace deltamem

#endif
