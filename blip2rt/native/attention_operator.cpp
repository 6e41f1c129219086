// `blip2rt.CachedAttention`. Where its caches go out in the buffers that they came in, as a decoder binds them, only the
// new rows are written; elsewhere the old ones are copied first.
#include <cstring>

#include "operators.h"

namespace blip2rt {
namespace {

struct AttentionKernel {
    enum Input : std::size_t { kRows, kKeys, kValues, kMask, kWriteIndices, kInputs };
    static constexpr const char* kName = "CachedAttention";
    static constexpr std::size_t kOutputs = 3;  // joined, keys, values
    static ort::ElementType input_type(std::size_t i) { return i == kWriteIndices ? ort::kInt64 : ort::kFloat; }

    ort::Api api;
    const Path* path;
    float scale;

    static ort::Status* create(const ort::Api& api, const ort::KernelInfo* info, AttentionKernel** kernel) {
        float scale = 0;
        if (ort::Status* status = api.attribute(info, "scale", &scale)) return status;
        const Path* path = chosen_path();
        if (!path) return api.create_status(2, "BLIP2RT_KERNELS names no path that this processor can run");
        *kernel = new AttentionKernel{api, path, scale};
        return nullptr;
    }

    ort::Status* compute(ort::KernelContext* context) const {
        Tensor inputs[kInputs];
        for (std::size_t i = 0; i < kInputs; ++i)
            if (ort::Status* status = read_input(api, context, i, inputs[i])) return status;
        const std::vector<std::size_t>&cache = inputs[kKeys].shape, &rows = inputs[kRows].shape,
              &mask = inputs[kMask].shape;
        if (cache.size() != 4 || inputs[kValues].shape != cache || rows.size() != 3 || mask.size() != 4 ||
            rows[0] != cache[0] || rows[2] != 3 * cache[1] * cache[3] || mask[0] != cache[0] ||
            (mask[1] != 1 && mask[1] != cache[1]) || mask[2] != rows[1] || mask[3] != cache[2] ||
            inputs[kWriteIndices].shape != std::vector<std::size_t>{cache[0]})
            return api.create_status(
                2, "CachedAttention: rows [B, S, 3HD], caches [B, H, C, D], mask [B, 1 or H, S, C] do not fit together");
        const std::int64_t* starts = static_cast<const std::int64_t*>(inputs[kWriteIndices].data);
        for (std::size_t image = 0; image < cache[0]; ++image)
            if (starts[image] < 0 || static_cast<std::size_t>(starts[image]) + rows[1] > cache[2])
                return api.create_status(2, "CachedAttention: a row would be written beyond its cache");
        Tensor joined, keys, values;
        if (ort::Status* status = make_output(api, context, 0, {rows[0], rows[1], rows[2] / 3}, joined)) return status;
        if (ort::Status* status = make_output(api, context, 1, cache, keys)) return status;
        if (ort::Status* status = make_output(api, context, 2, cache, values)) return status;
        const std::size_t bytes = keys.count() * sizeof(float);
        if (keys.data != inputs[kKeys].data) std::memcpy(keys.data, inputs[kKeys].data, bytes);
        if (values.data != inputs[kValues].data) std::memcpy(values.data, inputs[kValues].data, bytes);
        const CachedAttention attention = {static_cast<const float*>(inputs[kRows].data),
                                           static_cast<const float*>(inputs[kMask].data),
                                           starts,
                                           static_cast<float*>(keys.data),
                                           static_cast<float*>(values.data),
                                           static_cast<float*>(joined.data),
                                           rows[1],
                                           cache[1],
                                           cache[3],
                                           cache[2],
                                           mask[1],
                                           scale};
        Parallel parallel = {&api, context, nullptr};
        cached_attention(*path, attention, cache[0], {&parallel, Parallel::run});
        return parallel.status;
    }
};

}  // namespace

const ort::CustomOp* attention_operator() {
    static const ort::CustomOp op = describe<AttentionKernel>();
    return &op;
}

}  // namespace blip2rt
