// The path of x86 processors with AVX-512 VNNI: vpdpbusd multiplies four unsigned weights by four signed values and adds
// them to 32 bits without saturation, for 16 outputs at a time.
//
// Up to 12 rows go together: their dots and their sums over the groups stay in registers, 4-bit weights are unpacked in
// registers, and each 64 bytes of a tile are read once for all of them. Many rows do not stay in the first cache, so six
// at a time go through two tiles.
#include <immintrin.h>

#include "attend.h"
#include "attend_quantized.h"
#include "rows.h"

namespace blip2rt {
namespace {

struct Vnni {
    using Value = std::int8_t;
    static std::int32_t zero_point(int bits) { return 1 << (bits - 1); }
};

constexpr std::size_t kRows = 12;  // 12 dots, 12 sums, two weights: 26 of the 32 registers
constexpr std::size_t kManyRows = 64;
constexpr std::size_t kWideRows = 6, kTiles = 2;  // 12 dots, 12 sums, two weights, a value: 27

inline __m512i broadcast(const std::int8_t* from) {
    std::int32_t four_values;
    std::memcpy(&four_values, from, sizeof four_values);
    return _mm512_set1_epi32(four_values);
}

// The outputs of a tile, of which the last one may have fewer than 16.
struct Outputs {
    std::size_t first;
    __mmask16 inside;
    __m512 bias;

    Outputs(const Weight& weight, std::size_t tile) : first(tile * kTile) {
        const std::size_t count = weight.outputs - first;
        inside = count < kTile ? static_cast<__mmask16>((1u << count) - 1) : static_cast<__mmask16>(0xffff);
        bias = _mm512_maskz_loadu_ps(inside, weight.bias + first);
    }
    void write(__m512 totals, float* row) const {
        _mm512_mask_storeu_ps(row + first, inside, _mm512_add_ps(totals, bias));
    }
    // Of rows that have just been written; a function of its own, so that the constants of GELU are loaded once.
    __attribute__((noinline)) void activate_rows(Activation activation, float* row, std::size_t rows, std::size_t outputs) const {
        if (activation == Activation::kNone) return;
        for (std::size_t r = 0; r < rows; ++r, row += outputs)
            _mm512_mask_storeu_ps(row + first, inside, activate(activation, _mm512_maskz_loadu_ps(inside, row + first)));
    }
};

inline __m512 scales_of(const std::uint16_t* halves) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// dots += weights * value. Written out, because GCC 12 makes a copy of `dots` for each of its intrinsic.
inline void multiply_add(__m512i& dots, __m512i weights, __m512i value) {
#ifdef BLIP2RT_EMULATE
    dots = _mm512_dpbusd_epi32(dots, weights, value);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(dots) : "v"(weights), "v"(value));
#endif
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
        for (std::size_t r = 0; r < rows; ++r) dots[r] = _mm512_set1_epi32(x.zeros[at + r]);
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
                multiply_add(dots[r], first, broadcast(values + r * kGroup + k));
            for (std::size_t r = 0; r < rows; ++r)
                multiply_add(dots[r], second, broadcast(values + r * kGroup + k + 4));
        }
        const __m512 scales = scales_of(halves);
        for (std::size_t r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[at + r]));
            totals[r] = _mm512_add_ps(totals[r], _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r]), scale));
        }
    }
    const Outputs outputs(weight, tile);
    for (std::size_t r = 0; r < rows; ++r) outputs.write(totals[r], y + (row + r) * weight.outputs);
    outputs.activate_rows(weight.activation, y + row * weight.outputs, rows, weight.outputs);
}

// The last, fewer than 12 rows.
template <int bits, std::size_t rows>
void multiply_rest(const Weight& weight, const Rounded& x, std::size_t tile, std::size_t row, float* y) {
    if (x.rows - row == rows) return multiply_rows<bits, rows>(weight, x, tile, row, y);
    if constexpr (rows > 1) multiply_rest<bits, rows - 1>(weight, x, tile, row, y);
}

