// What TensorRT's Python bindings link to: nothing at all, so that they can be imported, or NVIDIA's library for RTX,
// whose parser and builder need no GPU. The test compiles it once for each of the three libraries.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

typedef void *(*function)(void *, void *, void *, void *);

static void *forward(const char *variable, const char *name, void *a, void *b, void *c, void *d) {
    const char *path = getenv(variable);
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
    function found = library ? (function)dlsym(library, name) : NULL;
    return found ? found(a, b, c, d) : NULL;
}

#define FORWARD(variable, name) \
    void *name(void *a, void *b, void *c, void *d) { return forward(variable, #name, a, b, c, d); }

#if defined(NVINFER)
FORWARD("NVIDIA_BUILDER", createInferBuilder_INTERNAL)
FORWARD("NVIDIA_BUILDER", createInferRefitter_INTERNAL)
FORWARD("NVIDIA_BUILDER", createInferRuntime_INTERNAL)
FORWARD("NVIDIA_BUILDER", getBuilderPluginRegistry)
FORWARD("NVIDIA_BUILDER", getPluginRegistry)
#elif defined(NVONNXPARSER)
FORWARD("NVIDIA_PARSER", createNvOnnxParser_INTERNAL)
FORWARD("NVIDIA_PARSER", createNvOnnxParserRefitter_INTERNAL)
FORWARD("NVIDIA_PARSER", getNvOnnxParserVersion)
#else
int initLibNvInferPlugins(void *logger, const char *name) { return 1; }
#endif
