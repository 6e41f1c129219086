// What happens to rows before they meet the weights and after: rounding, and bias with activation. Every path compiles it
// for its own instructions, so everything here is in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#include "activation.h"
#include "attend.h"

namespace blip2rt {
namespace {

// Half-even rounding of numbers far below 2^22, as additions that compilers vectorise.
inline float round_half_even(float x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    return (x + kShift) - kShift;
}

constexpr float kZero = 1e-30f;  // a group whose largest magnitude is less counts as zero

// Rounds `count` numbers to 8 bits with one scale, NaN where one of them is no number; returns the sum of what they became.
template <typename Value>
std::int32_t round_group(const float* from, std::size_t count, Value* to, float& scale) {
    std::uint32_t largest_bits = 0;  // of |x|: ordered as the numbers are, NaN above infinity
    for (std::size_t k = 0; k < count; ++k) {
        std::uint32_t bits;
        std::memcpy(&bits, from + k, sizeof bits);
        bits &= 0x7fffffffu;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const bool is_number = largest_bits < 0x7f800000u;
    if (!is_number || largest < kZero) {
        scale = is_number ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::memset(to, 0, count * sizeof(Value));
        return 0;
    }
    scale = largest / 127.0f;
    const float inverse = 127.0f / largest;
    std::int32_t sum = 0;
    for (std::size_t k = 0; k < count; ++k) {
        const std::int32_t value = static_cast<std::int32_t>(round_half_even(from[k] * inverse));
        to[k] = static_cast<Value>(value);
        sum += value;
    }
    return sum;
}

#ifdef __AVX512BW__
// The same to the bit: vcvtps2dq rounds half to even, too.
inline std::int32_t round_group(const float* from, std::size_t count, std::int8_t* to, float& scale) {
    const auto inside = [count](std::size_t k) {
        return static_cast<__mmask16>(count - k < 16 ? (1u << (count - k)) - 1 : 0xffffu);
    };
    __m512i magnitudes = _mm512_setzero_si512();
    for (std::size_t k = 0; k < count; k += 16) {
        const __m512i bits = _mm512_maskz_loadu_epi32(inside(k), from + k);
        magnitudes = _mm512_max_epu32(magnitudes, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const std::uint32_t largest_bits = _mm512_reduce_max_epu32(magnitudes);
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const bool is_number = largest_bits < 0x7f800000u;
    if (!is_number || largest < kZero) {
        scale = is_number ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::memset(to, 0, count);
        return 0;
    }
    scale = largest / 127.0f;
    const __m512 inverse = _mm512_set1_ps(127.0f / largest);
    __m512i sums = _mm512_setzero_si512();
    for (std::size_t k = 0; k < count; k += 16) {
        const __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(inside(k), from + k), inverse));
        _mm512_mask_cvtepi32_storeu_epi8(to + k, inside(k), values);
        sums = _mm512_add_epi32(sums, values);
    }
    return _mm512_reduce_add_epi32(sums);
}
#endif

template <typename Arithmetic>
void round_row_to(const Weight& weight, const float* x, std::size_t row, const Rounded& into) {
    using Value = typename Arithmetic::Value;
    const std::size_t groups = weight.groups();
    for (std::size_t g = 0; g < groups; ++g) {
        const std::size_t count = g + 1 < groups ? kGroup : weight.depth - g * kGroup, at = g * into.rows + row;
        Value* to = static_cast<Value*>(into.values) + at * kGroup;
        const std::int32_t sum = round_group(x + g * kGroup, count, to, into.scales[at]);
        std::memset(to + count, 0, (kGroup - count) * sizeof(Value));
        into.zeros[at] = -Arithmetic::zero_point(weight.bits) * sum;
    }
}

// y of a tile, of all rows, from the sums over its groups.
inline void write_tile(const Weight& weight, std::size_t tile, const float (*sums)[kTile], std::size_t rows, float* y) {
    const std::size_t first = tile * kTile;
    const std::size_t count = weight.outputs - first < kTile ? weight.outputs - first : kTile;
    for (std::size_t row = 0; row < rows; ++row) {
        float* into = y + row * weight.outputs + first;
        for (std::size_t n = 0; n < count; n += kLanes) {
            const std::size_t lanes = count - n < kLanes ? count - n : kLanes;
            const Floats bias = load_some(weight.bias + first + n, lanes);
            const Floats found = activate(weight.activation, load(sums[row] + n) + bias);
            std::memcpy(into + n, &found, lanes * sizeof(float));
        }
    }
}

}  // namespace
}  // namespace blip2rt