// `rows` rows from `row` on, by two tiles.
template <int bits, std::size_t rows>
void multiply_wide(const Weight& weight, const Rounded& x, std::size_t tile, std::size_t row, float* y) {
    const std::size_t groups = weight.groups(), padded = weight.padded_depth(), bytes = weight.tile_bytes();
    const std::uint8_t* packed = weight.packed + tile * bytes;
    const std::uint16_t* halves = weight.scales + tile * groups * kTile;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 totals[rows][kTiles];
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t t = 0; t < kTiles; ++t) totals[r][t] = _mm512_setzero_ps();
    for (std::size_t g = 0; g < groups; ++g, halves += kTile) {
        const std::size_t depth = g + 1 < groups ? kGroup : padded - g * kGroup;
        const std::size_t at = g * x.rows + row;
        const std::int8_t* values = static_cast<const std::int8_t*>(x.values) + at * kGroup;
        __m512i dots[rows][kTiles];
        for (std::size_t r = 0; r < rows; ++r)
            for (std::size_t t = 0; t < kTiles; ++t) dots[r][t] = _mm512_set1_epi32(x.zeros[at + r]);
        for (std::size_t k = 0; k < depth; k += 4) {
            __m512i weights[kTiles];
            for (std::size_t t = 0; t < kTiles; ++t) {
                weights[t] = _mm512_loadu_si512(packed + t * bytes);
                if (bits == 4) weights[t] = _mm512_and_si512(k % 8 ? _mm512_srli_epi16(weights[t], 4) : weights[t], nibble);
            }
            if (bits == 8 || k % 8) packed += 64;
            for (std::size_t r = 0; r < rows; ++r) {
                const __m512i value = broadcast(values + r * kGroup + k);
                for (std::size_t t = 0; t < kTiles; ++t) multiply_add(dots[r][t], weights[t], value);
            }
        }
        __m512 scales[kTiles];
        for (std::size_t t = 0; t < kTiles; ++t) scales[t] = scales_of(halves + t * groups * kTile);
        for (std::size_t r = 0; r < rows; ++r) {
            const __m512 scale = _mm512_set1_ps(x.scales[at + r]);
            for (std::size_t t = 0; t < kTiles; ++t) {
                const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][t]), _mm512_mul_ps(scales[t], scale));
                totals[r][t] = _mm512_add_ps(totals[r][t], term);
            }
        }
    }
    for (std::size_t t = 0; t < kTiles; ++t) {
        const Outputs outputs(weight, tile + t);
        for (std::size_t r = 0; r < rows; ++r) outputs.write(totals[r][t], y + (row + r) * weight.outputs);
        outputs.activate_rows(weight.activation, y + row * weight.outputs, rows, weight.outputs);
    }
}

// The last, fewer than 6 rows.
template <int bits, std::size_t rows>
void multiply_wide_rest(const Weight& weight, const Rounded& x, std::size_t tile, std::size_t row, float* y) {
    if (x.rows - row == rows) return multiply_wide<bits, rows>(weight, x, tile, row, y);
    if constexpr (rows > 1) multiply_wide_rest<bits, rows - 1>(weight, x, tile, row, y);
}

template <int bits>
void multiply_bits(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    std::size_t tile = first_tile;
    for (; x.rows > kManyRows && tile + kTiles <= last_tile; tile += kTiles) {
        std::size_t row = 0;
        for (; row + kWideRows <= x.rows; row += kWideRows) multiply_wide<bits, kWideRows>(weight, x, tile, row, y);
        if (row < x.rows) multiply_wide_rest<bits, kWideRows - 1>(weight, x, tile, row, y);
    }
    for (; tile < last_tile; ++tile) {
        std::size_t row = 0;
        for (; row + kRows <= x.rows; row += kRows) multiply_rows<bits, kRows>(weight, x, tile, row, y);
        if (row < x.rows) multiply_rest<bits, kRows - 1>(weight, x, tile, row, y);
    }
}

void multiply(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    (weight.bits == 4 ? multiply_bits<4> : multiply_bits<8>)(weight, x, first_tile, last_tile, y);
}

// `rows` rows from `row` on, by one tile of bytes, or by two with the upper and lower bytes of the same numbers.
template <std::size_t rows, bool wide>
void multiply_tile_rows(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::size_t row, std::int32_t* into) {
    const std::int8_t* values = x.values + row * 4;
    __m512i dots[rows], high_dots[rows];
#pragma GCC unroll 12
    for (std::size_t r = 0; r < rows; ++r) dots[r] = high_dots[r] = _mm512_setzero_si512();
    for (std::size_t q = 0; q < x.quads; ++q, values += x.rows * 4) {
        const __m512i columns = _mm512_loadu_si512(low + q * kTile * 4);
        const __m512i high_columns = wide ? _mm512_loadu_si512(high + q * kTile * 4) : columns;
#pragma GCC unroll 12
        for (std::size_t r = 0; r < rows; ++r) {
            const __m512i value = broadcast(values + 4 * r);
            multiply_add(dots[r], columns, value);
            if (wide) multiply_add(high_dots[r], high_columns, value);
        }
    }
#pragma GCC unroll 12
    for (std::size_t r = 0; r < rows; ++r) {
        if (wide) dots[r] = _mm512_add_epi32(_mm512_slli_epi32(high_dots[r], 8), dots[r]);
        _mm512_storeu_si512(into + (row + r) * kTile, dots[r]);
    }
}

// The last, fewer than 12 rows.
template <std::size_t rows, bool wide>
void multiply_tile_rest(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::size_t row, std::int32_t* into) {
    if (x.rows - row == rows) return multiply_tile_rows<rows, wide>(low, high, x, row, into);
    if constexpr (rows > 1) multiply_tile_rest<rows - 1, wide>(low, high, x, row, into);
}

template <bool wide>
void multiply_tile_to(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::int32_t* into) {
    std::size_t row = 0;
    for (; row + kRows <= x.rows; row += kRows) multiply_tile_rows<kRows, wide>(low, high, x, row, into);
    if (row < x.rows) multiply_tile_rest<kRows - 1, wide>(low, high, x, row, into);
}

void multiply_tile(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::int32_t* into) {
    (high ? multiply_tile_to<true> : multiply_tile_to<false>)(low, high, x, into);
}

std::size_t value_bytes(int) { return sizeof(Vnni::Value); }

}  // namespace

const Path vnni_path = {"vnni",   value_bytes, round_row_to<Vnni>,
                        multiply, attend,      attend_quantized<multiply_tile>};

}  // namespace blip2rt
