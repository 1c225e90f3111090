// Tests that the memory which the threads of a graph work in begins at a cache line, wherever its allocation begins, and
// ends with it. Vectors of flash attention are loaded from there; each of a whole line would lie in two
// (where-time-goes.md).

#include "testing.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <vector>

static constexpr size_t  LINE = 64;
static constexpr int64_t N_IN = 256;

// Where in its line the first byte lies that a product of weights in Q8_0 writes: its activation, in blocks of Q8_0.
static size_t first_byte_of_work(int n_threads, size_t offset) {
    ggml_context * ctx    = ggml_init({ 1 << 20, nullptr, false });
    ggml_tensor *  weight = ggml_new_tensor_2d(ctx, GGML_TYPE_Q8_0, N_IN, 32);
    ggml_tensor *  x      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, N_IN, 2);
    memset(weight->data, 0, ggml_nbytes(weight));
    std::fill_n((float *) x->data, ggml_nelements(x), 1.0f);

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_mul_mat(ctx, weight, x));

    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> memory(plan.work_size + 2 * LINE);
    uint8_t *            line = memory.data() + (LINE - (uintptr_t) memory.data() % LINE) % LINE;

    plan.work_data = line + offset;
    check(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "the product fails");
    const auto written = [](uint8_t byte) { return byte != 0; };
    const auto first   = std::find_if(memory.begin(), memory.end(), written);
    check(first != memory.end(), "the product does not write its activation");
    check(std::none_of(line + offset + plan.work_size, memory.data() + memory.size(), written),
          "%zu bytes from a line: work goes on after its memory", offset);
    ggml_free(ctx);
    return (uintptr_t) &*first % LINE;
}

// How many bytes behind its memory a graph changes whose node clears all of it.
static size_t cleared_behind_work(int n_threads, size_t offset) {
    ggml_context * ctx    = ggml_init({ 1 << 20, nullptr, false });
    ggml_tensor *  kernel = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 3, 4, 5);
    ggml_tensor *  x      = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 10, 5);
    std::fill_n((float *) kernel->data, ggml_nelements(kernel), 1.0f);
    std::fill_n((float *) x->data, ggml_nelements(x), 1.0f);

    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, ggml_conv_transpose_1d(ctx, kernel, x, 1, 0, 1));

    constexpr uint8_t GUARD = 0x5a;

    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> memory(plan.work_size + 4 * LINE, GUARD);
    uint8_t *            line = memory.data() + (LINE - (uintptr_t) memory.data() % LINE) % LINE;

    plan.work_data = line + offset;
    check(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "the convolution fails");
    check(*line == 0 || offset > 0, "the convolution does not clear its memory: the test tests nothing");
    const uint8_t * end = line + offset + plan.work_size;
    ggml_free(ctx);
    return std::count_if(end, (const uint8_t *) memory.data() + memory.size(), [](uint8_t b) { return b != GUARD; });
}

int main() {
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        for (const size_t offset : { size_t(0), size_t(16), size_t(48) }) {
            const size_t at = first_byte_of_work(n_threads, offset);
            check(at == 0, "%d threads, memory %zu bytes from a line: work begins %zu bytes from one", n_threads,
                  offset, at);
            const size_t behind = cleared_behind_work(n_threads, offset);
            check(behind == 0, "%d threads, memory %zu bytes from a line: %zu bytes behind it are changed", n_threads,
                  offset, behind);
        }
    }
    return finish("alignment of work");
}
