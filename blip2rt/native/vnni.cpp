// The path of x86 processors with AVX-512 VNNI: vpdpbusd multiplies four unsigned weights by four signed values and adds
// them to 32 bits without saturation, for 16 outputs at a time.
//
// Up to 12 rows go together: their dots and their sums over the groups stay in registers, 4-bit weights are unpacked in
// registers, and each 64 bytes of a tile are read once for all of them.
#include <immintrin.h>

#include "attend.h"
#include "loop.h"

namespace blip2rt {
namespace {

constexpr std::size_t kRows = 12;  // 12 dots, 12 sums, two weights: 26 of the 32 registers

inline __m512i broadcast(const std::int8_t* from) {
    std::int32_t four_values;
    std::memcpy(&four_values, from, sizeof four_values);
    return _mm512_set1_epi32(four_values);
}

// `rows` rows from `row` on, by one tile.
template <int bits, std::size_t rows>
void multiply_rows(const Weight& weight, const Rounded& x, std::size_t tile, std::size_t row, float* y) {
    const std::size_t groups = weight.groups(), padded = weight.padded_depth();
    const std::uint8_t* packed = weight.packed + tile * weight.tile_bytes();
    const std::uint16_t* halves = weight.scales + tile * groups * kTile;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 totals[rows];
    for (std::size_t r = 0; r < rows; ++r) totals[r] = _mm512_setzero_ps();
    for (std::size_t g = 0; g < groups; ++g, halves += kTile) {
        const std::size_t depth = g + 1 < groups ? kGroup : padded - g * kGroup;
        const std::size_t at = g * x.rows + row;
        const std::int8_t* values = static_cast<const std::int8_t*>(x.values) + at * kGroup;
        __m512i dots[rows];
        for (std::size_t r = 0; r < rows; ++r) dots[r] = _mm512_set1_epi32(-(1 << (bits - 1)) * x.sums[at + r]);
        for (std::size_t k = 0; k < depth; k += 8) {
            __m512i first, second;
            constexpr std::size_t kAhead = 4096;  // the first rows find a tile in memory, the others in the cache
            if (row == 0) __builtin_prefetch(packed + kAhead);
            if (bits == 4) {
                const __m512i both = _mm512_loadu_si512(packed);
                first = _mm512_and_si512(both, nibble);
                second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
                packed += 64;
            } else {
                if (row == 0) __builtin_prefetch(packed + kAhead + 64);
                first = _mm512_loadu_si512(packed);
                second = _mm512_loadu_si512(packed + 64);
                packed += 128;
            }
            for (std::size_t r = 0; r < rows; ++r)
                dots[r] = _mm512_dpbusd_epi32(dots[r], first, broadcast(values + r * kGroup + k));
            for (std::size_t r = 0; r < rows; ++r)
                dots[r] = _mm512_dpbusd_epi32(dots[r], second, broadcast(values + r * kGroup + k + 4));
        }
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
        const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        for (std::size_t r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[at + r]));
            totals[r] = _mm512_add_ps(totals[r], _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r]), scale));
        }
    }
    const std::size_t first = tile * kTile, count = weight.outputs - first;
    const __mmask16 inside = count < kTile ? static_cast<__mmask16>((1u << count) - 1) : static_cast<__mmask16>(0xffff);
    const __m512 bias = _mm512_maskz_loadu_ps(inside, weight.bias + first);
    for (std::size_t r = 0; r < rows; ++r)
        _mm512_mask_storeu_ps(y + (row + r) * weight.outputs + first, inside, _mm512_add_ps(totals[r], bias));
}

// The last, fewer than 12 rows.
template <int bits, std::size_t rows>
void multiply_rest(const Weight& weight, const Rounded& x, std::size_t tile, std::size_t row, float* y) {
    if (x.rows - row == rows) return multiply_rows<bits, rows>(weight, x, tile, row, y);
    if constexpr (rows > 1) multiply_rest<bits, rows - 1>(weight, x, tile, row, y);
}

template <int bits>
void multiply_bits(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    for (std::size_t tile = first_tile; tile < last_tile; ++tile) {
        std::size_t row = 0;
        for (; row + kRows <= x.rows; row += kRows) multiply_rows<bits, kRows>(weight, x, tile, row, y);
        if (row < x.rows) multiply_rest<bits, kRows - 1>(weight, x, tile, row, y);
    }
}

void multiply(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    (weight.bits == 4 ? multiply_bits<4> : multiply_bits<8>)(weight, x, first_tile, last_tile, y);
}

std::size_t value_bytes(int) { return sizeof(std::int8_t); }

}  // namespace

const Path vnni_path = {"vnni", value_bytes, round_row_to<std::int8_t>, multiply, attend};

}  // namespace blip2rt
