// Which path runs.
#include "path.h"

#include <cstring>

namespace blip2rt {
namespace {

bool can_run(const Path& path) {
#ifdef BLIP2RT_X86
    if (&path == &avx2_path) return __builtin_cpu_supports("avx2");
#ifdef BLIP2RT_EMULATE
    if (&path == &vnni_path) return true;
#endif
    if (&path == &vnni_path) return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#endif
    return &path == &portable_path;
}

}  // namespace

const Path* find_path(const char* name) {
#ifdef BLIP2RT_X86
    const Path* const paths[] = {&vnni_path, &avx2_path, &portable_path};
#else
    const Path* const paths[] = {&portable_path};
#endif
    for (const Path* path : paths)
        if (can_run(*path) && (!name || std::strcmp(name, path->name) == 0)) return path;
    return nullptr;
}

}  // namespace blip2rt
