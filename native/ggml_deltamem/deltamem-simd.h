// Vectors of float32 for the δ-mem kernels: one small struct per instruction set, all with the same members, so that
// the kernels are written once. `deltamem::wide` is the widest of this translation unit; the width of
// `deltamem::narrow` is 8, for the rows of rank 8, or divides 8.
//
// For tests, DELTAMEM_SIMD_SCALAR selects the scalar code, and DELTAMEM_SIMDE the AVX-512 code on any machine, through
// SIMDe. In CUDA sources a GPU thread runs the scalar code.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
    #define DELTAMEM_SIMD_SCALAR
    #define DELTAMEM_FN __host__ __device__
#else
    #define DELTAMEM_FN
#endif

#if defined(DELTAMEM_SIMD_SCALAR)
// the struct scalar needs nothing
#elif defined(DELTAMEM_SIMDE)
    #define DELTAMEM_AVX512
    #define DELTAMEM_AVX2
#elif defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))
    #define DELTAMEM_AVX2
    #if defined(__AVX512F__)
        #define DELTAMEM_AVX512
    #endif
#elif defined(__aarch64__) && defined(__ARM_NEON)
    #define DELTAMEM_NEON
#endif

#if defined(DELTAMEM_SIMDE)
    #define SIMDE_ENABLE_NATIVE_ALIASES
    #include <simde/x86/avx512.h>
    #include <simde/x86/fma.h>
#elif defined(DELTAMEM_AVX2)
    #if defined(DELTAMEM_AVX512) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
        // GCC 12 warns of the undefined vector that its own unmasked intrinsics pass for the lanes that a mask would
        // keep
        #pragma GCC diagnostic push
        #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
        #include <immintrin.h>
        #pragma GCC diagnostic pop
    #else
        #include <immintrin.h>
    #endif
#elif defined(DELTAMEM_NEON)
    #include <arm_neon.h>
#endif

namespace deltamem {

// a float of half precision, as stored
struct float16 {
    uint16_t bits;
};

// exact, for every value
static inline float widen(float16 x) {
    const uint32_t twice     = (uint32_t) x.bits << 17; // without the sign
    const bool     subnormal = twice < 1u << 27;
    const uint32_t bits      = subnormal ? twice >> 17 | 126u << 23 : (twice >> 4) + (224u << 23);
    float          magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude = subnormal ? magnitude - 0.5f : magnitude * 0x1p-112f;
    return x.bits & 0x8000 ? -magnitude : magnitude;
}

static inline float widen(int8_t x) {
    return x;
}

// 32 weights of ggml's Q8_0, as stored: d q_i
struct q8_0 {
    static constexpr int n = 32;

    float16 d;
    int8_t  q[n];
};

// for vectors that have no instruction for it
template <typename V, typename W> static inline V load_widened(const W * p) {
    float x[V::width];
    for (int i = 0; i < V::width; ++i) {
        x[i] = widen(p[i]);
    }
    return V::load(x);
}

// asks for the cache lines of n bytes, which need not exist
static inline void prefetch(const char * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
#if defined(_MSC_VER) && !defined(__clang__)
    #if defined(DELTAMEM_AVX2)
        _mm_prefetch(p + i, _MM_HINT_T0);
    #endif
#else
        __builtin_prefetch(p + i);
#endif
    }
}

// Members, for a vector v:
//     width                     lanes
//     load, store, splat        unaligned; load also of half precision and of signed bytes, splat of half precision
//     + - * /, fma(a, b, c)     fma is a*b + c
//     min, max                  (a, b): b where either is NaN, so a NaN in b survives
//     round                     to nearest even
//     scale(x, n)               x 2^n for integral n in [-126, 127]
//     sqrt
//     sum                       over lanes (narrow types only)

struct scalar {
    static constexpr int width = 1;
    float                v;

    DELTAMEM_FN static scalar load(const float * p) { return { *p }; }
    static scalar             load(const float16 * p) { return { widen(*p) }; }
    static scalar             load(const int8_t * p) { return { (float) *p }; }
    DELTAMEM_FN static scalar splat(float x) { return { x }; }
    static scalar             splat(float16 x) { return { widen(x) }; }
    DELTAMEM_FN void          store(float * p) const { *p = v; }

    DELTAMEM_FN friend scalar operator+(scalar a, scalar b) { return { a.v + b.v }; }
    DELTAMEM_FN friend scalar operator-(scalar a, scalar b) { return { a.v - b.v }; }
    DELTAMEM_FN friend scalar operator*(scalar a, scalar b) { return { a.v * b.v }; }
    DELTAMEM_FN friend scalar operator/(scalar a, scalar b) {
#if defined(__CUDA_ARCH__)
        return { __fdiv_rn(a.v, b.v) }; // under ggml's -use_fast_math, `/` is zero for divisors above 2^126
#else
        return { a.v / b.v };
#endif
    }

