// e^x, the same bits on every path; see `cached_attention.h`. Every path compiles it for its own instructions, so it is in
// an unnamed namespace.
#pragma once

#include <cstring>

namespace blip2rt {
namespace {

// e^x for x <= 0, to 2 units in the last place; below -87 as at -87. `Floats` is one of GCC's and Clang's vectors.
template <typename Floats>
inline Floats exponential(Floats x) {
    using Integers = decltype(x < x);
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
    x = x < -87.0f ? Floats{} - 87.0f : x;
    const Floats power = (x * 1.44269504f + kShift) - kShift;
    const Floats rest = (x - power * 0.693359375f) - power * -2.12194440e-4f;
    Floats series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = (series * (rest * rest) + rest) + 1.0f;
    const Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return series * scale;
}

}  // namespace
}  // namespace blip2rt
