// The path of x86 processors with AVX2.
//
// 4 bits: vpmaddubsw multiplies unsigned weights (0..15) by signed values (-127..127) and adds neighbours in 16 bits;
// eight of them, 8 * 2 * 15 * 127 = 30480, fit before they have to be widened. 8 bits would not fit once, so there both
// sides are 16 bits wide and vpmaddwd adds in 32.
//
// 64 bytes of a tile unpack to two times as many: its low nibbles and its high ones, or its even bytes and its odd ones
// in 16 bits; the values are stored in that order. Few rows do so in registers, many rows once for all of them.
#include <immintrin.h>

#include <type_traits>

#include "attend.h"
#include "attend_quantized.h"
#include "rows.h"

namespace blip2rt {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
inline __m256i broadcast(const void* from) {
    std::int32_t four_bytes;
    std::memcpy(&four_bytes, from, sizeof four_bytes);
    return _mm256_set1_epi32(four_bytes);
}

template <int bits>
struct Avx2 {
    using Value = std::conditional_t<bits == 4, std::int8_t, std::int16_t>;
    static std::int32_t zero_point(int) { return 1 << (bits - 1); }
};

constexpr std::size_t kRows = 6;  // of 16 outputs: 12 sums, two weights, a value and a product are all 16 registers
constexpr std::size_t kManyRows = 64;
constexpr std::size_t kTilesAtOnce = 4;  // by many rows, whose values of a group stay in the cache

// As instructions: GCC otherwise fetches the values of all rows first and has no registers left for the sums, copies
// every sum once, or keeps the ones in a register.
inline void add16(__m256i& sum, __m256i x) { __asm__ volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add32(__m256i& sum, __m256i x) { __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline __m256i widen(__m256i x) {
    alignas(32) static constexpr std::int16_t kOnes[] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    __asm__ volatile("vpmaddwd %1, %0, %0" : "+x"(x) : "m"(kOnes));
    return x;
}

// The first or the second half of what 32 bytes unpack to.
template <int bits>
inline __m256i unpack(const std::uint8_t* packed, bool second) {
    const __m256i both = load(packed);
    if (bits == 8) return second ? _mm256_srli_epi16(both, 8) : _mm256_and_si256(both, _mm256_set1_epi16(255));
    return _mm256_and_si256(second ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
}

// A group of a tile: packed, or unpacked.
struct Group {
    const std::uint8_t* weights;
    std::size_t bytes;  // packed
    const std::uint16_t* scales;

    Group(const Weight& weight, std::size_t tile, std::size_t g) {
        const std::size_t groups = weight.groups(), all = weight.tile_bytes();
        const std::size_t whole = kGroup * kTile * static_cast<std::size_t>(weight.bits) / 8;
        weights = weight.packed + tile * all + g * whole;
        bytes = g + 1 < groups ? whole : all - g * whole;
        scales = weight.scales + (tile * groups + g) * kTile;
    }
};

// sums += float(dot + zero) * (scale_w * scale_x), of `rows` rows from `row` on.
template <int bits, std::size_t rows, bool is_packed>
inline void add_group(const Group& group, const Rounded& x, std::size_t g, std::size_t row, float (*sums)[kTile]) {
    constexpr std::size_t kValues = 16 / bits;                      // four bytes
    constexpr std::size_t kBytesOfSum = bits == 4 ? 4 * 64 : 4096;  // packed; all of them in 32 bits
    const std::size_t at = g * x.rows + row, bytes = group.bytes;
    const auto* values = static_cast<const typename Avx2<bits>::Value*>(x.values) + at * kGroup;
    const std::uint8_t* weights = group.weights;
    const std::uint16_t* halves = group.scales;
    const float* row_scales = x.scales + at;
    const std::int32_t* zeros = x.zeros + at;
    sums += row;
    alignas(32) std::int32_t dots[rows][kTile];
    std::size_t start = 0;
    do {
        const std::size_t end = start + kBytesOfSum < bytes ? start + kBytesOfSum : bytes;
        __m256i parts[rows][2];
#pragma GCC unroll 6
        for (std::size_t r = 0; r < rows; ++r) parts[r][0] = parts[r][1] = _mm256_setzero_si256();
        const auto add_products = [&](__m256i low, __m256i high, const auto* four_bytes) {
#pragma GCC unroll 6
            for (std::size_t r = 0; r < rows; ++r) {
                const __m256i value = broadcast(four_bytes + r * kGroup);
                if (bits == 4) {
                    add16(parts[r][0], _mm256_maddubs_epi16(low, value));
                    add16(parts[r][1], _mm256_maddubs_epi16(high, value));
                } else {
                    add32(parts[r][0], _mm256_madd_epi16(low, value));
                    add32(parts[r][1], _mm256_madd_epi16(high, value));
                }
            }
        };
        if (is_packed) {
            for (std::size_t i = start; i < end; i += 64, weights += 64, values += 2 * kValues) {
                __builtin_prefetch(weights + 4096);
                add_products(unpack<bits>(weights, false), unpack<bits>(weights + 32, false), values);
                add_products(unpack<bits>(weights, true), unpack<bits>(weights + 32, true), values + kValues);
            }
        } else {
            for (std::size_t i = 2 * start; i < 2 * end; i += 64, weights += 64, values += kValues)
                add_products(load(weights), load(weights + 32), values);
        }
#pragma GCC unroll 6
        for (std::size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (std::size_t half = 0; half < 2; ++half) {
                std::int32_t* dot = dots[r] + 8 * half;
                const __m256i part = bits == 4 ? widen(parts[r][half]) : parts[r][half];
                store(dot, start ? _mm256_add_epi32(part, load(dot)) : part);
            }
        }
    } while ((start += kBytesOfSum) < bytes);
#pragma GCC unroll 2
    for (std::size_t half = 0; half < kTile; half += 8) {
        const __m256i bfloats = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + half)));
        const __m256 scales = _mm256_castsi256_ps(_mm256_slli_epi32(bfloats, 16));
#pragma GCC unroll 6
        for (std::size_t r = 0; r < rows; ++r) {
            const __m256i dot = _mm256_add_epi32(load(dots[r] + half), _mm256_set1_epi32(zeros[r]));
            const __m256 scale = _mm256_mul_ps(scales, _mm256_set1_ps(row_scales[r]));
            float* sum = sums[r] + half;
            _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale)));
        }
    }
}

