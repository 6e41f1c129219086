// The paths: one for each kind of processor, all with the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cached_attention.h"
#include "quantized_attention.h"
#include "quantized_matmul.h"

namespace blip2rt {

// One way to compute everything, for one kind of processor.
struct Path {
    const char* name;
    std::size_t (*value_bytes)(int bits);
    void (*round_row)(const Weight& weight, const float* x, std::size_t row, const Rounded& into);
    void (*multiply)(const Weight& weight, const Rounded& x, std::size_t first_tile, std::size_t last_tile, float* y);
    void (*attend)(const CachedAttention& attention, std::size_t image_and_head);
    void (*attend_quantized)(const QuantizedAttention& attention, std::size_t image_and_head);
};

extern const Path portable_path;
#ifdef BLIP2RT_X86
extern const Path avx2_path;
extern const Path vnni_path;
#endif

// The path of that name; the best one that this processor can run where it is null. Null: unknown, or not possible here.
const Path* find_path(const char* name);

// Runs `body(data, i)` for i in 0..count-1, in any order.
struct Threads {
    void* context;
    bool (*run)(void* context, void (*body)(void*, std::size_t), std::size_t count, void* data);
};

// All: false where the threads failed. y is [rows, N].
bool quantized_matmul(const Path& path, const Weight& weight, const float* x, std::size_t rows, float* y,
                      const Threads& threads);
bool cached_attention(const Path& path, const CachedAttention& attention, std::size_t images, const Threads& threads);
bool quantized_attention(const Path& path, const QuantizedAttention& attention, std::size_t images, const Threads& threads);

}  // namespace blip2rt
