// Weights as BF16, 32 elements of a row at a time, to a register (deltamem-bf16.cpp).
#pragma once

#include "deltamem-pairs.h"
#include "ggml-impl.h"
#include "ggml.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

namespace deltamem {

static constexpr int REGISTER = 32; // elements

static inline __m512 first_numbers() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The values of codes 0 to 15, d * code + m, twice.
static inline __m512i values_of_4_bits(float d, float m) {
    const __m512 values = _mm512_fmadd_ps(_mm512_set1_ps(d), first_numbers(), _mm512_set1_ps(m));
    return pairs_of(values, values);
}

// The values of codes 0 to 31.
static inline __m512i values_of_5_bits(float d, float m) {
    const __m512 low = _mm512_fmadd_ps(_mm512_set1_ps(d), first_numbers(), _mm512_set1_ps(m));
    const __m512 high =
            _mm512_fmadd_ps(_mm512_set1_ps(d), _mm512_add_ps(first_numbers(), _mm512_set1_ps(16)), _mm512_set1_ps(m));
    return pairs_of(low, high);
}

static inline __m512i look_up(__m256i codes, __m512i values) {
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), values);
}

static inline __m256i low_nibbles(__m256i bytes) {
    return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}

static inline __m256i high_nibbles(__m256i bytes) {
    return low_nibbles(_mm256_srli_epi16(bytes, 4));
}

// Two bits of each byte, from bit `from` on, as bits 4 and 5.
static inline __m256i as_bits_4_and_5(__m256i bytes, int from) {
    return _mm256_slli_epi16(_mm256_and_si256(_mm256_srli_epi16(bytes, from), _mm256_set1_epi8(3)), 4);
}

// 16 bytes of which the low nibbles come first
static inline __m256i nibbles(const uint8_t * bytes) {
    const __m128i both = _mm_loadu_si128((const __m128i *) bytes);
    return low_nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1));
}

// bit 4 of 32 codes
static inline __m256i fifth_bits(const uint8_t * bits) {
    uint32_t mask;
    memcpy(&mask, bits, sizeof(mask));
    return _mm256_maskz_set1_epi8(mask, 16);
}

static inline float half(ggml_half h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); // MSVC has no _cvtsh_ss
}

// The scale and the minimum that a block begins with; their names differ between C and C++.
template <typename Block> static inline const ggml_half * first_two(const Block & b) {
    return (const ggml_half *) &b;
}

static inline void unpack_block(const block_q4_0 & b, __m512i * to) {
    const float d = half(b.d);
    *to           = look_up(nibbles(b.qs), values_of_4_bits(d, -8 * d));
}

static inline void unpack_block(const block_q4_1 & b, __m512i * to) {
    *to = look_up(nibbles(b.qs), values_of_4_bits(half(first_two(b)[0]), half(first_two(b)[1])));
}

static inline void unpack_block(const block_q5_0 & b, __m512i * to) {
    const float d = half(b.d);
    *to           = look_up(_mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh)), values_of_5_bits(d, -16 * d));
}

static inline void unpack_block(const block_q5_1 & b, __m512i * to) {
    *to = look_up(_mm256_or_si256(nibbles(b.qs), fifth_bits(b.qh)),
                  values_of_5_bits(half(first_two(b)[0]), half(first_two(b)[1])));
}

// 32 signed bytes, the first 16 times d, the others times e
static inline __m512i scaled(__m256i bytes, float d, float e) {
    const __m512 low  = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return pairs_of(_mm512_mul_ps(low, _mm512_set1_ps(d)), _mm512_mul_ps(high, _mm512_set1_ps(e)));
}

static inline void unpack_block(const block_q8_0 & b, __m512i * to) {
    const float d = half(b.d);
    *to           = scaled(_mm256_loadu_si256((const __m256i *) b.qs), d, d);
}

static inline void unpack_block(const block_q6_K & b, __m512i * to) {
    const float d = half(b.d);
    for (int i = 0; i < 8; i++) {
        // four blocks of 32 share 64 bytes of low bits and 32 of high ones
        const uint8_t * low   = b.ql + 64 * (i / 4) + 32 * (i % 2);
        const __m256i   codes = _mm256_loadu_si256((const __m256i *) low);
        const __m256i   four  = i % 4 < 2 ? low_nibbles(codes) : high_nibbles(codes);
        const __m256i   two = as_bits_4_and_5(_mm256_loadu_si256((const __m256i *) (b.qh + 32 * (i / 4))), 2 * (i % 4));
        const __m256i   bytes = _mm256_sub_epi8(_mm256_or_si256(four, two), _mm256_set1_epi8(32));
        to[i]                 = scaled(bytes, d * b.scales[2 * i], d * b.scales[2 * i + 1]);
    }
}

template <typename Block, int N> static inline void unpack_row(const void * row, int64_t n, __m512i * to) {
    const Block * blocks = (const Block *) row;
    for (int64_t i = 0; i < n / N; i++) {
        unpack_block(blocks[i], to + i * (N / REGISTER));
    }
}

// Unpacks n elements of a row, whole blocks, to n / 32 registers.
static inline void unpack_elements(ggml_type type, const void * row, int64_t n, __m512i * to) {
    switch (type) {
        case GGML_TYPE_BF16: memcpy(to, row, n * sizeof(ggml_bf16_t)); break;
        case GGML_TYPE_Q4_0: unpack_row<block_q4_0, QK4_0>(row, n, to); break;
        case GGML_TYPE_Q4_1: unpack_row<block_q4_1, QK4_1>(row, n, to); break;
        case GGML_TYPE_Q5_0: unpack_row<block_q5_0, QK5_0>(row, n, to); break;
        case GGML_TYPE_Q5_1: unpack_row<block_q5_1, QK5_1>(row, n, to); break;
        case GGML_TYPE_Q8_0: unpack_row<block_q8_0, QK8_0>(row, n, to); break;
        case GGML_TYPE_Q6_K: unpack_row<block_q6_K, QK_K>(row, n, to); break;
        default:             GGML_ABORT("%s is not unpacked", ggml_type_name(type));
    }
}

} // namespace deltamem

#endif