// All groups of a tile, as they are packed, by all rows from `row` on.
template <int bits, std::size_t rows = kRows>
void add_tile(const Weight& weight, std::size_t tile, const Rounded& x, std::size_t row, float (*sums)[kTile]) {
    for (; row + rows <= x.rows; row += rows)
        for (std::size_t g = 0; g < weight.groups(); ++g)
            add_group<bits, rows, true>(Group(weight, tile, g), x, g, row, sums);
    if constexpr (rows > 1) {
        if (row < x.rows) add_tile<bits, rows - 1>(weight, tile, x, row, sums);
    }
}

// A group of a tile, unpacked, by all rows from `row` on.
template <int bits, std::size_t rows = kRows>
void add_unpacked(const Group& group, const Rounded& x, std::size_t g, std::size_t row, float (*sums)[kTile]) {
    for (; row + rows <= x.rows; row += rows) add_group<bits, rows, false>(group, x, g, row, sums);
    if constexpr (rows > 1) {
        if (row < x.rows) add_unpacked<bits, rows - 1>(group, x, g, row, sums);
    }
}

template <int bits>
void multiply_bits(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    alignas(64) static thread_local float sums[kTilesAtOnce][kRowsAtOnce][kTile];
    alignas(64) std::uint8_t unpacked[2 * kGroup * kTile * bits / 8];
    for (std::size_t from = first_tile; from < last_tile; from += kTilesAtOnce) {
        const std::size_t to = from + kTilesAtOnce < last_tile ? from + kTilesAtOnce : last_tile;
        for (std::size_t tile = from; tile < to; ++tile) std::memset(sums[tile - from], 0, x.rows * sizeof sums[0][0]);
        if (x.rows > kManyRows) {
            for (std::size_t g = 0; g < weight.groups(); ++g) {
                for (std::size_t tile = from; tile < to; ++tile) {
                    Group group(weight, tile, g);
                    std::uint8_t* into = unpacked;
                    for (std::size_t i = 0; i < group.bytes; i += 64)
                        for (bool second : {false, true})
                            for (std::size_t half = 0; half < 64; half += 32, into += 32)
                                store(into, unpack<bits>(group.weights + i + half, second));
                    group.weights = unpacked;
                    add_unpacked<bits>(group, x, g, 0, sums[tile - from]);
                }
            }
        } else {
            for (std::size_t tile = from; tile < to; ++tile) add_tile<bits>(weight, tile, x, 0, sums[tile - from]);
        }
        for (std::size_t tile = from; tile < to; ++tile) write_tile(weight, tile, sums[tile - from], x.rows, y);
    }
}

