// One head of one image in 8 bits. Every path compiles it for its own instructions, with its own product of bytes, so
// everything here is in an unnamed namespace.
#pragma once

#include <initializer_list>
#include <limits>

#include "buffer.h"
#include "exponential.h"
#include "loop.h"

namespace blip2rt {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kPart = 16;
#elif defined(__AVX__)
constexpr std::size_t kPart = 8;
#else
constexpr std::size_t kPart = 4;
#endif
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
    Buffer<float> mean, largest, numbers, zeros;  // [d] of the keys, of the values, and of one row
    Buffer<std::int8_t> rounded;                // [d/4][4], one row
    Buffer<std::uint8_t> queries;               // [T/16][d/4][16][4], 128 is zero
    Buffer<std::int8_t> keys;                   // [d/4][T][4]
    Buffer<std::int8_t> values;                 // [T/4][d][4]
    Buffer<float> query_scales;                 // [T/16][16]
    Buffer<float> key_scales, value_scales;
    Buffer<std::int32_t> key_zeros;             // take the 128 of the queries out of a dot
    Buffer<std::int32_t> dots;                  // [T or d][16], of 16 queries
    Buffer<float> scores, sums;                 // [T][16], [d][16]
    Buffer<std::uint8_t> low, high;             // of p, [T/4][16][4]

    void fit(const QuantizedAttention& a) {
        if (rows == a.rows && width == a.width) return;
        rows = a.rows, width = a.width;
        row_quads = (rows + 3) / 4, width_quads = (width + 3) / 4, tiles = (rows + kTile - 1) / kTile;
        for (Buffer<float>* buffer : {&mean, &largest, &numbers, &zeros, &value_scales}) buffer->renew(width, 0);
        rounded.renew(width_quads * 4, 0);
        queries.renew(tiles * width_quads * kTile * 4, 128);
        keys.renew(rows * width_quads * 4, 0);
        values.renew(row_quads * width * 4, 0);
        query_scales.renew(tiles * kTile, 0);
        key_scales.renew(rows, 0);
        key_zeros.renew(rows, 0);
        dots.renew((rows > width ? rows : width) * kTile, 0);
        scores.renew(rows * kTile, 0);
        sums.renew(width * kTile, 0);
        for (Buffer<std::uint8_t>* buffer : {&low, &high}) buffer->renew(row_quads * kTile * 4, 0);
    }
};

// Rounds the rows of a head; `row` is its first query, its keys and values lie `layer` and twice that behind. False where
// there is a number that is none, or where a score could overflow.
bool round_head(const float* row, std::size_t layer, float scale, Head& head) {
    const std::size_t width = head.width, token = 3 * layer;
    Buffer<float>&mean = head.mean, &largest = head.largest, &shifted = head.numbers;
    for (std::size_t d = 0; d < width; ++d) mean[d] = largest[d] = 0;
    for (std::size_t t = 0; t < head.rows; ++t) {
        const float *key = row + t * token + layer, *value = key + layer;
        for (std::size_t d = 0; d < width; ++d) mean[d] = mean[d] + key[d];
        for (std::size_t d = 0; d < width; ++d) {
            const float magnitude = std::fabs(value[d]);
            largest[d] = magnitude > largest[d] || magnitude != magnitude ? magnitude : largest[d];
        }
    }
    float all_queries = 0, all_keys = 0, all_values = 0;  // sums, which keep what is no number
    for (std::size_t d = 0; d < width; ++d) mean[d] = mean[d] / static_cast<float>(head.rows);
    for (std::size_t t = 0; t < head.rows; ++t) {
        const float *query = row + t * token, *key = query + layer;
        for (std::size_t d = 0; d < width; ++d) shifted[d] = key[d] - mean[d];
        head.key_zeros[t] = -128 * round_group(&shifted[0], width, &head.rounded[0], head.key_scales[t]);
        for (std::size_t q = 0; q < head.width_quads; ++q)
            std::memcpy(&head.keys[(q * head.rows + t) * 4], &head.rounded[4 * q], 4);
        all_keys = all_keys + head.key_scales[t];
        float query_scale;
        round_group(query, width, &head.rounded[0], query_scale);
        query_scale = query_scale * scale;
        all_queries = all_queries + query_scale;
        const std::size_t tile = t / kTile, lane = t % kTile;
        head.query_scales[t] = query_scale;
        std::uint8_t* quad = &head.queries[(tile * head.width_quads * kTile + lane) * 4];
        for (std::size_t q = 0; q < head.width_quads; ++q, quad += kTile * 4) {
            std::uint32_t bytes;
            std::memcpy(&bytes, &head.rounded[4 * q], sizeof bytes);
            bytes ^= 0x80808080u;  // + 128
            std::memcpy(quad, &bytes, sizeof bytes);
        }
    }
    Buffer<float>& inverse = mean;
    for (std::size_t d = 0; d < width; ++d) {
        all_values = all_values + largest[d];
        const bool is_zero = largest[d] < kZero;
        head.value_scales[d] = is_zero ? 0.0f : largest[d] / 127.0f;
        inverse[d] = is_zero ? 0.0f : 127.0f / largest[d];
    }
    const float scores = all_queries * all_keys * static_cast<float>(127 * 127 * width);
    if (!(scores < 1e37f && all_values < 1e37f)) return false;
    for (std::size_t t = 0; t < head.rows; t += 4) {
        const float* four[4];
        for (std::size_t i = 0; i < 4; ++i) four[i] = t + i < head.rows ? row + (t + i) * token + 2 * layer : &head.zeros[0];
        for (std::size_t d = 0; d < width; ++d) {
            std::uint32_t quad = 0;
            for (std::size_t i = 0; i < 4; ++i) {
                const std::int32_t value = static_cast<std::int32_t>(round_half_even(four[i][d] * inverse[d]));
                quad |= (static_cast<std::uint32_t>(value) & 255u) << (8 * i);
            }
            std::memcpy(&head.values[(t * width + 4 * d)], &quad, sizeof quad);
        }
    }
    return true;
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
        multiply(&head.low[t * kTile], &head.high[t * kTile], {&head.values[t * head.width], quads, head.width}, &head.dots[0]);
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
    if (!round_head(a.qkv + image * a.rows * 3 * layer + first, layer, a.scale, head)) {
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