    DELTAMEM_FN static scalar fma(scalar a, scalar b, scalar c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
        return { fmaf(a.v, b.v, c.v) }; // a compiler contracts a*b + c in some loops and not in others
#else
        return { a.v * b.v + c.v };
#endif
    }
    DELTAMEM_FN static scalar min(scalar a, scalar b) { return { a.v < b.v ? a.v : b.v }; }
    DELTAMEM_FN static scalar max(scalar a, scalar b) { return { a.v > b.v ? a.v : b.v }; }
    DELTAMEM_FN static scalar sqrt(scalar a) { return { sqrtf(a.v) }; }
    DELTAMEM_FN static scalar round(scalar a) { return { nearbyintf(a.v) }; }

    DELTAMEM_FN static scalar scale(scalar x, scalar n) {
        // converting a NaN to an integer is undefined
        const int32_t bits = n.v == n.v ? ((int32_t) n.v + 127) << 23 : 0x7fc00000;
        float         factor;
        memcpy(&factor, &bits, sizeof(factor));
        return { x.v * factor };
    }

    DELTAMEM_FN float sum() const { return v; }
};

#if defined(DELTAMEM_AVX2)
struct avx2 {
    static constexpr int width = 8;
    __m256               v;

    static avx2 load(const float * p) { return { _mm256_loadu_ps(p) }; }
    static avx2 load(const float16 * p) {
    #if defined(__F16C__) || defined(_MSC_VER)
        return { _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)) };
    #else
        return load_widened<avx2>(p);
    #endif
    }
    static avx2 load(const int8_t * p) {
        return { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p))) };
    }
    static avx2 splat(float x) { return { _mm256_set1_ps(x) }; }
    static avx2 splat(float16 x) {
    #if defined(__F16C__) || defined(_MSC_VER)
        return { _mm256_cvtph_ps(_mm_set1_epi16((short) x.bits)) };
    #else
        return splat(widen(x));
    #endif
    }
    void store(float * p) const { _mm256_storeu_ps(p, v); }

    friend avx2 operator+(avx2 a, avx2 b) { return { _mm256_add_ps(a.v, b.v) }; }
    friend avx2 operator-(avx2 a, avx2 b) { return { _mm256_sub_ps(a.v, b.v) }; }
    friend avx2 operator*(avx2 a, avx2 b) { return { _mm256_mul_ps(a.v, b.v) }; }
    friend avx2 operator/(avx2 a, avx2 b) { return { _mm256_div_ps(a.v, b.v) }; }

    static avx2 fma(avx2 a, avx2 b, avx2 c) { return { _mm256_fmadd_ps(a.v, b.v, c.v) }; }
    static avx2 min(avx2 a, avx2 b) { return { _mm256_min_ps(a.v, b.v) }; }
    static avx2 max(avx2 a, avx2 b) { return { _mm256_max_ps(a.v, b.v) }; }

    static avx2 sqrt(avx2 a) { return { _mm256_sqrt_ps(a.v) }; }
    static avx2 round(avx2 a) { return { _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT) }; }

    static avx2 scale(avx2 x, avx2 n) {
        const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
        return { _mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23))) };
    }

    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s        = _mm_add_ps(s, _mm_movehl_ps(s, s));
        s        = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
        return _mm_cvtss_f32(s);
    }
};
#endif

#if defined(DELTAMEM_AVX512)
struct avx512 {
    static constexpr int width = 16;
    __m512               v;

    static avx512 load(const float * p) { return { _mm512_loadu_ps(p) }; }
    static avx512 load(const float16 * p) {
    #if defined(DELTAMEM_SIMDE)
        return load_widened<avx512>(p); // SIMDe does not have it
    #else
        return { _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)) };
    #endif
    }
    static avx512 load(const int8_t * p) {
    #if defined(DELTAMEM_SIMDE)
        return load_widened<avx512>(p);
    #else
        return { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p))) };
    #endif
    }
    static avx512 splat(float x) { return { _mm512_set1_ps(x) }; }
    static avx512 splat(float16 x) {
    #if defined(DELTAMEM_SIMDE)
        return splat(widen(x));
    #else
        return { _mm512_cvtph_ps(_mm256_set1_epi16((short) x.bits)) };
    #endif
    }
    void store(float * p) const { _mm512_storeu_ps(p, v); }

    friend avx512 operator+(avx512 a, avx512 b) { return { _mm512_add_ps(a.v, b.v) }; }
    friend avx512 operator-(avx512 a, avx512 b) { return { _mm512_sub_ps(a.v, b.v) }; }
    friend avx512 operator*(avx512 a, avx512 b) { return { _mm512_mul_ps(a.v, b.v) }; }
    friend avx512 operator/(avx512 a, avx512 b) { return { _mm512_div_ps(a.v, b.v) }; }

    static avx512 fma(avx512 a, avx512 b, avx512 c) { return { _mm512_fmadd_ps(a.v, b.v, c.v) }; }
    static avx512 min(avx512 a, avx512 b) { return { _mm512_min_ps(a.v, b.v) }; }
    static avx512 max(avx512 a, avx512 b) { return { _mm512_max_ps(a.v, b.v) }; }

    static avx512 sqrt(avx512 a) { return { _mm512_sqrt_ps(a.v) }; }
    static avx512 round(avx512 a) { return { _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT) }; }

    static avx512 scale(avx512 x, avx512 n) { return { _mm512_scalef_ps(x.v, n.v) }; }
};
#endif

