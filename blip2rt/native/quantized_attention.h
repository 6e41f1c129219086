// Attention of all rows of an image to all of them, in 8 bits, without a mask: what the image encoder does.
//
// The rows come as one linear layer gives them, queries, keys and values beside each other, and the heads go out joined.
// Rounding to 8 bits is that of `quantized_matmul.h`, the arithmetic fixed, so that every path gives the same bits, those
// of `twin.py`:
//   keys:    less their mean over the rows, which changes no softmax and is where their outliers are; a scale for every row
//   queries: a scale for every row
//   values:  a scale for every channel of a head
//   score:   float(dot) * (scale_k * (scale_q * scale)), the dot exact in int32
//   weight:  p = round_half_even(e^(score - largest) * 32767), 15 bits, so that many small ones beside a large one count
//   sum:     of p times the values exact in int32 over 512 rows, then float after float; of all p exact
//   joined:  sum * (scale_v * (1 / float(total)))
// A head with a number that is none, or with scores that could overflow, gives NaN in all its rows.
#pragma once

#include <cstddef>

namespace blip2rt {

constexpr std::size_t kMostRows = 32768;  // more could overflow the sum of all p
constexpr std::size_t kRowsOfSum = 512;   // more could overflow that of p times the values
constexpr float kMostWeight = 32767.0f;

struct QuantizedAttention {
    const float* qkv;   // [B, T, 3, H, d]
    float* joined;      // [B, T, H, d]
    std::size_t rows;   // T
    std::size_t heads;  // H
    std::size_t width;  // d
    float scale;        // of the scores
};

}  // namespace blip2rt
