#include "operators.h"

#include <cstdlib>

namespace blip2rt {

const Path* chosen_path() { return find_path(std::getenv("BLIP2RT_KERNELS")); }

ort::Status* read_input(const ort::Api& api, const ort::KernelContext* context, std::size_t index, Tensor& tensor) {
    const ort::Value* value = nullptr;
    if (ort::Status* status = api.input(context, index, &value)) return status;
    if (ort::Status* status = api.tensor_data(const_cast<ort::Value*>(value), &tensor.data)) return status;
    ort::ShapeInfo* info = nullptr;
    if (ort::Status* status = api.shape_info(value, &info)) return status;
    std::size_t rank = 0;
    ort::Status* status = api.dimensions_count(info, &rank);
    std::vector<std::int64_t> sizes(rank);
    if (!status) status = api.dimensions(info, sizes.data(), rank);
    api.release(info);
    tensor.shape.assign(sizes.begin(), sizes.end());
    return status;
}

ort::Status* make_output(const ort::Api& api, ort::KernelContext* context, std::size_t index,
                         const std::vector<std::size_t>& shape, Tensor& tensor) {
    const std::vector<std::int64_t> sizes(shape.begin(), shape.end());
    ort::Value* value = nullptr;
    if (ort::Status* status = api.output(context, index, sizes.data(), sizes.size(), &value)) return status;
    tensor.shape = shape;
    return api.tensor_data(value, &tensor.data);
}

bool Parallel::run(void* context, void (*body)(void*, std::size_t), std::size_t count, void* data) {
    Parallel& parallel = *static_cast<Parallel*>(context);
    if (count == 1) {
        body(data, 0);
        return true;
    }
    parallel.status = parallel.api->parallel_for(parallel.context, body, count, data);
    return !parallel.status;
}

}  // namespace blip2rt
