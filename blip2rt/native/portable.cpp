// The path of processors without instructions of their own: plain C++, which compilers vectorise as they can.
#include "attend.h"
#include "attend_quantized.h"
#include "rows.h"

namespace blip2rt {
namespace {

inline float from_bfloat16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

struct Portable {
    using Value = std::int8_t;
    static std::int32_t zero_point(int bits) { return 1 << (bits - 1); }
};

// [k/4][16 outputs][4 k], one unsigned byte each
void unpack(const std::uint8_t* packed, int bits, std::size_t depth, std::uint8_t* unpacked) {
    if (bits == 8) {
        std::memcpy(unpacked, packed, depth * kTile);
        return;
    }
    for (std::size_t k = 0; k < depth; k += 8, packed += 64, unpacked += 128) {
        for (std::size_t i = 0; i < 64; ++i) unpacked[i] = packed[i] & 15u;
        for (std::size_t i = 0; i < 64; ++i) unpacked[64 + i] = static_cast<std::uint8_t>(packed[i] >> 4);
    }
}

void multiply(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y) {
    static thread_local float sums[kRowsAtOnce][kTile];
    const std::size_t groups = weight.groups(), padded = weight.padded_depth();
    for (std::size_t tile = first_tile; tile < last_tile; ++tile) {
        const std::uint8_t* packed = weight.packed + tile * weight.tile_bytes();
        std::memset(sums, 0, x.rows * sizeof sums[0]);
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t depth = g + 1 < groups ? kGroup : padded - g * kGroup;
            std::uint8_t weights[kGroup * kTile];
            unpack(packed, weight.bits, depth, weights);
            packed += depth * kTile * static_cast<std::size_t>(weight.bits) / 8;
            float scales[kTile];
            for (std::size_t n = 0; n < kTile; ++n) scales[n] = from_bfloat16(weight.scales[(tile * groups + g) * kTile + n]);
            for (std::size_t row = 0; row < x.rows; ++row) {
                const std::size_t at = g * x.rows + row;
                const std::int8_t* values = static_cast<const std::int8_t*>(x.values) + at * kGroup;
                std::int32_t dots[kTile] = {};
                for (std::size_t k = 0; k < depth; k += 4, values += 4) {
                    const std::uint8_t* w = weights + k * kTile;
                    for (std::size_t n = 0; n < kTile; ++n, w += 4)
                        dots[n] += w[0] * values[0] + w[1] * values[1] + w[2] * values[2] + w[3] * values[3];
                }
                const float scale = x.scales[at];
                const std::int32_t zero = x.zeros[at];
                for (std::size_t n = 0; n < kTile; ++n)
                    sums[row][n] = sums[row][n] + static_cast<float>(dots[n] + zero) * (scales[n] * scale);
            }
        }
        write_tile(weight, tile, sums, x.rows, y);
    }
}

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

const Path portable_path = {"portable", value_bytes, round_row_to<Portable>, multiply, attend, attend_quantized<multiply_tile>};

}  // namespace blip2rt
