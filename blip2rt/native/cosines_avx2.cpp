// A gallery's pass on x86 processors with AVX2, FMA and F16C.
#include <immintrin.h>

#include "cosines.h"

namespace blip2rt {
namespace {

struct Avx2 {
    using Vector = __m256;
    static constexpr std::size_t kLanes = 8, kRows = 6;

    static Vector zero() { return _mm256_setzero_ps(); }
    static Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static Vector same(float value) { return _mm256_set1_ps(value); }
    static Vector add_product(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
    static void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }

    static void widen(const std::uint16_t* half, std::size_t count, float* wide) {
        std::size_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
            _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
        for (; i < count; ++i) wide[i] = _cvtsh_ss(half[i]);
    }
};

}  // namespace

void compare_avx2(const Gallery& gallery, const Queries& queries, float* out) {
    compare<Avx2>(gallery, queries, out);
}

}  // namespace blip2rt