// `rows` rows from `row` on, by columns of 16 bits: vpmaddwd leaves two sums for each of the 16.
template <std::size_t rows>
void multiply_tile_rows(const std::int16_t* columns, const Quads& x, std::size_t row, std::int32_t* into) {
    const std::int8_t* values = x.values + row * 4;
    __m256i sums[rows][4];
#pragma GCC unroll 3
    for (std::size_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (__m256i& sum : sums[r]) sum = _mm256_setzero_si256();
    for (std::size_t q = 0; q < x.quads; ++q, values += x.rows * 4, columns += kTile * 4) {
        __m256i value[rows];
#pragma GCC unroll 3
        for (std::size_t r = 0; r < rows; ++r) {
            std::int32_t four_values;
            std::memcpy(&four_values, values + 4 * r, sizeof four_values);
            value[r] = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four_values)));
        }
#pragma GCC unroll 4
        for (std::size_t i = 0; i < 4; ++i) {
            const __m256i four_columns = load(columns + i * kTile);
#pragma GCC unroll 3
            for (std::size_t r = 0; r < rows; ++r) add32(sums[r][i], _mm256_madd_epi16(four_columns, value[r]));
        }
    }
#pragma GCC unroll 3
    for (std::size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (std::size_t half = 0; half < 2; ++half) {
            const __m256i mixed = _mm256_hadd_epi32(sums[r][2 * half], sums[r][2 * half + 1]);
            store(into + (row + r) * kTile + 8 * half, _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0)));
        }
    }
}

void multiply_tile(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::int32_t* into) {
    static thread_local Buffer<std::int16_t> buffer;
    const std::size_t count = x.quads * kTile * 4;
    buffer.reserve(count);
    std::int16_t* columns = &buffer[0];
    for (std::size_t i = 0; i < count; ++i) columns[i] = static_cast<std::int16_t>(high ? high[i] << 8 | low[i] : low[i]);
    constexpr std::size_t kRowsOfColumns = 3;  // 12 sums, 3 values, a column
    std::size_t row = 0;
    for (; row + kRowsOfColumns <= x.rows; row += kRowsOfColumns) multiply_tile_rows<kRowsOfColumns>(columns, x, row, into);
    for (; row < x.rows; ++row) multiply_tile_rows<1>(columns, x, row, into);
}

std::size_t value_bytes(int bits) { return bits == 4 ? sizeof(Avx2<4>::Value) : sizeof(Avx2<8>::Value); }

void round_row(const Weight& weight, const float* x, std::size_t row, const Rounded& into) {
    if (weight.bits == 4) return round_row_to<Avx2<4>>(weight, x, row, into);
    round_row_to<Avx2<8>>(weight, x, row, into);
    for (std::size_t g = 0; g < weight.groups(); ++g) {
        auto* values = static_cast<Avx2<8>::Value*>(into.values) + (g * into.rows + row) * kGroup;
        for (std::size_t k = 0; k < kGroup; k += 16) {
            constexpr int kEvenBeforeOdd = _MM_SHUFFLE(3, 1, 2, 0);  // of every four
            const __m256i mixed = _mm256_shufflehi_epi16(load(values + k), kEvenBeforeOdd);
            store(values + k, _mm256_shufflelo_epi16(mixed, kEvenBeforeOdd));
        }
    }
}

void multiply(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    (weight.bits == 4 ? multiply_bits<4> : multiply_bits<8>)(weight, x, first_tile, last_tile, y);
}

}  // namespace

const Path avx2_path = {"avx2", value_bytes, round_row, multiply, attend, attend_quantized<multiply_tile>};

}  // namespace blip2rt
