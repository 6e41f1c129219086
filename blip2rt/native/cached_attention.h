// Attention of new rows over a cache of keys and values, which it first writes the new rows into.
//
// The new rows come as one linear layer gives them, queries, keys and values beside each other. The mask says which cached
// rows each of them sees; rows that no one of eight neighbours sees are left out, so the cost follows the rows in use and
// not the capacity of the cache. The arithmetic is fixed, so that every path gives the same bits, those of `twin.py`:
// sums run over d, over the cached rows in their order, every operation rounded by itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace blip2rt {

constexpr std::size_t kLanes = 8;       // new rows that are computed together
constexpr float kHidden = -1e30f;       // a mask of this or less hides a cached row

struct CachedAttention {
    const float* qkv;                   // [B, S, 3, H, d]
    const float* mask;                  // [B, 1 or H, S, C], added to the scores
    const std::int64_t* write_indices;  // [B], where the S new rows go
    float* keys;                        // [B, H, C, d]
    float* values;                      // [B, H, C, d]
    float* joined;                      // [B, S, H, d]
    std::size_t rows;                   // S
    std::size_t heads;                  // H
    std::size_t width;                  // d
    std::size_t capacity;               // C
    std::size_t mask_heads;             // 1 or H
    float scale;                        // of the scores
};

}  // namespace blip2rt
