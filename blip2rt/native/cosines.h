// The pass of a search over a gallery: out [rows, C] = the largest of the products of a row's vectors with each query.
//
// Rows are [rows, Q, E] in float16 as they lie in the file, queries [C, E] in float32. Products are fused, so their last
// bits are not those of the Python twin (`widened` and a matrix product in gallery_scan.py), and a row's do not depend
// on what lies beside it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "buffer.h"

namespace blip2rt {

struct Gallery {
    const std::uint16_t* half;
    std::size_t rows, per_row, width;  // Q and E
};

struct Queries {
    const float* values;
    std::size_t count;  // C
};

using Compare = void (*)(const Gallery& gallery, const Queries& queries, float* out);

#ifdef BLIP2RT_X86
void compare_avx2(const Gallery& gallery, const Queries& queries, float* out);
void compare_avx512(const Gallery& gallery, const Queries& queries, float* out);
#endif

// Vectors of `Isa` hold kLanes floats; kParts of them stand for kParts * kLanes queries, kRows rows are multiplied at a
// time. Products are added up in the order of the width, whatever the sizes: a query's do not depend on the others.
template <class Isa, std::size_t kParts>
void compare_rows(const Gallery& gallery, const Queries& queries, float* out) {
    constexpr std::size_t kColumns = kParts * Isa::kLanes, kRows = Isa::kRows;
    using Vector = typename Isa::Vector;
    const std::size_t width = gallery.width, count = queries.count, vectors = gallery.rows * gallery.per_row;
    const std::size_t tiles = (count + kColumns - 1) / kColumns;
    static thread_local Buffer<float> scratch;
    const std::size_t size = tiles * width * kColumns + kRows * width;
    scratch.reserve(size);
    float* const packed = &scratch[0];  // [tiles][E][kColumns]
    float* const wide = packed + tiles * width * kColumns;
    std::memset(packed, 0, size * sizeof *packed);
    for (std::size_t c = 0; c < count; ++c)
        for (std::size_t e = 0; e < width; ++e)
            packed[(c / kColumns * width + e) * kColumns + c % kColumns] = queries.values[c * width + e];
    for (std::size_t i = 0; i < gallery.rows * count; ++i) out[i] = -INFINITY;
    for (std::size_t first = 0; first < vectors; first += kRows) {
        const std::size_t here = vectors - first < kRows ? vectors - first : kRows;
        Isa::widen(gallery.half + first * width, here * width, wide);
        for (std::size_t tile = 0; tile < tiles; ++tile) {
            Vector sums[kRows][kParts];
            for (std::size_t r = 0; r < kRows; ++r)
                for (std::size_t p = 0; p < kParts; ++p) sums[r][p] = Isa::zero();
            const float* columns = packed + tile * width * kColumns;
            for (std::size_t e = 0; e < width; ++e, columns += kColumns) {
                Vector parts[kParts];
                for (std::size_t p = 0; p < kParts; ++p) parts[p] = Isa::load(columns + p * Isa::kLanes);
                for (std::size_t r = 0; r < kRows; ++r) {
                    const Vector value = Isa::same(wide[r * width + e]);
                    for (std::size_t p = 0; p < kParts; ++p) sums[r][p] = Isa::add_product(value, parts[p], sums[r][p]);
                }
            }
            const std::size_t start = tile * kColumns, used = count - start < kColumns ? count - start : kColumns;
            for (std::size_t r = 0; r < here; ++r) {
                float found[kColumns];
                for (std::size_t p = 0; p < kParts; ++p) Isa::store(found + p * Isa::kLanes, sums[r][p]);
                float* best = out + (first + r) / gallery.per_row * count + start;
                for (std::size_t c = 0; c < used; ++c) best[c] = found[c] > best[c] ? found[c] : best[c];
            }
        }
    }
}

template <class Isa>
void compare(const Gallery& gallery, const Queries& queries, float* out) {
    (queries.count > Isa::kLanes ? compare_rows<Isa, 2> : compare_rows<Isa, 1>)(gallery, queries, out);
}

}  // namespace blip2rt
