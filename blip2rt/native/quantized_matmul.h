// y [M, N] = activation(x [M, K] . W^T + bias), with W in 4 or 8 bits and x rounded to 8 bits on the way in.
//
// Both have a scale for every group of 128 along K: one outlier spoils a group, not a row. The arithmetic is fixed, so
// that every path gives the same bits, those of `twin.py`:
//   x:    largest = max |x| of the group; scale_x = largest / 127; q = round_half_even(x * (127 / largest))
//   dot:  exact in int32
//   sum:  acc = acc + float(dot) * (scale_w * scale_x), group after group, every operation rounded by itself
//   y:    activation(acc + bias)    (`activation.h`)
// A group of zeros (largest < 1e-30) counts as zero; one with an infinity or NaN makes its row NaN.
//
// W lies in tiles of 16 outputs, k after k, 64 bytes at a time, unsigned: 8 is the zero of 4 bits, 128 that of 8 bits.
//   8 bits: [N/16][K/4][16 outputs][4 k]
//   4 bits: [N/16][K/8][16 outputs][4 k], low nibbles the first four k, high nibbles the next four
// K is padded with zeros to a multiple of 8 and N to one of 16. scale_w: [N/16][K/128][16], bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace blip2rt {

constexpr std::size_t kGroup = 128;
constexpr std::size_t kTile = 16;
constexpr std::size_t kRowsAtOnce = 272;  // rows for which a tile is read once: a picture has 257 in ViT-g

enum class Activation : int { kNone, kRelu, kGelu };

struct Weight {
    const std::uint8_t* packed;
    const std::uint16_t* scales;
    const float* bias;
    std::size_t outputs;  // N
    std::size_t depth;    // K
    int bits;
    Activation activation;  // of what comes out

    std::size_t groups() const { return (depth + kGroup - 1) / kGroup; }
    std::size_t tiles() const { return (outputs + kTile - 1) / kTile; }
    std::size_t padded_depth() const { return (depth + 7) / 8 * 8; }
    std::size_t tile_bytes() const { return padded_depth() * kTile * static_cast<std::size_t>(bits) / 8; }
};

// Rows of x after rounding, group by group: values [G][rows][128], scales and zeros [G][rows]. A value takes
// `Path::value_bytes` bytes; a zero is what takes the zero point of the weights out of a dot.
struct Rounded {
    void* values;
    float* scales;
    std::int32_t* zeros;
    std::size_t rows;
};

}  // namespace blip2rt
