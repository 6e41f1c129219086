// One head of one image. Every path compiles it for its own instructions, so everything here is in an unnamed
// namespace; the vectors are GCC's and Clang's, eight new rows or eight values of d beside each other.
#pragma once

#include <cstring>
#include <limits>

#include "buffer.h"
#include "exponential.h"
#include "path.h"

namespace blip2rt {
namespace {

typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
    Floats floats;
    std::memcpy(&floats, from, sizeof floats);
    return floats;
}

inline Floats load_some(const float* from, std::size_t count) {
    Floats floats = {};
    std::memcpy(&floats, from, count * sizeof(float));
    return floats;
}

// Asks for `count` floats that are needed soon: rows of a cache come from memory, too few in a line for the processor to
// see where this leads.
inline void fetch(const float* from, std::size_t count) {
    for (std::size_t k = 0; k < count; k += 16) __builtin_prefetch(from + k, 0, 2);
}

// The buffers of one thread.
struct Scratch {
    Buffer<float> queries;        // [d][kLanes]
    Buffer<float> scores;         // [C][kLanes]
    Buffer<std::size_t> columns;  // cached rows that are seen, in their order
};

// Rows first.. of one head; lanes beyond the last row compute the first one again.
void attend_rows(const CachedAttention& a, std::size_t image, std::size_t head, std::size_t first, Scratch& scratch) {
    const std::size_t count = a.rows - first < kLanes ? a.rows - first : kLanes, width = a.width, token = 3 * a.heads * width;
    const float* queries[kLanes];
    const float* masks[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const std::size_t row = first + (lane < count ? lane : 0);
        const std::size_t mask_head = image * a.mask_heads + (a.mask_heads > 1 ? head : 0);
        queries[lane] = a.qkv + (image * a.rows + row) * token + head * width;
        masks[lane] = a.mask + (mask_head * a.rows + row) * a.capacity;
    }
    scratch.queries.reserve(width * kLanes);
    scratch.scores.reserve(a.capacity * kLanes);
    scratch.columns.reserve(a.capacity);
    for (std::size_t k = 0; k < width; ++k)
        for (std::size_t lane = 0; lane < kLanes; ++lane) scratch.queries[k * kLanes + lane] = queries[lane][k];
    std::size_t seen = 0;
    for (std::size_t c = 0; c < a.capacity; ++c) {
        bool is_seen = false;
        for (std::size_t lane = 0; lane < count; ++lane) is_seen |= masks[lane][c] > kHidden;
        if (is_seen) scratch.columns[seen++] = c;
    }
    const std::size_t base = (image * a.heads + head) * a.capacity;
    float* joined = a.joined + (image * a.rows + first) * a.heads * width + head * width;
    if (!seen) {
        for (std::size_t lane = 0; lane < count; ++lane)
            std::memset(joined + lane * a.heads * width, 0, width * sizeof(float));
        return;
    }

    // scores, and the largest of every lane
    Floats largest = Floats{} - std::numeric_limits<float>::infinity();
    constexpr std::size_t kAtOnce = 8;
    for (std::size_t j = 0; j < seen; j += kAtOnce) {
        const float* keys[kAtOnce];
        for (std::size_t i = 0; i < kAtOnce; ++i)
            keys[i] = a.keys + (base + scratch.columns[j + i < seen ? j + i : seen - 1]) * width;
        for (const float* key : keys) fetch(a.values + (key - a.keys), width);
        Floats dots[kAtOnce] = {};
        for (std::size_t k = 0; k < width; ++k) {
            const Floats query = load(&scratch.queries[k * kLanes]);
            for (std::size_t i = 0; i < kAtOnce; ++i) dots[i] = dots[i] + query * keys[i][k];
        }
        for (std::size_t i = 0; i < kAtOnce && j + i < seen; ++i) {
            Floats bias;
            for (std::size_t lane = 0; lane < kLanes; ++lane) bias[lane] = masks[lane][scratch.columns[j + i]];
            const Floats score = dots[i] * a.scale + bias;
            largest = score > largest ? score : largest;
            std::memcpy(&scratch.scores[(j + i) * kLanes], &score, sizeof score);
        }
    }

    // their exponentials; the next head's keys lie one cache further
    Floats total = {};
    for (std::size_t j = 0; j < seen; ++j) {
        fetch(a.keys + (base + a.capacity + scratch.columns[j]) * width, width);
        const Floats weight = exponential(load(&scratch.scores[j * kLanes]) - largest);
        total = total + weight;
        std::memcpy(&scratch.scores[j * kLanes], &weight, sizeof weight);
    }

    // values
    const auto mean_of = [&](std::size_t k, std::size_t part, auto load_values) {
        Floats sums[kLanes] = {};
        for (std::size_t j = 0; j < seen; ++j) {
            const Floats value = load_values(a.values + (base + scratch.columns[j]) * width + k);
            const float* weights = &scratch.scores[j * kLanes];
            for (std::size_t lane = 0; lane < kLanes; ++lane) sums[lane] = sums[lane] + value * weights[lane];
        }
        for (std::size_t lane = 0; lane < count; ++lane) {
            const Floats mean = sums[lane] / total[lane];
            std::memcpy(joined + lane * a.heads * width + k, &mean, part * sizeof(float));
        }
    };
    std::size_t k = 0;
    for (; k + kLanes <= width; k += kLanes) mean_of(k, kLanes, load);
    if (k < width) mean_of(k, width - k, [&](const float* from) { return load_some(from, width - k); });
}

void attend(const CachedAttention& a, std::size_t image_and_head) {
    static thread_local Scratch scratch;  // kept: a step calls this a thousand times
    const std::size_t image = image_and_head / a.heads, head = image_and_head % a.heads, layer = a.heads * a.width;
    const std::size_t start = image_and_head * a.capacity + static_cast<std::size_t>(a.write_indices[image]);
    const float* rows = a.qkv + image * a.rows * 3 * layer + head * a.width;
    for (std::size_t row = 0; row < a.rows; ++row, rows += 3 * layer) {
        std::memcpy(a.keys + (start + row) * a.width, rows + layer, a.width * sizeof(float));
        std::memcpy(a.values + (start + row) * a.width, rows + 2 * layer, a.width * sizeof(float));
    }
    for (std::size_t first = 0; first < a.rows; first += kLanes) attend_rows(a, image, head, first, scratch);
}

}  // namespace
}  // namespace blip2rt
