// `blip2rt.QuantizedMatMul`. It reads its weights where ONNX Runtime has mapped them: nothing is copied or repacked, so a
// model loads at once and its pages belong to the file.
#include "operators.h"

namespace blip2rt {
namespace {

struct MatMulKernel {
    enum Input : std::size_t { kX, kPacked, kScales, kBias, kInputs };
    static constexpr const char* kName = "QuantizedMatMul";
    static constexpr std::size_t kOutputs = 1;
    static ort::ElementType input_type(std::size_t i) {
        return i == kPacked ? ort::kUInt8 : i == kScales ? ort::kUInt16 : ort::kFloat;
    }

    ort::Api api;
    const Path* path;
    std::size_t outputs, depth;
    int bits;
    Activation activation;

    static ort::Status* create(const ort::Api& api, const ort::KernelInfo* info, MatMulKernel** kernel) {
        std::int64_t outputs = 0, depth = 0, bits = 0, activation = 0;
        if (ort::Status* status = api.attribute(info, "N", &outputs)) return status;
        if (ort::Status* status = api.attribute(info, "K", &depth)) return status;
        if (ort::Status* status = api.attribute(info, "bits", &bits)) return status;
        if (ort::Status* status = api.attribute(info, "activation", &activation)) return status;
        if (outputs < 1 || depth < 1 || (bits != 4 && bits != 8) || activation < 0 || activation > 2)
            return api.create_status(2, "QuantizedMatMul: N and K must be positive, bits 4 or 8, activation 0, 1 or 2");
        const Path* path = chosen_path();
        if (!path) return api.create_status(2, "BLIP2RT_KERNELS names no path that this processor can run");
        *kernel = new MatMulKernel{api, path, static_cast<std::size_t>(outputs), static_cast<std::size_t>(depth),
                                   static_cast<int>(bits), static_cast<Activation>(activation)};
        return nullptr;
    }

    ort::Status* compute(ort::KernelContext* context) const {
        Tensor inputs[kInputs], y;
        for (std::size_t i = 0; i < kInputs; ++i)
            if (ort::Status* status = read_input(api, context, i, inputs[i])) return status;
        const Weight weight = {static_cast<const std::uint8_t*>(inputs[kPacked].data),
                               static_cast<const std::uint16_t*>(inputs[kScales].data),
                               static_cast<const float*>(inputs[kBias].data),
                               outputs,
                               depth,
                               bits,
                               activation};
        std::vector<std::size_t> shape = inputs[kX].shape;
        if (shape.empty() || shape.back() != depth ||
            inputs[kPacked].count() != weight.tiles() * weight.tile_bytes() ||
            inputs[kScales].count() != weight.tiles() * weight.groups() * kTile || inputs[kBias].count() != outputs)
            return api.create_status(2, "QuantizedMatMul: an input has not the size that N, K and bits ask for");
        shape.back() = outputs;
        if (ort::Status* status = make_output(api, context, 0, shape, y)) return status;
        Parallel parallel = {&api, context, nullptr};
        quantized_matmul(*path, weight, static_cast<const float*>(inputs[kX].data), y.count() / outputs,
                         static_cast<float*>(y.data), {&parallel, Parallel::run});
        return parallel.status;
    }
};

}  // namespace

const ort::CustomOp* matmul_operator() {
    static const ort::CustomOp op = describe<MatMulKernel>();
    return &op;
}

}  // namespace blip2rt
