// What all paths share: rounding rows, and the walk over tiles, groups and rows. Every path compiles it for its own
// instructions, so everything here is in an unnamed namespace.
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

inline float from_bfloat16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

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

// Rows that share weights go together; few rows read tile after tile, many rows keep a panel of x in the cache while
// eight tiles use it. The order of the groups, and so the result, is the same.
template <typename Arithmetic>
void multiply_tiles(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    using Value = typename Arithmetic::Value;
    constexpr std::size_t kTilesAtOnce = 8;
    alignas(64) static thread_local float sums[kTilesAtOnce][kRowsAtOnce][kTile];
    alignas(64) std::uint8_t unpacked[kGroup * kTile * sizeof(Value)];
    alignas(64) std::int32_t dots[Arithmetic::kRows][kTile];
    alignas(64) float scales[kTile];
    const std::size_t groups = weight.groups(), padded = weight.padded_depth();
    const std::size_t at_once = x.rows > kTile ? kTilesAtOnce : 1;
    for (std::size_t from = first_tile; from < last_tile; from += at_once) {
        const std::size_t to = from + at_once < last_tile ? from + at_once : last_tile;
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t depth = g + 1 < groups ? kGroup : padded - g * kGroup;
            const Value* values = static_cast<const Value*>(x.values) + g * x.rows * kGroup;
            for (std::size_t tile = from; tile < to; ++tile) {
                const std::size_t offset = g * kGroup * kTile * static_cast<std::size_t>(weight.bits) / 8;
                const std::uint8_t* packed = weight.packed + tile * weight.tile_bytes() + offset;
                const std::uint16_t* halves = weight.scales + (tile * groups + g) * kTile;
                for (std::size_t n = 0; n < kTile; ++n) scales[n] = from_bfloat16(halves[n]);
                Arithmetic::unpack(packed, weight.bits, depth, unpacked);
                for (std::size_t row = 0; row < x.rows; row += Arithmetic::kRows) {
                    const std::size_t rows = x.rows - row < Arithmetic::kRows ? x.rows - row : Arithmetic::kRows;
                    Arithmetic::dot(unpacked, values + row * kGroup, rows, depth, weight.bits, dots);
                    for (std::size_t r = 0; r < rows; ++r) {
                        const std::size_t i = g * x.rows + row + r;
                        const float scale = x.scales[i];
                        const std::int32_t zero = x.zeros[i];
                        float* sum = sums[tile - from][row + r];
                        if (g == 0) std::memset(sum, 0, kTile * sizeof(float));
                        for (std::size_t n = 0; n < kTile; ++n)
                            sum[n] = sum[n] + static_cast<float>(dots[r][n] + zero) * (scales[n] * scale);
                    }
                }
            }
        }
        for (std::size_t tile = from; tile < to; ++tile) {
            const std::size_t first = tile * kTile;
            const std::size_t count = weight.outputs - first < kTile ? weight.outputs - first : kTile;
            for (std::size_t row = 0; row < x.rows; ++row) {
                float* into = y + row * weight.outputs + first;
                for (std::size_t n = 0; n < count; n += kLanes) {
                    const std::size_t lanes = count - n < kLanes ? count - n : kLanes;
                    const Floats bias = load_some(weight.bias + first + n, lanes);
                    const Floats found = activate(weight.activation, load(sums[tile - from][row] + n) + bias);
                    std::memcpy(into + n, &found, lanes * sizeof(float));
                }
            }
        }
    }
}

}  // namespace
}  // namespace blip2rt
