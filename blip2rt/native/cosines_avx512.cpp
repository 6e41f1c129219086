// A gallery's pass on x86 processors with AVX-512.
#include <immintrin.h>

#include "cosines.h"

namespace blip2rt {
namespace {

struct Avx512 {
    using Vector = __m512;
    static constexpr std::size_t kLanes = 16, kRows = 12;

    static Vector zero() { return _mm512_setzero_ps(); }
    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static Vector same(float value) { return _mm512_set1_ps(value); }
    static Vector add_product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
    static void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }

    static void widen(const std::uint16_t* half, std::size_t count, float* wide) {
        for (std::size_t i = 0; i < count; i += kLanes) {
            const std::size_t left = count - i;
            const __mmask16 mask = left < kLanes ? static_cast<__mmask16>((1u << left) - 1) : static_cast<__mmask16>(~0u);
            _mm512_mask_storeu_ps(wide + i, mask, _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, half + i)));
        }
    }
};

}  // namespace

void compare_avx512(const Gallery& gallery, const Queries& queries, float* out) {
    compare<Avx512>(gallery, queries, out);
}

}  // namespace blip2rt
