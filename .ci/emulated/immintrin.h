// The intrinsics of AVX-512 that the kernels use, in plain C++: with BLIP2RT_EMULATE their paths run on any processor, and
// under valgrind, which knows no AVX-512. What each does is Intel's Intrinsics Guide; a masked load or store touches no
// byte that its mask leaves out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef std::uint16_t __mmask16;

namespace emulated {

typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::int32_t Integers __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(64)));
typedef std::uint16_t Halves256 __attribute__((vector_size(32)));
typedef std::uint8_t Bytes __attribute__((vector_size(64)));

template <typename To, typename From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename Vector>
inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <typename Vector, typename Element>
inline Vector load_some(__mmask16 mask, const Element* from) {
    Vector vector = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) vector[i] = from[i];
    return vector;
}

inline float widen(std::uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
}

}  // namespace emulated

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float x) { return __m512{} + x; }
inline __m512i _mm512_set1_epi32(int x) { return emulated::as<__m512i>(emulated::Integers{} + x); }
inline __m512i _mm512_set1_epi8(char x) { return emulated::as<__m512i>(emulated::Bytes{} + static_cast<std::uint8_t>(x)); }

inline __m512 _mm512_loadu_ps(const void* from) { return emulated::load<__m512>(from); }
inline __m512i _mm512_loadu_si512(const void* from) { return emulated::load<__m512i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return emulated::load<__m256i>(from); }
inline void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
    return emulated::load_some<__m512>(mask, static_cast<const float*>(from));
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
    return emulated::as<__m512i>(emulated::load_some<__m512>(mask, static_cast<const float*>(from)));
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
    return emulated::as<__m256i>(emulated::load_some<emulated::Halves256>(mask, static_cast<const std::uint16_t*>(from)));
}
inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<float*>(to)[i] = x[i];
}
inline void _mm512_mask_cvtepi32_storeu_epi8(void* to, __mmask16 mask, __m512i x) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) static_cast<std::uint8_t*>(to)[i] = static_cast<std::uint8_t>(emulated::as<emulated::Words>(x)[i]);
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 sum) {
    for (int i = 0; i < 16; ++i) sum[i] = std::fma(a[i], b[i], sum[i]);
    return sum;
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return emulated::as<__m512i>(emulated::as<emulated::Words>(a) + emulated::as<emulated::Words>(b));
}
inline __m512i _mm512_max_epu32(__m512i a, __m512i b) {
    const auto x = emulated::as<emulated::Words>(a), y = emulated::as<emulated::Words>(b);
    return emulated::as<__m512i>(x > y ? x : y);
}
inline __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
    return emulated::as<__m512i>(emulated::as<emulated::Words>(x) << count);
}
inline __m512i _mm512_srli_epi16(__m512i x, unsigned count) {
    return emulated::as<__m512i>(emulated::as<emulated::Halves>(x) >> static_cast<std::uint16_t>(count));
}
inline int _mm512_reduce_add_epi32(__m512i x) {
    std::uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += emulated::as<emulated::Words>(x)[i];
    return static_cast<int>(sum);
}
inline unsigned _mm512_reduce_max_epu32(__m512i x) {
    const auto values = emulated::as<emulated::Words>(x);
    std::uint32_t largest = 0;
    for (int i = 0; i < 16; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i unsigned_bytes, __m512i signed_bytes) {
    emulated::Words found = emulated::as<emulated::Words>(sums);
    const auto a = emulated::as<emulated::Bytes>(unsigned_bytes), b = emulated::as<emulated::Bytes>(signed_bytes);
    for (int i = 0; i < 64; ++i) found[i / 4] += static_cast<std::uint32_t>(a[i] * static_cast<std::int8_t>(b[i]));
    return emulated::as<__m512i>(found);
}

inline __m512 _mm512_castsi512_ps(__m512i x) { return emulated::as<__m512>(x); }
inline __m512 _mm512_cvtepi32_ps(__m512i x) { return __builtin_convertvector(emulated::as<emulated::Integers>(x), __m512); }
inline __m512i _mm512_cvtps_epi32(__m512 x) {
    emulated::Integers found;
    for (int i = 0; i < 16; ++i) found[i] = std::fabs(x[i]) < 2147483648.0f ? static_cast<int>(std::nearbyint(x[i])) : INT32_MIN;
    return emulated::as<__m512i>(found);
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
    return emulated::as<__m512i>(__builtin_convertvector(emulated::as<emulated::Halves256>(x), emulated::Words));
}
inline __m512 _mm512_maskz_cvtph_ps(__mmask16 mask, __m256i x) {
    __m512 found = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) found[i] = emulated::widen(emulated::as<emulated::Halves256>(x)[i]);
    return found;
}
