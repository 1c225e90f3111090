// What `deltamem architectures` asks: tiny models of the architectures that this build of llama.cpp knows, and adapters
// for them, so that no model file is needed to say whether an adapter can be attached. A library of its own, because it
// includes a test file of llama.cpp; only that command loads it. It uses the libllama beside it.
//
// Errors: as in llama-deltamem.h, and the reason is kept for llama_deltamem_last_error().
#pragma once

#include "llama.h"

#include <stdint.h>

#ifdef _WIN32
    #define DELTAMEM_ARCHITECTURES_API __declspec(dllexport)
#else
    #define DELTAMEM_ARCHITECTURES_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The name of the i-th architecture that this build of llama.cpp knows, NULL if there are no more.
DELTAMEM_ARCHITECTURES_API const char * deltamem_architecture_name(int32_t i);

// A tiny model of an architecture on the CPU, its weights zero, with the hyperparameters of llama.cpp's own tests. Free
// it with llama_model_free. Returns NULL if those tests make no such model, or if the architecture has no attention.
// llama.cpp checks such a model by assertion, here and when a context is made of it: call this in a process that may
// abort.
DELTAMEM_ARCHITECTURES_API struct llama_model * deltamem_tiny_model(const char * architecture);

// Writes an adapter of rank 1 for that model to `path`, its weights zero. It names layer `il` and corrects `heads`, a
// subset of "qkvo". Attaching it says whether the layer is supported, or aborts as above. Returns 0 or -1.
DELTAMEM_ARCHITECTURES_API int32_t deltamem_tiny_adapter(const struct llama_model * model, int32_t il,
                                                         const char * heads, const char * path);

#ifdef __cplusplus
}
#endif
