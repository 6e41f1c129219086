// The path of x86 processors with AVX2.
//
// 4 bits: vpmaddubsw multiplies unsigned weights (0..15) by signed values (-127..127) and adds neighbours in 16 bits;
// eight of them, 8 * 2 * 15 * 127 = 30480, fit before they have to be widened. 8 bits would not fit once, so there both
// sides are 16 bits wide and vpmaddwd adds in 32.
#include <immintrin.h>

#include "attend.h"
#include "attend_quantized.h"
#include "loop.h"

namespace blip2rt {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
inline __m256i broadcast(const void* from) {
    std::int32_t four_bytes;
    std::memcpy(&four_bytes, from, sizeof four_bytes);
    return _mm256_set1_epi32(four_bytes);
}

// Six rows of 16 outputs: 12 sums, two weights, one value, one constant are all 16 registers.
constexpr std::size_t kRowsOfRegisters = 6;

// sum += x. As instructions, because GCC otherwise fetches the values of all rows first and has no registers left for
// the sums, or copies every sum once.
inline void add16(__m256i& sum, __m256i x) { asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add32(__m256i& sum, __m256i x) { asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

template <std::size_t rows>
void dot4(const std::uint8_t* weights, const std::int8_t* x, std::size_t depth, std::int32_t dots[][kTile]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (std::size_t start = 0; start < depth; start += 32) {
        const std::size_t end = start + 32 < depth ? start + 32 : depth;
        __m256i sums[rows][2];
        for (std::size_t r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
        for (std::size_t k = start; k < end; k += 4) {
            const __m256i low = load(weights + k * kTile), high = load(weights + k * kTile + 32);
            for (std::size_t r = 0; r < rows; ++r) {
                const __m256i value = broadcast(x + r * kGroup + k);
                add16(sums[r][0], _mm256_maddubs_epi16(low, value));
                add16(sums[r][1], _mm256_maddubs_epi16(high, value));
            }
        }
        for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t half = 0; half < 2; ++half) {
                __m256i wide = _mm256_madd_epi16(sums[r][half], ones);
                if (start) wide = _mm256_add_epi32(wide, load(dots[r] + 8 * half));
                store(dots[r] + 8 * half, wide);
            }
        }
    }
}

template <std::size_t rows>
void dot8(const std::uint8_t* weights, const std::int16_t* x, std::size_t depth, std::int32_t dots[][kTile]) {
    __m256i sums[rows][2];
    for (std::size_t r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (std::size_t k = 0; k < depth; k += 2) {
        const __m256i low = load(weights + 2 * k * kTile), high = load(weights + 2 * k * kTile + 32);
        for (std::size_t r = 0; r < rows; ++r) {
            const __m256i value = broadcast(x + r * kGroup + k);
            add32(sums[r][0], _mm256_madd_epi16(low, value));
            add32(sums[r][1], _mm256_madd_epi16(high, value));
        }
    }
    for (std::size_t r = 0; r < rows; ++r) {
        store(dots[r], sums[r][0]);
        store(dots[r] + 8, sums[r][1]);
    }
}

struct FourBits {
    using Value = std::int8_t;
    static constexpr std::size_t kRows = kRowsOfRegisters;

    // [k/4][16 outputs][4 k], one unsigned byte each
    static void unpack(const std::uint8_t* packed, int, std::size_t depth, std::uint8_t* unpacked) {
        const __m256i nibble = _mm256_set1_epi8(15);
        for (std::size_t k = 0; k < depth; k += 8, packed += 64, unpacked += 128) {
            __builtin_prefetch(packed + 4096);
            const __m256i low = load(packed), high = load(packed + 32);
            store(unpacked, _mm256_and_si256(low, nibble));
            store(unpacked + 32, _mm256_and_si256(high, nibble));
            store(unpacked + 64, _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble));
            store(unpacked + 96, _mm256_and_si256(_mm256_srli_epi16(high, 4), nibble));
        }
    }

    static std::int32_t zero_point(int) { return 8; }

    static void dot(const std::uint8_t* weights, const Value* x, std::size_t rows, std::size_t depth, int,
                    std::int32_t dots[][kTile]) {
        switch (rows) {
            case 1: return dot4<1>(weights, x, depth, dots);
            case 2: return dot4<2>(weights, x, depth, dots);
            case 3: return dot4<3>(weights, x, depth, dots);
            case 4: return dot4<4>(weights, x, depth, dots);
            case 5: return dot4<5>(weights, x, depth, dots);
            default: return dot4<6>(weights, x, depth, dots);
        }
    }
};

struct EightBits {
    using Value = std::int16_t;
    static constexpr std::size_t kRows = kRowsOfRegisters;

    // [k/2][16 outputs][2 k], 16 signed bits each, the zero point taken away
    static void unpack(const std::uint8_t* packed, int, std::size_t depth, std::uint8_t* unpacked) {
        const __m256i zero = _mm256_set1_epi16(128);
        const __m256i first = _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1,  //
                                               0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
        const __m256i second = _mm256_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1,  //
                                                2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1);
        for (std::size_t k = 0; k < depth; k += 4, packed += 64, unpacked += 128) {
            __builtin_prefetch(packed + 4096);
            const __m256i low = load(packed), high = load(packed + 32);
            store(unpacked, _mm256_sub_epi16(_mm256_shuffle_epi8(low, first), zero));
            store(unpacked + 32, _mm256_sub_epi16(_mm256_shuffle_epi8(high, first), zero));
            store(unpacked + 64, _mm256_sub_epi16(_mm256_shuffle_epi8(low, second), zero));
            store(unpacked + 96, _mm256_sub_epi16(_mm256_shuffle_epi8(high, second), zero));
        }
    }

    static std::int32_t zero_point(int) { return 0; }

    static void dot(const std::uint8_t* weights, const Value* x, std::size_t rows, std::size_t depth, int,
                    std::int32_t dots[][kTile]) {
        switch (rows) {
            case 1: return dot8<1>(weights, x, depth, dots);
            case 2: return dot8<2>(weights, x, depth, dots);
            case 3: return dot8<3>(weights, x, depth, dots);
            case 4: return dot8<4>(weights, x, depth, dots);
            case 5: return dot8<5>(weights, x, depth, dots);
            default: return dot8<6>(weights, x, depth, dots);
        }
    }
};

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

std::size_t value_bytes(int bits) { return bits == 4 ? sizeof(FourBits::Value) : sizeof(EightBits::Value); }

void round_row(const Weight& weight, const float* x, std::size_t row, const Rounded& into) {
    (weight.bits == 4 ? round_row_to<FourBits> : round_row_to<EightBits>)(weight, x, row, into);
}

void multiply(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    (weight.bits == 4 ? multiply_tiles<FourBits> : multiply_tiles<EightBits>)(weight, x, first_tile, last_tile, y);
}

}  // namespace

const Path avx2_path = {"avx2", value_bytes, round_row, multiply, attend, attend_quantized<multiply_tile>};

}  // namespace blip2rt
