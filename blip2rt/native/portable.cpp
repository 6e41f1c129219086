// The path of processors without instructions of their own: plain C++, which compilers vectorise as they can.
#include "attend.h"
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

}  // namespace

const Path portable_path = {"portable", value_bytes, round_row_to<Portable>, multiply_tiles<Portable>, attend};

}  // namespace blip2rt
