// The path of x86 processors with AVX-512 VNNI: vpdpbusd multiplies four unsigned weights by four signed values and adds
// them to 32 bits without saturation, for 16 outputs at a time.
#include <immintrin.h>

#include "loop.h"

namespace blip2rt {
namespace {

template <std::size_t rows>
void dot_rows(const std::uint8_t* weights, const std::int8_t* x, std::size_t depth, std::int32_t dots[][kTile]) {
    __m512i sums[rows];
    for (std::size_t r = 0; r < rows; ++r) sums[r] = _mm512_setzero_si512();
    for (std::size_t k = 0; k < depth; k += 4) {
        const __m512i weight = _mm512_loadu_si512(weights + k * kTile);
        for (std::size_t r = 0; r < rows; ++r) {
            std::int32_t four_values;
            std::memcpy(&four_values, x + r * kGroup + k, sizeof four_values);
            sums[r] = _mm512_dpbusd_epi32(sums[r], weight, _mm512_set1_epi32(four_values));
        }
    }
    for (std::size_t r = 0; r < rows; ++r) _mm512_storeu_si512(dots[r], sums[r]);
}

struct Vnni {
    using Value = std::int8_t;
    static constexpr std::size_t kRows = 12;

    // [k/4][16 outputs][4 k], one unsigned byte each
    static void unpack(const std::uint8_t* packed, int bits, std::size_t depth, std::uint8_t* unpacked) {
        if (bits == 8) {
            for (std::size_t k = 0; k < depth; k += 4, packed += 64, unpacked += 64) {
                __builtin_prefetch(packed + 4096);
                _mm512_storeu_si512(unpacked, _mm512_loadu_si512(packed));
            }
            return;
        }
        const __m512i nibble = _mm512_set1_epi8(15);
        for (std::size_t k = 0; k < depth; k += 8, packed += 64, unpacked += 128) {
            __builtin_prefetch(packed + 4096);
            const __m512i both = _mm512_loadu_si512(packed);
            _mm512_storeu_si512(unpacked, _mm512_and_si512(both, nibble));
            _mm512_storeu_si512(unpacked + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
        }
    }

    static std::int32_t zero_point(int bits) { return 1 << (bits - 1); }

    static void dot(const std::uint8_t* weights, const Value* x, std::size_t rows, std::size_t depth, int,
                    std::int32_t dots[][kTile]) {
        while (rows >= 4) {
            const std::size_t done = rows >= 12 ? 12 : rows >= 8 ? 8 : 4;
            (done == 12 ? dot_rows<12> : done == 8 ? dot_rows<8> : dot_rows<4>)(weights, x, depth, dots);
            rows -= done, x += done * kGroup, dots += done;
        }
        if (rows) (rows == 3 ? dot_rows<3> : rows == 2 ? dot_rows<2> : dot_rows<1>)(weights, x, depth, dots);
    }
};

std::size_t value_bytes(int) { return sizeof(Vnni::Value); }

}  // namespace

const Path vnni_path = {"vnni", value_bytes, round_row_to<Vnni::Value>, multiply_tiles<Vnni>};

}  // namespace blip2rt
