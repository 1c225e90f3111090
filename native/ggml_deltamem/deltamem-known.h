// What ggml-cpu works out for a graph before its threads begin: its plan, and which of its nodes are computed as one.
//
// Both need fields of every tensor, which the weights of the last token pushed out of the caches. So they are kept for a graph that is
// computed again: by its identifier (`uid`), which ggml's scheduler gives a graph whose tensors stay as and where they are. Graphs
// without one are looked at each time.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_cplan;

// What is computed with a node (ggml_cpu_deltamem_fuse)
enum ggml_cpu_deltamem_fused {
    DELTAMEM_SKIPPED,    // the node itself has nothing to compute
    DELTAMEM_SINGLE,     // nothing
    DELTAMEM_AHEAD,      // nothing; a correction and an addition follow, whose tensors are asked for
    DELTAMEM_PRODUCT,    // a projection, ahead of it
    DELTAMEM_PRODUCTS,   // a product of the same input
    DELTAMEM_PROJECTION, // a read, and perhaps a correction and a norm
    DELTAMEM_JOINED,     // the same, by a projection that was computed ahead of the product before it
    DELTAMEM_CORRECTION, // an addition, a norm, or both
};

// Distances are from the node; 0: there is none.
struct ggml_cpu_deltamem_fusion {
    uint8_t kind;       // enum ggml_cpu_deltamem_fused
    uint8_t correction; // of a read, if that is of one token
    uint8_t addition;
    uint8_t norm;
};

// The plan of a known graph for so many threads, or NULL: ggml makes one and keeps it.
const struct ggml_cplan * ggml_cpu_deltamem_planned(const struct ggml_cgraph * cgraph, int n_threads);
void ggml_cpu_deltamem_keep_plan(const struct ggml_cgraph * cgraph, int n_threads, const struct ggml_cplan * plan);

// One for each node, as ggml_cpu_deltamem_decide decides; valid until the calling thread has asked for eight other graphs.
const struct ggml_cpu_deltamem_fusion * ggml_cpu_deltamem_fusions(const struct ggml_cgraph * cgraph);
void ggml_cpu_deltamem_decide(const struct ggml_cgraph * cgraph, struct ggml_cpu_deltamem_fusion * fusions);

// Whether a node has nothing to compute, without a look at the node.
static inline bool ggml_cpu_deltamem_skips(const struct ggml_cpu_deltamem_fusion * fusions, int i) {
    return fusions[i].kind == DELTAMEM_SKIPPED;
}

#ifdef __cplusplus
}
#endif
