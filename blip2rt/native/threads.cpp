// How the work is shared between threads.
#include <vector>

#include "path.h"

namespace blip2rt {
namespace {

constexpr std::size_t kRowsOfWork = 8;  // rounded by one thread at a time

// Tiles that are multiplied by one thread at a time: long stretches of memory for few rows, which wait for it; an even
// share of the work for many.
std::size_t tiles_of_work(std::size_t rows) { return rows > kRowsOfWork ? 4 : 8; }

struct Work {
    const Path* path;
    const Weight* weight;
    const float* x;
    Rounded rounded;
    float* y;
};

void round_rows(void* data, std::size_t i) {
    const Work& work = *static_cast<const Work*>(data);
    const std::size_t end = (i + 1) * kRowsOfWork < work.rounded.rows ? (i + 1) * kRowsOfWork : work.rounded.rows;
    for (std::size_t row = i * kRowsOfWork; row < end; ++row)
        work.path->round_row(*work.weight, work.x + row * work.weight->depth, row, work.rounded);
}

void multiply(void* data, std::size_t i) {
    const Work& work = *static_cast<const Work*>(data);
    const std::size_t tiles = work.weight->tiles(), at_once = tiles_of_work(work.rounded.rows);
    const std::size_t end = (i + 1) * at_once < tiles ? (i + 1) * at_once : tiles;
    work.path->multiply(*work.weight, work.rounded, i * at_once, end, work.y);
}

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

template <typename Attention>
bool for_each_head(void (*attend)(const Attention&, std::size_t), const Attention& attention, std::size_t images,
                   const Threads& threads) {
    struct Heads {
        void (*attend)(const Attention&, std::size_t);
        const Attention* attention;
    } heads = {attend, &attention};
    const auto body = [](void* data, std::size_t image_and_head) {
        const Heads& heads = *static_cast<const Heads*>(data);
        heads.attend(*heads.attention, image_and_head);
    };
    return threads.run(threads.context, body, images * attention.heads, &heads);
}

}  // namespace

bool quantized_matmul(const Path& path, const Weight& weight, const float* x, std::size_t rows, float* y,
                      const Threads& threads) {
    static thread_local std::vector<std::uint64_t> scratch;  // kept: a step calls this a hundred times
    const std::size_t groups = weight.groups();
    for (std::size_t row = 0; row < rows; row += kRowsAtOnce) {
        const std::size_t count = rows - row < kRowsAtOnce ? rows - row : kRowsAtOnce;
        const std::size_t cells = groups * count, bytes = cells * kGroup * path.value_bytes(weight.bits);
        scratch.resize(divide_up(bytes, 8) + cells);
        float* scales = reinterpret_cast<float*>(scratch.data() + divide_up(bytes, 8));
        const Rounded rounded = {scratch.data(), scales, reinterpret_cast<std::int32_t*>(scales + cells), count};
        Work work = {&path, &weight, x + row * weight.depth, rounded, y + row * weight.outputs};
        if (count <= kRowsOfWork)
            round_rows(&work, 0);
        else if (!threads.run(threads.context, round_rows, divide_up(count, kRowsOfWork), &work))
            return false;
        if (!threads.run(threads.context, multiply, divide_up(weight.tiles(), tiles_of_work(count)), &work)) return false;
    }
    return true;
}

bool cached_attention(const Path& path, const CachedAttention& attention, std::size_t images, const Threads& threads) {
    return for_each_head(path.attend, attention, images, threads);
}

bool quantized_attention(const Path& path, const QuantizedAttention& attention, std::size_t images, const Threads& threads) {
    return for_each_head(path.attend_quantized, attention, images, threads);
}

}  // namespace blip2rt
