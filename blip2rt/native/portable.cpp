// The path of processors without instructions of their own: plain C++, which compilers vectorise as they can.
#include "attend.h"
#include "attend_quantized.h"
#include "loop.h"

namespace blip2rt {
namespace {

struct Portable {
    using Value = std::int8_t;
    static constexpr std::size_t kRows = 4;

    // [k/4][16 outputs][4 k], one unsigned byte each
    static void unpack(const std::uint8_t* packed, int bits, std::size_t depth, std::uint8_t* unpacked) {
        if (bits == 8) {
            std::memcpy(unpacked, packed, depth * kTile);
            return;
        }
        for (std::size_t k = 0; k < depth; k += 8, packed += 64, unpacked += 128) {
            for (std::size_t i = 0; i < 64; ++i) unpacked[i] = packed[i] & 15u;
            for (std::size_t i = 0; i < 64; ++i) unpacked[64 + i] = static_cast<std::uint8_t>(packed[i] >> 4);
        }
    }

    static std::int32_t zero_point(int bits) { return 1 << (bits - 1); }

    static void dot(const std::uint8_t* weights, const Value* x, std::size_t rows, std::size_t depth, int,
                    std::int32_t dots[][kTile]) {
        for (std::size_t r = 0; r < rows; ++r) {
            std::int32_t* sum = dots[r];
            for (std::size_t n = 0; n < kTile; ++n) sum[n] = 0;
            for (std::size_t k = 0; k < depth; k += 4) {
                const Value* a = x + r * kGroup + k;
                const std::uint8_t* w = weights + k * kTile;
                for (std::size_t n = 0; n < kTile; ++n)
                    sum[n] += w[4 * n] * a[0] + w[4 * n + 1] * a[1] + w[4 * n + 2] * a[2] + w[4 * n + 3] * a[3];
            }
        }
    }
};

std::size_t value_bytes(int) { return sizeof(Portable::Value); }

// In floats, which every processor multiplies several at a time, and which hold the integers exactly: 512 products of a
// byte and a signed one are less than 2^24.
void add_dots(const float* columns, const Quads& x, std::size_t first, std::size_t last, std::int32_t factor, std::int32_t* dots) {
    for (std::size_t r = 0; r < x.rows; ++r, dots += kTile) {
        PartFloats sums[kParts] = {};
        const float* four_columns = columns + first * kTile * 4;
        for (std::size_t q = first; q < last; ++q) {
            const std::int8_t* values = x.values + (q * x.rows + r) * 4;
            for (std::size_t i = 0; i < 4; ++i, four_columns += kTile) {
                const float value = values[i];
                for (std::size_t part = 0; part < kParts; ++part)
                    sums[part] = sums[part] + load_part(four_columns + part * kPart) * value;
            }
        }
        for (std::size_t n = 0; n < kTile; ++n) dots[n] += static_cast<std::int32_t>(sums[n / kPart][n % kPart]) * factor;
    }
}

void multiply_tile(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::int32_t* dots) {
    constexpr std::size_t kExact = 128;
    static thread_local Buffer<float> columns;  // [quads][4][16]
    columns.reserve(x.quads * kTile * 4);
    std::memset(dots, 0, x.rows * kTile * sizeof *dots);
    for (const std::uint8_t* bytes : {low, high}) {
        if (!bytes) continue;
        for (std::size_t q = 0; q < x.quads; ++q)
            for (std::size_t n = 0; n < kTile; ++n)
                for (std::size_t i = 0; i < 4; ++i) columns[(q * 4 + i) * kTile + n] = bytes[(q * kTile + n) * 4 + i];
        for (std::size_t q = 0; q < x.quads; q += kExact)
            add_dots(&columns[0], x, q, x.quads - q < kExact ? x.quads : q + kExact, bytes == high ? 256 : 1, dots);
    }
}

}  // namespace

const Path portable_path = {"portable", value_bytes, round_row_to<Portable>, multiply_tiles<Portable>,
                            attend,     attend_quantized<multiply_tile>};

}  // namespace blip2rt
