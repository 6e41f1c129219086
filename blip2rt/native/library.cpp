// What the library shows: the custom operators for ONNX Runtime, and plain functions for Python.
#include "cosines.h"
#include "operators.h"

#define BLIP2RT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using blip2rt::Path;
using blip2rt::Weight;

blip2rt::Compare find_compare(const Path* path) {
#ifdef BLIP2RT_X86
    if (path == &blip2rt::vnni_path) return blip2rt::compare_avx512;
    if (path == &blip2rt::avx2_path && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return blip2rt::compare_avx2;
#endif
    (void)path;
    return nullptr;
}

constexpr blip2rt::Threads kHere = {nullptr, [](void*, void (*body)(void*, std::size_t), std::size_t count, void* data) {
                                        for (std::size_t i = 0; i < count; ++i) body(data, i);
                                        return true;
                                    }};

}  // namespace

BLIP2RT_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    const ort::Api api = {base->get_api(ort::kApiVersion)};
    static ort::CustomOpDomain* domain = nullptr;  // sessions share it; it lives as long as the process
    if (!domain) {
        ort::CustomOpDomain* made = nullptr;
        if (ort::Status* status = api.create_domain("blip2rt", &made)) return status;
        for (const ort::CustomOp* op :
             {blip2rt::matmul_operator(), blip2rt::attention_operator(), blip2rt::quantized_attention_operator()})
            if (ort::Status* status = api.add_op(made, op)) return status;
        domain = made;
    }
    return api.add_domain(options, domain);
}

// Name of the path that runs here; null where BLIP2RT_KERNELS asks for one that cannot.
BLIP2RT_EXPORT const char* blip2rt_path() {
    const Path* path = blip2rt::chosen_path();
    return path ? path->name : nullptr;
}

// The pass of a search over a gallery, on one thread (cosines.h); 0 on success, 1 where the path has none.
BLIP2RT_EXPORT int blip2rt_cosines(const char* path_name, const std::uint16_t* half, std::size_t rows,
                                   std::size_t per_row, std::size_t width, const float* queries, std::size_t count,
                                   float* out) {
    const blip2rt::Compare compare = find_compare(blip2rt::find_path(path_name));
    if (!compare) return 1;
    if (half) compare({half, rows, per_row, width}, {queries, count}, out);
    return 0;
}

// The operators outside a graph, on one thread, for tests: 0 on success, 1 where the path cannot run here.
BLIP2RT_EXPORT int blip2rt_quantized_matmul(const char* path_name, const float* x, std::size_t rows, std::size_t depth,
                                            const std::uint8_t* packed, const std::uint16_t* scales, const float* bias,
                                            std::size_t outputs, int bits, int activation, float* y) {
    const Path* path = blip2rt::find_path(path_name);
    if (!path) return 1;
    const Weight weight = {packed, scales, bias, outputs, depth, bits, static_cast<blip2rt::Activation>(activation)};
    return blip2rt::quantized_matmul(*path, weight, x, rows, y, kHere) ? 0 : 2;
}

BLIP2RT_EXPORT int blip2rt_cached_attention(const char* path_name, const float* qkv, const float* mask,
                                            const std::int64_t* write_indices, float* keys, float* values, float* joined,
                                            std::size_t images, std::size_t rows, std::size_t heads, std::size_t width,
                                            std::size_t capacity, std::size_t mask_heads, float scale) {
    const Path* path = blip2rt::find_path(path_name);
    if (!path) return 1;
    const blip2rt::CachedAttention attention = {qkv,  mask,  write_indices, keys,     values,     joined,
                                                rows, heads, width,         capacity, mask_heads, scale};
    return blip2rt::cached_attention(*path, attention, images, kHere) ? 0 : 2;
}

BLIP2RT_EXPORT int blip2rt_quantized_attention(const char* path_name, const float* qkv, float* joined, std::size_t images,
                                               std::size_t rows, std::size_t heads, std::size_t width, float scale) {
    const Path* path = blip2rt::find_path(path_name);
    if (!path) return 1;
    return blip2rt::quantized_attention(*path, {qkv, joined, rows, heads, width, scale}, images, kHere) ? 0 : 2;
}
