// What the library shows: the custom operator `blip2rt.QuantizedMatMul` for ONNX Runtime, and plain functions for
// Python. The operator reads its weights where ONNX Runtime has mapped them: nothing is copied or repacked, so a model
// loads at once and its pages belong to the file.
#include <cstdlib>
#include <exception>
#include <vector>

#include "cosines.h"
#include "ort_abi.h"
#include "quantized_matmul.h"

#define BLIP2RT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using blip2rt::Path;
using blip2rt::Weight;

enum Input : std::size_t { kX, kPacked, kScales, kBias, kInputs };

struct Kernel {
    ort::Api api;
    const Path* path;
    std::size_t outputs, depth;
    int bits;

    ort::Status* compute(ort::KernelContext* context) const;
};

struct Parallel {
    const ort::Api* api;
    ort::KernelContext* context;
    ort::Status* status;
};

bool run_parallel(void* context, void (*body)(void*, std::size_t), std::size_t count, void* data) {
    Parallel& parallel = *static_cast<Parallel*>(context);
    if (count == 1) {
        body(data, 0);
        return true;
    }
    parallel.status = parallel.api->parallel_for(parallel.context, body, count, data);
    return !parallel.status;
}

ort::Status* Kernel::compute(ort::KernelContext* context) const {
    const void* data[kInputs];
    std::vector<std::int64_t> shape;
    for (std::size_t i = 0; i < kInputs; ++i) {
        const ort::Value* value = nullptr;
        if (ort::Status* status = api.input(context, i, &value)) return status;
        void* address = nullptr;
        if (ort::Status* status = api.tensor_data(const_cast<ort::Value*>(value), &address)) return status;
        data[i] = address;
        ort::ShapeInfo* info = nullptr;
        if (ort::Status* status = api.shape_info(value, &info)) return status;
        std::size_t rank = 0;
        ort::Status* status = api.dimensions_count(info, &rank);
        std::vector<std::int64_t> sizes(rank);
        if (!status) status = api.dimensions(info, sizes.data(), rank);
        api.release(info);
        if (status) return status;
        std::size_t count = 1;
        for (std::int64_t size : sizes) count *= static_cast<std::size_t>(size);
        const Weight weight = {nullptr, nullptr, nullptr, outputs, depth, bits};
        const std::size_t expected[kInputs] = {count, weight.tiles() * weight.tile_bytes(),
                                               weight.tiles() * weight.groups() * blip2rt::kTile, outputs};
        if (count != expected[i] || (i == kX && (rank < 1 || static_cast<std::size_t>(sizes.back()) != depth)))
            return api.create_status(2, "QuantizedMatMul: an input has not the size that N, K and bits ask for");
        if (i == kX) shape = sizes;
    }
    std::size_t rows = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= static_cast<std::size_t>(shape[i]);
    shape.back() = static_cast<std::int64_t>(outputs);
    ort::Value* output = nullptr;
    if (ort::Status* status = api.output(context, 0, shape.data(), shape.size(), &output)) return status;
    void* y = nullptr;
    if (ort::Status* status = api.tensor_data(output, &y)) return status;
    const Weight weight = {static_cast<const std::uint8_t*>(data[kPacked]),
                           static_cast<const std::uint16_t*>(data[kScales]),
                           static_cast<const float*>(data[kBias]),
                           outputs,
                           depth,
                           bits};
    Parallel parallel = {&api, context, nullptr};
    blip2rt::quantized_matmul(*path, weight, static_cast<const float*>(data[kX]), rows, static_cast<float*>(y),
                              {&parallel, run_parallel});
    return parallel.status;
}

