// What the custom operators for ONNX Runtime share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <vector>

#include "ort_abi.h"
#include "path.h"

namespace blip2rt {

constexpr int kVersion = 2;  // of the operators, which a graph asks for (`export/quantize.py`)

const ort::CustomOp* matmul_operator();
const ort::CustomOp* attention_operator();
const ort::CustomOp* quantized_attention_operator();

// The path that BLIP2RT_KERNELS asks for, or the best one; null where this processor cannot run it.
const Path* chosen_path();

// An input or output of a kernel.
struct Tensor {
    void* data = nullptr;
    std::vector<std::size_t> shape;

    std::size_t count() const {
        std::size_t product = 1;
        for (std::size_t size : shape) product *= size;
        return product;
    }
};

ort::Status* read_input(const ort::Api& api, const ort::KernelContext* context, std::size_t index, Tensor& tensor);
ort::Status* make_output(const ort::Api& api, ort::KernelContext* context, std::size_t index,
                         const std::vector<std::size_t>& shape, Tensor& tensor);

// ONNX Runtime's threads, for `Threads::context`.
struct Parallel {
    const ort::Api* api;
    ort::KernelContext* context;
    ort::Status* status;

    static bool run(void* parallel, void (*body)(void*, std::size_t), std::size_t count, void* data);
};

// An operator whose kernels are of type `Kernel`: a static `create(api, info, kernel)` and a member `compute(context)`.
template <typename Kernel>
ort::CustomOp describe() {
    ort::CustomOp op = {};
    op.version = ort::kApiVersion;
    op.name = [](const ort::CustomOp*) -> const char* { return Kernel::kName; };
    op.execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.input_type = [](const ort::CustomOp*, std::size_t i) { return Kernel::input_type(i); };
    op.input_count = [](const ort::CustomOp*) -> std::size_t { return Kernel::kInputs; };
    op.output_type = [](const ort::CustomOp*, std::size_t) { return ort::kFloat; };
    op.output_count = [](const ort::CustomOp*) -> std::size_t { return Kernel::kOutputs; };
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_characteristic = [](const ort::CustomOp*, std::size_t) { return 0; };   // required
    op.output_characteristic = [](const ort::CustomOp*, std::size_t) { return 0; };  // required
    op.input_memory = [](const ort::CustomOp*, std::size_t) { return 0; };           // the default allocator's
    op.create_kernel_v2 = [](const ort::CustomOp*, const void* const* slots, const ort::KernelInfo* info, void** kernel) {
        return Kernel::create({slots}, info, reinterpret_cast<Kernel**>(kernel));
    };
    op.compute_v2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
        const Kernel& self = *static_cast<const Kernel*>(kernel);
        try {
            return self.compute(context);
        } catch (const std::exception& error) {  // std::bad_alloc
            return self.api.create_status(1, error.what());
        }
    };
    op.start_version = [](const ort::CustomOp*) { return kVersion; };
    op.end_version = [](const ort::CustomOp*) { return kVersion; };
    return op;
}

}  // namespace blip2rt
