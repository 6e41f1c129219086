// The part of ONNX Runtime's C interface that this library uses, declared here because no wheel ships the headers.
//
// The interface is stable: a table of function pointers that only ever grows at its end, so a slot keeps its number for
// ever, and a struct for custom operators whose `version` says how many of its fields there are. The numbers below
// are those of the public header onnxruntime_c_api.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct CustomOpDomain;
struct SessionOptions;

constexpr std::uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

enum ElementType : int { kFloat = 1, kUInt8 = 2, kUInt16 = 4, kInt64 = 7 };

struct Api {
    const void* const* slots;

    template <typename Function>
    Function at(std::size_t slot) const {
        return reinterpret_cast<Function>(const_cast<void*>(slots[slot]));
    }
    Status* create_status(int code, const char* message) const {
        return at<Status* (*)(int, const char*)>(0)(code, message);
    }
    Status* create_domain(const char* name, CustomOpDomain** domain) const {
        return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, domain);
    }
    Status* add_op(CustomOpDomain* domain, const struct CustomOp* op) const {
        return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
        return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
    }
    Status* tensor_data(Value* value, void** data) const {
        return at<Status* (*)(Value*, void**)>(51)(value, data);
    }
    Status* dimensions_count(const ShapeInfo* info, std::size_t* count) const {
        return at<Status* (*)(const ShapeInfo*, std::size_t*)>(61)(info, count);
    }
    Status* dimensions(const ShapeInfo* info, std::int64_t* sizes, std::size_t count) const {
        return at<Status* (*)(const ShapeInfo*, std::int64_t*, std::size_t)>(62)(info, sizes, count);
    }
    Status* shape_info(const Value* value, ShapeInfo** info) const {
        return at<Status* (*)(const Value*, ShapeInfo**)>(65)(value, info);
    }
    Status* attribute(const KernelInfo* info, const char* name, float* number) const {
        return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, number);
    }
    Status* attribute(const KernelInfo* info, const char* name, std::int64_t* number) const {
        return at<Status* (*)(const KernelInfo*, const char*, std::int64_t*)>(86)(info, name, number);
    }
    Status* input(const KernelContext* context, std::size_t index, const Value** value) const {
        return at<Status* (*)(const KernelContext*, std::size_t, const Value**)>(90)(context, index, value);
    }
    Status* output(KernelContext* context, std::size_t index, const std::int64_t* shape, std::size_t rank,
                   Value** value) const {
        return at<Status* (*)(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>(91)(
            context, index, shape, rank, value);
    }
    void release(ShapeInfo* info) const { at<void (*)(ShapeInfo*)>(99)(info); }
    Status* parallel_for(const KernelContext* context, void (*body)(void*, std::size_t), std::size_t total,
                         void* data) const {
        using Body = void (*)(void*, std::size_t);
        return at<Status* (*)(const KernelContext*, Body, std::size_t, std::size_t, void*)>(274)(
            context, body, total, 0, data);
    }
};

struct ApiBase {
    const void* const* (*get_api)(std::uint32_t version);
    const char* (*version)();
};

// Field for field the struct of custom operators; what stays null is never called for an operator without variadic
// inputs.
struct CustomOp {
    std::uint32_t version;
    void* (*create_kernel)(const CustomOp*, const void* const*, const KernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*execution_provider)(const CustomOp*);
    ElementType (*input_type)(const CustomOp*, std::size_t);
    std::size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, std::size_t);
    std::size_t (*output_count)(const CustomOp*);
    void (*compute)(void*, KernelContext*);
    void (*destroy_kernel)(void*);
    int (*input_characteristic)(const CustomOp*, std::size_t);
    int (*output_characteristic)(const CustomOp*, std::size_t);
    int (*input_memory)(const CustomOp*, std::size_t);
    int (*variadic_input_min)(const CustomOp*);
    int (*variadic_input_same)(const CustomOp*);
    int (*variadic_output_min)(const CustomOp*);
    int (*variadic_output_same)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, const void* const*, const KernelInfo*, void**);
    Status* (*compute_v2)(void*, KernelContext*);
    Status* (*infer_shape)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    std::size_t (*may_inplace)(int**, int**);
    void (*release_may_inplace)(int*, int*);
    std::size_t (*alias_map)(int**, int**);
    void (*release_alias_map)(int*, int*);
};

}  // namespace ort
