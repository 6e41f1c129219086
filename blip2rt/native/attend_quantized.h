// One head of one image in 8 bits. Every path compiles it for its own instructions, with its own product of bytes, so
// everything here is in an unnamed namespace.
#pragma once

#include <initializer_list>
#include <limits>

#include "buffer.h"
#include "exponential.h"
#include "rows.h"

namespace blip2rt {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kPart = 16;
#elif defined(__AVX__)
constexpr std::size_t kPart = 8;
#else
constexpr std::size_t kPart = 4;
#endif
constexpr float kMost = 1e37f;  // a bound of scores or values beyond it, or none, makes a head NaN
constexpr std::size_t kParts = kTile / kPart;  // vectors of 16 numbers, one for each of 16 queries
typedef float PartFloats __attribute__((vector_size(4 * kPart)));
typedef std::int32_t PartIntegers __attribute__((vector_size(4 * kPart)));

inline PartFloats load_part(const float* from) {
    PartFloats floats;
    std::memcpy(&floats, from, sizeof floats);
    return floats;
}

// Rows of signed bytes, [quads][rows][4].
struct Quads {
    const std::int8_t* values;
    std::size_t quads, rows;
};

// dots [rows][16]: the rows times a tile of 16 columns, [quads][16][4]: unsigned bytes, or numbers of 15 bits of which
// `high`, where there is one, has the upper 7.
using MultiplyTile = void (*)(const std::uint8_t* low, const std::uint8_t* high, const Quads& x, std::int32_t* dots);

// A head of an image after rounding, and the buffers of one thread for 16 of its queries. What is behind the last row or
// channel is never written and counts as zero.
struct Head {
    std::size_t rows = 0, width = 0;            // T, d
    std::size_t row_quads, width_quads, tiles;  // ceil(T / 4), ceil(d / 4), ceil(T / 16)
    Buffer<float> mean, numbers, zeros;         // [d]
    Buffer<std::uint32_t> largest_bits;         // [d], of the values
    Buffer<std::int8_t> rounded;                // [d/4][4], one row
    Buffer<std::uint8_t> queries;               // [T/16][d/4][16][4], 128 is zero
    Buffer<std::int8_t> keys;                   // [d/4][T][4]
    Buffer<std::uint32_t> values;               // [T/4][d], four rows in each number
    Buffer<float> query_scales;                 // [T/16][16]
    Buffer<float> key_scales, value_scales;
    Buffer<std::int32_t> key_zeros;             // take the 128 of the queries out of a dot
    Buffer<std::int32_t> dots;                  // [T or d][16], of 16 queries
    Buffer<float> scores, sums;                 // [T][16], [d][16]
    Buffer<std::uint8_t> low, high;             // of p, [T/4][16][4]

    void fit(const QuantizedAttention& a) {
        if (rows == a.rows && width == a.width) return;
        width = 0;  // until there is memory for all
        rows = a.rows;
        row_quads = (rows + 3) / 4, width_quads = (a.width + 3) / 4, tiles = (rows + kTile - 1) / kTile;
        for (Buffer<float>* buffer : {&mean, &numbers, &zeros, &value_scales}) buffer->renew(a.width, 0);
        largest_bits.renew(a.width, 0);
        rounded.renew(width_quads * 4, 0);
        queries.renew(tiles * width_quads * kTile * 4, 128);
        keys.renew(rows * width_quads * 4, 0);
        values.renew(row_quads * a.width, 0);
        query_scales.renew(tiles * kTile, 0);
        key_scales.renew(rows, 0);
        key_zeros.renew(rows, 0);
        dots.renew((rows > a.width ? rows : a.width) * kTile, 0);
        scores.renew(rows * kTile, 0);
        sums.renew(a.width * kTile, 0);
        for (Buffer<std::uint8_t>* buffer : {&low, &high}) buffer->renew(row_quads * kTile * 4, 0);
        width = a.width;
    }
};

// The first query of a head; its keys and values lie `layer` and twice that behind, the next row three times that.
struct Rows {
    const float* first;
    std::size_t layer;