blip2rt::Compare find_compare(const Path* path) {
#ifdef BLIP2RT_X86
    if (path == &blip2rt::vnni_path) return blip2rt::compare_avx512;
    if (path == &blip2rt::avx2_path && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return blip2rt::compare_avx2;
#endif
    (void)path;
    return nullptr;
}

const Path* chosen_path() { return blip2rt::find_path(std::getenv("BLIP2RT_KERNELS")); }

ort::Status* create_kernel(const ort::CustomOp*, const void* const* slots, const ort::KernelInfo* info, void** kernel) {
    const ort::Api api = {slots};
    std::int64_t outputs = 0, depth = 0, bits = 0;
    if (ort::Status* status = api.attribute(info, "N", &outputs)) return status;
    if (ort::Status* status = api.attribute(info, "K", &depth)) return status;
    if (ort::Status* status = api.attribute(info, "bits", &bits)) return status;
    if (outputs < 1 || depth < 1 || (bits != 4 && bits != 8))
        return api.create_status(2, "QuantizedMatMul: N and K must be positive and bits 4 or 8");
    const Path* path = chosen_path();
    if (!path) return api.create_status(2, "BLIP2RT_KERNELS names no path that this processor can run");
    *kernel = new Kernel{api, path, static_cast<std::size_t>(outputs), static_cast<std::size_t>(depth),
                         static_cast<int>(bits)};
    return nullptr;
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    try {
        return self.compute(context);
    } catch (const std::exception& error) {  // std::bad_alloc
        return self.api.create_status(1, error.what());
    }
}

ort::ElementType input_type(const ort::CustomOp*, std::size_t i) {
    return i == kPacked ? ort::kUInt8 : i == kScales ? ort::kUInt16 : ort::kFloat;
}

ort::CustomOp describe() {
    ort::CustomOp op = {};
    op.version = ort::kApiVersion;
    op.name = [](const ort::CustomOp*) -> const char* { return "QuantizedMatMul"; };
    op.execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.input_type = input_type;
    op.input_count = [](const ort::CustomOp*) -> std::size_t { return kInputs; };
    op.output_type = [](const ort::CustomOp*, std::size_t) { return ort::kFloat; };
    op.output_count = [](const ort::CustomOp*) -> std::size_t { return 1; };
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_characteristic = [](const ort::CustomOp*, std::size_t) { return 0; };   // required
    op.output_characteristic = [](const ort::CustomOp*, std::size_t) { return 0; };  // required
    op.input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };           // the default allocator's
    op.create_kernel_v2 = create_kernel;
    op.compute_v2 = compute;
    op.start_version = [](const ort::CustomOp*) { return 1; };
    op.end_version = [](const ort::CustomOp*) { return 1; };
    return op;
}

}  // namespace

BLIP2RT_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
    static const ort::CustomOp op = describe();
    const ort::Api api = {base->get_api(ort::kApiVersion)};
    static ort::CustomOpDomain* domain = nullptr;  // sessions share it; it lives as long as the process
    if (!domain) {
        ort::CustomOpDomain* made = nullptr;
        if (ort::Status* status = api.create_domain("blip2rt", &made)) return status;
        if (ort::Status* status = api.add_op(made, &op)) return status;
        domain = made;
    }
    return api.add_domain(options, domain);
}

// Name of the path that runs here; null where BLIP2RT_KERNELS asks for one that cannot.
BLIP2RT_EXPORT const char* blip2rt_path() {
    const Path* path = chosen_path();
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

// The operator outside a graph, on one thread, for tests: 0 on success, 1 where the path cannot run here.
BLIP2RT_EXPORT int blip2rt_quantized_matmul(const char* path_name, const float* x, std::size_t rows, std::size_t depth,
                                            const std::uint8_t* packed, const std::uint16_t* scales, const float* bias,
                                            std::size_t outputs, int bits, float* y) {
    const Path* path = blip2rt::find_path(path_name);
    if (!path) return 1;
    const Weight weight = {packed, scales, bias, outputs, depth, bits};
    const blip2rt::Threads here = {nullptr, [](void*, void (*body)(void*, std::size_t), std::size_t count, void* data) {
                                       for (std::size_t i = 0; i < count; ++i) body(data, i);
                                       return true;
                                   }};
    return blip2rt::quantized_matmul(*path, weight, x, rows, y, here) ? 0 : 2;
}