#if defined(DELTAMEM_NEON)
struct neon {
    static constexpr int width = 4;
    float32x4_t          v;

    static neon load(const float * p) { return { vld1q_f32(p) }; }
    static neon load(const float16 * p) {
        return { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *) p))) };
    }
    static neon load(const int8_t * p) {
        int32_t four;
        memcpy(&four, p, sizeof(four));
        const int16x8_t x = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
        return { vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))) };
    }
    static neon splat(float x) { return { vdupq_n_f32(x) }; }
    static neon splat(float16 x) { return { vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.bits))) }; }
    void        store(float * p) const { vst1q_f32(p, v); }

    friend neon operator+(neon a, neon b) { return { vaddq_f32(a.v, b.v) }; }
    friend neon operator-(neon a, neon b) { return { vsubq_f32(a.v, b.v) }; }
    friend neon operator*(neon a, neon b) { return { vmulq_f32(a.v, b.v) }; }
    friend neon operator/(neon a, neon b) { return { vdivq_f32(a.v, b.v) }; }

    static neon fma(neon a, neon b, neon c) { return { vfmaq_f32(c.v, a.v, b.v) }; }
    static neon min(neon a, neon b) { return { vminq_f32(a.v, b.v) }; }
    static neon max(neon a, neon b) { return { vmaxq_f32(a.v, b.v) }; }
    static neon sqrt(neon a) { return { vsqrtq_f32(a.v) }; }
    static neon round(neon a) { return { vrndnq_f32(a.v) }; }

    static neon scale(neon x, neon n) {
        const int32x4_t e = vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127));
        return { vmulq_f32(x.v, vreinterpretq_f32_s32(vshlq_n_s32(e, 23))) };
    }

    float sum() const { return vaddvq_f32(v); }
};
#endif

#if defined(DELTAMEM_AVX512)
using wide                              = avx512;
using narrow                            = avx2;
static constexpr const char * simd_name = "AVX-512";
#elif defined(DELTAMEM_AVX2)
using wide                              = avx2;
using narrow                            = avx2;
static constexpr const char * simd_name = "AVX2";
#elif defined(DELTAMEM_NEON)
using wide                              = neon;
using narrow                            = neon;
static constexpr const char * simd_name = "NEON";
#else
using wide                              = scalar;
using narrow                            = scalar;
static constexpr const char * simd_name = "scalar";
#endif

//
// float32 functions, within a few units in the last place over their range
//

// x = n ln 2 + r with integral n and |r| <= ln 2 / 2 (Cody-Waite); x is clamped to [-87, 88]
template <typename V> DELTAMEM_FN static inline void reduce(V x, V & n, V & r) {
    x = V::max(V::splat(-87.0f), V::min(V::splat(88.0f), x));
    n = V::round(x * V::splat(1.44269504f));
    r = V::fma(n, V::splat(-0.693359375f), x);
    r = V::fma(n, V::splat(2.12194440e-4f), r);
}

// e^r - 1 for |r| <= ln 2 / 2, to full relative accuracy (the polynomial of Cephes' expf)
template <typename V> DELTAMEM_FN static inline V expm1_reduced(V r) {
    V p = V::splat(1.9875691500e-4f);
    p   = V::fma(p, r, V::splat(1.3981999507e-3f));
    p   = V::fma(p, r, V::splat(8.3334519073e-3f));
    p   = V::fma(p, r, V::splat(4.1665795894e-2f));
    p   = V::fma(p, r, V::splat(1.6666665459e-1f));
    p   = V::fma(p, r, V::splat(5.0000001201e-1f));
    return V::fma(p, r * r, r);
}

// 1 / (1 + e^-x)
template <typename V> DELTAMEM_FN static inline V sigmoid(V x) {
    const V one = V::splat(1.0f);
    V       n, r;
    reduce(V::splat(0.0f) - x, n, r);
    return one / (one + V::scale(one + expm1_reduced(r), n));
}

// t / (t + 2) with t = e^2x - 1. No cancellation for small x: keys are normalised, so their relative error matters.
template <typename V> DELTAMEM_FN static inline V tanh(V x) {
    const V one = V::splat(1.0f);
    V       n, r;
    reduce(x + x, n, r);
    const V t = V::scale(expm1_reduced(r), n) + (V::scale(one, n) - one);
    return t / (t + V::splat(2.0f));
}

} // namespace deltamem
