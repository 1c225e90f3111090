// The graphs that a thread knows (deltamem-known.h). Compiled into ggml-cpu.

#include "deltamem-known.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <algorithm>
#include <vector>

namespace {

struct known_graph {
    uint64_t          uid       = 0; // 0: of a graph without one, which nobody finds
    int               n_threads = 0; // of the plan; 0: there is none
    struct ggml_cplan plan      = {};

    std::vector<struct ggml_cpu_deltamem_fusion> fusions; // none: not decided yet
};

} // namespace

// those of several contexts that a thread computes in turn
static constexpr int N_GRAPHS = 8;

static thread_local struct known_graph graphs[N_GRAPHS]; // the last used first

// The graph, now the first, or NULL.
static struct known_graph * find(const struct ggml_cgraph * cgraph) {
    struct known_graph * const end  = graphs + N_GRAPHS;
    struct known_graph * const same = std::find_if(graphs, end, [cgraph](const struct known_graph & graph) {
        return cgraph->uid && graph.uid == cgraph->uid;
    });
    if (same == end) {
        return nullptr;
    }
    std::rotate(graphs, same, same + 1);
    return graphs;
}

// The same, but a graph that is not known takes the place of the one that was not used longest.
static struct known_graph * find_or_add(const struct ggml_cgraph * cgraph) {
    if (struct known_graph * graph = find(cgraph)) {
        return graph;
    }
    std::rotate(graphs, graphs + N_GRAPHS - 1, graphs + N_GRAPHS);
    graphs[0].uid       = cgraph->uid;
    graphs[0].n_threads = 0;
    graphs[0].fusions.clear();
    return graphs;
}

const struct ggml_cplan * ggml_cpu_deltamem_planned(const struct ggml_cgraph * cgraph, int n_threads) {
    const struct known_graph * graph = find(cgraph);
    return graph && graph->n_threads == n_threads ? &graph->plan : nullptr;
}

void ggml_cpu_deltamem_keep_plan(const struct ggml_cgraph * cgraph, int n_threads, const struct ggml_cplan * plan) {
    if (cgraph->uid) {
        struct known_graph * graph = find_or_add(cgraph);
        graph->n_threads           = n_threads;
        graph->plan                = *plan;
    }
}

const struct ggml_cpu_deltamem_fusion * ggml_cpu_deltamem_fusions(const struct ggml_cgraph * cgraph) {
    struct known_graph * graph = find_or_add(cgraph);
    if (graph->fusions.size() != (size_t) cgraph->n_nodes) {
        graph->fusions.resize(cgraph->n_nodes);
        ggml_cpu_deltamem_decide(cgraph, graph->fusions.data());
    }
    return graph->fusions.data();
}
