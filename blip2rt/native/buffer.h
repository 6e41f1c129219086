// Memory of one thread, in place of std::vector: the functions of that would be compiled for the instructions of every
// path, and the linker would keep one of them for all, on any processor. So everything here is in an unnamed namespace.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

namespace blip2rt {
namespace {

template <typename T>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Room for `count`; what was there is lost where there was room for less.
    void reserve(std::size_t count) {
        if (count > count_) renew(count, 0);
    }
    // `count` new ones, each byte of them the same.
    void renew(std::size_t count, int byte) {
        constexpr std::size_t kLine = 64;
        const std::size_t bytes = (count * sizeof(T) + kLine) / kLine * kLine;
        std::free(data_);
        count_ = 0;
        data_ = static_cast<T*>(std::aligned_alloc(kLine, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_), byte, bytes);
        count_ = count;
    }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }

  private:
    T* data_ = nullptr;
    std::size_t count_ = 0;
};

}  // namespace
}  // namespace blip2rt
