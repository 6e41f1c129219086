// `blip2rt.QuantizedAttention`.
#include "operators.h"

namespace blip2rt {
namespace {

struct QuantizedAttentionKernel {
    static constexpr const char* kName = "QuantizedAttention";
    static constexpr std::size_t kInputs = 1, kOutputs = 1;
    static ort::ElementType input_type(std::size_t) { return ort::kFloat; }

    ort::Api api;
    const Path* path;
    std::size_t heads;
    float scale;

    static ort::Status* create(const ort::Api& api, const ort::KernelInfo* info, QuantizedAttentionKernel** kernel) {
        std::int64_t heads = 0;
        float scale = 0;
        if (ort::Status* status = api.attribute(info, "heads", &heads)) return status;
        if (ort::Status* status = api.attribute(info, "scale", &scale)) return status;
        if (heads < 1) return api.create_status(2, "QuantizedAttention: heads must be positive");
        const Path* path = chosen_path();
        if (!path) return api.create_status(2, "BLIP2RT_KERNELS names no path that this processor can run");
        *kernel = new QuantizedAttentionKernel{api, path, static_cast<std::size_t>(heads), scale};
        return nullptr;
    }

    ort::Status* compute(ort::KernelContext* context) const {
        Tensor rows, joined;
        if (ort::Status* status = read_input(api, context, 0, rows)) return status;
        const std::vector<std::size_t>& shape = rows.shape;
        if (shape.size() != 3 || shape[1] < 1 || shape[1] > kMostRows || shape[2] < 1 || shape[2] % (3 * heads))
            return api.create_status(2, "QuantizedAttention: rows must be [B, T, 3 * heads * d], T at most 32768");
        const std::size_t layer = shape[2] / 3;
        if (ort::Status* status = make_output(api, context, 0, {shape[0], shape[1], layer}, joined)) return status;
        const QuantizedAttention attention = {static_cast<const float*>(rows.data),
                                              static_cast<float*>(joined.data),
                                              shape[1],
                                              heads,
                                              layer / heads,
                                              scale};
        Parallel parallel = {&api, context, nullptr};
        quantized_attention(*path, attention, shape[0], {&parallel, Parallel::run});
        return parallel.status;
    }
};

}  // namespace

const ort::CustomOp* quantized_attention_operator() {
    static const ort::CustomOp op = describe<QuantizedAttentionKernel>();
    return &op;
}

}  // namespace blip2rt