    const float* query(std::size_t t) const { return first + t * 3 * layer; }
    const float* key(std::size_t t) const { return query(t) + layer; }
    const float* value(std::size_t t) const { return query(t) + 2 * layer; }
};

// Queries and keys. Returns a bound of all scores, which is no number where a query or a key is none.
float round_queries_and_keys(const Rows& rows, float scale, Head& head) {
    const std::size_t width = head.width, count = head.rows, quads = head.width_quads;
    float *mean = &head.mean[0], *shifted = &head.numbers[0];
    std::int8_t* rounded = &head.rounded[0];
    for (std::size_t d = 0; d < width; ++d) mean[d] = 0;
    for (std::size_t t = 0; t < count; ++t) {
        const float* key = rows.key(t);
        for (std::size_t d = 0; d < width; ++d) mean[d] = mean[d] + key[d];
    }
    for (std::size_t d = 0; d < width; ++d) mean[d] = mean[d] / static_cast<float>(count);
    float all_queries = 0, all_keys = 0;
    for (std::size_t t = 0; t < count; ++t) {
        const float* key = rows.key(t);
        for (std::size_t d = 0; d < width; ++d) shifted[d] = key[d] - mean[d];
        head.key_zeros[t] = -128 * round_group(shifted, width, rounded, head.key_scales[t]);
        all_keys = all_keys + head.key_scales[t];
        std::int8_t* keys = &head.keys[t * 4];
        for (std::size_t q = 0; q < quads; ++q) std::memcpy(keys + q * count * 4, rounded + 4 * q, 4);
        float query_scale;
        round_group(rows.query(t), width, rounded, query_scale);
        head.query_scales[t] = query_scale * scale;
        all_queries = all_queries + head.query_scales[t];
        std::uint8_t* queries = &head.queries[(t / kTile * quads * kTile + t % kTile) * 4];
        for (std::size_t q = 0; q < quads; ++q) {
            std::uint32_t bytes;
            std::memcpy(&bytes, rounded + 4 * q, sizeof bytes);
            bytes ^= 0x80808080u;  // + 128
            std::memcpy(queries + q * kTile * 4, &bytes, sizeof bytes);
        }
    }
    return all_queries * all_keys * static_cast<float>(127 * 127 * width);
}

// Values. Returns the sum of the channels' largest, which is no number where a value is none.
float round_values(const Rows& rows, Head& head) {
    const std::size_t width = head.width;
    std::uint32_t* largest_bits = &head.largest_bits[0];  // ordered as the numbers are, NaN above infinity
    float* inverse = &head.numbers[0];
    for (std::size_t d = 0; d < width; ++d) largest_bits[d] = 0;
    for (std::size_t t = 0; t < head.rows; ++t) {
        const float* value = rows.value(t);
        for (std::size_t d = 0; d < width; ++d) {
            std::uint32_t bits;
            std::memcpy(&bits, value + d, sizeof bits);
            bits &= 0x7fffffffu;
            largest_bits[d] = bits > largest_bits[d] ? bits : largest_bits[d];
        }
    }
    float sum = 0;
    for (std::size_t d = 0; d < width; ++d) {
        float largest;
        std::memcpy(&largest, largest_bits + d, sizeof largest);
        sum = sum + largest;
        head.value_scales[d] = largest < kZero ? 0.0f : largest / 127.0f;
        inverse[d] = largest < kZero ? 0.0f : 127.0f / largest;
    }
    if (!(sum < kMost)) return sum;
    for (std::size_t t = 0; t < head.rows; t += 4) {
        const float* four[4];
        for (std::size_t i = 0; i < 4; ++i) four[i] = t + i < head.rows ? rows.value(t + i) : &head.zeros[0];
        const float *one = four[0], *two = four[1], *three = four[2], *last = four[3];
        std::uint32_t* quads = &head.values[t / 4 * width];
        const auto round = [inverse](const float* values, std::size_t d) {
            return static_cast<std::uint32_t>(static_cast<std::int32_t>(round_half_even(values[d] * inverse[d]))) & 255u;
        };
        for (std::size_t d = 0; d < width; ++d)
            quads[d] = round(one, d) | round(two, d) << 8 | round(three, d) << 16 | round(last, d) << 24;
    }
    return sum;
}

// What some of a tile's queries, from number `first` on, pay to each row: p. Returns one over the sum of all p.
PartFloats weigh_rows(Head& head, const float* query_scales, std::size_t first) {
    const PartFloats scales = load_part(query_scales + first);
    PartFloats largest = PartFloats{} - std::numeric_limits<float>::infinity();
    for (std::size_t t = 0; t < head.rows; ++t) {
        PartIntegers dots;
        std::memcpy(&dots, &head.dots[t * kTile + first], sizeof dots);
        const PartFloats score = __builtin_convertvector(dots + head.key_zeros[t], PartFloats) * (head.key_scales[t] * scales);
        largest = score > largest ? score : largest;
        std::memcpy(&head.scores[t * kTile + first], &score, sizeof score);
    }
    PartIntegers total = {};
    for (std::size_t t = 0; t < head.rows; t += 4) {
        const std::size_t count = head.rows - t < 4 ? head.rows - t : 4;
        PartIntegers low = {}, high = {};
        for (std::size_t i = 0; i < count; ++i) {
            const PartFloats weight = exponential(load_part(&head.scores[(t + i) * kTile + first]) - largest) * kMostWeight;
            const PartIntegers p = __builtin_convertvector((weight + 12582912.0f) - 12582912.0f, PartIntegers);
            total = total + p;
            low = low | (p & 255) << static_cast<int>(8 * i);
            high = high | (p >> 8) << static_cast<int>(8 * i);
        }
        std::memcpy(&head.low[(t * kTile / 4 + first) * 4], &low, sizeof low);
        std::memcpy(&head.high[(t * kTile / 4 + first) * 4], &high, sizeof high);
    }
    return 1.0f / __builtin_convertvector(total, PartFloats);
}

// sums [d][16]: of p times the values.
template <MultiplyTile multiply>
void sum_values(Head& head) {
    for (std::size_t t = 0; t < head.rows; t += kRowsOfSum) {
        const std::size_t left = head.row_quads - t / 4, quads = left < kRowsOfSum / 4 ? left : kRowsOfSum / 4;
        const std::int8_t* values = reinterpret_cast<const std::int8_t*>(&head.values[t / 4 * head.width]);
        multiply(&head.low[t * kTile], &head.high[t * kTile], {values, quads, head.width}, &head.dots[0]);
        for (std::size_t i = 0; i < head.width * kTile; ++i) {
            const float sum = static_cast<float>(head.dots[i]);
            head.sums[i] = t ? head.sums[i] + sum : sum;
        }
    }
}

template <MultiplyTile multiply>
void attend_quantized(const QuantizedAttention& a, std::size_t image_and_head) {
    static thread_local Head head;  // kept: an image has hundreds of heads
    head.fit(a);
    const std::size_t image = image_and_head / a.heads, layer = a.heads * a.width;
    const std::size_t first = image_and_head % a.heads * a.width;
    float* joined = a.joined + image * a.rows * layer + first;
    const Rows rows = {a.qkv + image * a.rows * 3 * layer + first, layer};
    if (!(round_queries_and_keys(rows, a.scale, head) < kMost && round_values(rows, head) < kMost)) {
        for (std::size_t t = 0; t < a.rows; ++t)
            for (std::size_t d = 0; d < a.width; ++d)
                joined[t * layer + d] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    for (std::size_t tile = 0; tile < head.tiles; ++tile) {
        const std::uint8_t* queries = &head.queries[tile * head.width_quads * kTile * 4];
        multiply(queries, nullptr, {&head.keys[0], head.width_quads, a.rows}, &head.dots[0]);
        alignas(64) float inverse[kTile];
        for (std::size_t part = 0; part < kTile; part += kPart) {
            const PartFloats inverses = weigh_rows(head, &head.query_scales[tile * kTile], part);
            std::memcpy(inverse + part, &inverses, sizeof inverses);
        }
        sum_values<multiply>(head);
        const std::size_t left = a.rows - tile * kTile, count = left < kTile ? left : kTile;
        float* into = joined + tile * kTile * layer;
        for (std::size_t lane = 0; lane < count; ++lane, into += layer)
            for (std::size_t d = 0; d < a.width; ++d)
                into[d] = head.sums[d * kTile + lane] * (head.value_scales[d] * inverse[lane]);
    }
}

}  // namespace
}  // namespace blip2rt
