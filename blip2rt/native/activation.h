// What follows a linear layer, the same bits on every path; see `quantized_matmul.h`. Every path compiles it for its own
// instructions, so it is in an unnamed namespace.
#pragma once

#include "quantized_matmul.h"

namespace blip2rt {
namespace {

// x * P(X <= x) of a standard normal X, to 2e-6: P(X <= x) - 0.5 as an odd rational function (a least-squares fit whose
// weights were moved until its error was even), clamped where it reaches 0.5. `Floats` is one of GCC's and Clang's vectors.
template <typename Floats>
inline Floats gelu(Floats x) {
    constexpr float kEnd = 5.2f;
    Floats z = x < -kEnd ? Floats{} - kEnd : x;
    z = z > kEnd ? Floats{} + kEnd : z;
    const Floats square = z * z;
    Floats above = square * -1.6164160e-8f + 5.3742074e-6f;
    above = above * square + 4.1179164e-4f;
    above = above * square + 6.0806409e-3f;
    above = above * square + 6.0276423e-2f;
    above = above * square + 3.9894187e-1f;
    Floats below = square * 1.3832100e-4f + 3.2533603e-3f;
    below = below * square + 4.3216560e-2f;
    below = below * square + 3.1774831e-1f;
    below = below * square + 1.0f;
    Floats part = z * above / below;
    part = part < -0.5f ? Floats{} - 0.5f : part;
    part = part > 0.5f ? Floats{} + 0.5f : part;
    return x * (part + 0.5f);
}

template <typename Floats>
inline Floats activate(Activation activation, Floats x) {
    if (activation == Activation::kGelu) return gelu(x);
    return activation == Activation::kRelu ? (x < 0.0f ? Floats{} : x) : x;
}

}  // namespace
}  // namespace blip2rt
