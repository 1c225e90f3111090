// Tests which nodes the CPU computes as one (deltamem-fuse.cpp), where the allocator gave a tensor memory of another. Each of two
// tensors that may not share memory keeps nodes apart, however little they share; memory that they only touch does not.
//
// The decision itself is looked at: what a wrong one does to results depends on when threads run.

#include "deltamem-known.h"
#include "ggml-deltamem.h"
#include "ggml.h"
#include "shape.h"
#include "testing.h"

#include <functional>
#include <initializer_list>
#include <memory>

static constexpr int64_t N_EMBD = 64, N_OUT = 64;

struct freeing {
    void operator()(ggml_context * c) const { ggml_free(c); }
};

// A graph whose tensors have memory of their own, far from each other.
class graph {
public:
    graph() : ctx(ggml_init({ 1 << 22, nullptr, false })) {}

    ggml_tensor * matrix(int64_t n, int64_t rows, ggml_type type = GGML_TYPE_F32) {
        return apart(ggml_new_tensor_2d(ctx.get(), type, n, rows));
    }

    // the last of these is the end of the graph
    void end(std::initializer_list<ggml_tensor *> nodes) {
        cgraph = ggml_new_graph(ctx.get());
        for (ggml_tensor * node : nodes) {
            ggml_build_forward_expand(cgraph, apart(node));
        }
    }

    // what is decided for a node
    ggml_cpu_deltamem_fusion of(const ggml_tensor * node) const {
        std::vector<ggml_cpu_deltamem_fusion> fusions(ggml_graph_n_nodes(cgraph));
        ggml_cpu_deltamem_decide(cgraph, fusions.data());
        for (int i = 0; i < ggml_graph_n_nodes(cgraph); ++i) {
            if (ggml_graph_node(cgraph, i) == node) {
                return fusions[i];
            }
        }
        check(false, "a node is not in the graph");
        return {};
    }

    ggml_context * context() { return ctx.get(); }

private:
    static constexpr size_t PART = 1 << 20; // more than any tensor here has

    std::unique_ptr<ggml_context, freeing> ctx;
    ggml_cgraph *                          cgraph = nullptr;
    char *                                 next   = (char *) PART; // nothing is computed: memory that nobody has

    ggml_tensor * apart(ggml_tensor * t) {
        if (!t->view_src) {
            t->data = next;
            next += PART;
        }
        return t;
    }
};

// Whether nodes that are computed as one are so no longer if `t` and `other` share their first or last bytes, and still are if
// they touch. `at_once`: whether they may have the same place.
static void check_apart(const char * what, ggml_tensor * t, ggml_tensor * other, const std::function<bool()> & is_one,
                        bool at_once = false) {
    void * const data  = t->data;
    char * const place = (char *) other->data;
    const size_t size = ggml_nbytes(t), other_size = ggml_nbytes(other);

    check(is_one(), "%s: not computed as one, though all lie apart", what);
    const auto at = [&](const char * how, char * where, bool expected) {
        t->data = where;
        check(is_one() == expected, "%s: %s as one where they %s", what, expected ? "not computed" : "computed", how);
    };
    at("touch at the beginning", place - size, true);
    at("share the first bytes", place - size + sizeof(float), false);
    at("share the last bytes", place + other_size - sizeof(float), false);
    at("touch at the end", place + other_size, true);
    at("have the same place", place, at_once);
    t->data = data;
}

// The same of each two, by name.
struct pair {
    const char *  what;
    ggml_tensor * t;
    ggml_tensor * other;
    bool          at_once = false;
};

static void check_apart(std::initializer_list<pair> pairs, const std::function<bool()> & is_one) {
    for (const pair & each : pairs) {
        check_apart(each.what, each.t, each.other, is_one, each.at_once);
    }
}

// product; projection, read, correction, norm, weights: of one token. Without `has_product` the projection comes first.
static void test_projection(bool has_product) {
    const ggml_deltamem_params p = params_of({ 8, 2, 1, 1, GGML_DELTAMEM_LAMBDA_COUPLED, GGML_DELTAMEM_NORMALIZE_QK });

    graph          g;
    ggml_context * ctx     = g.context();
    ggml_tensor *  input   = g.matrix(N_EMBD, 1);
    ggml_tensor *  wide    = g.matrix(N_EMBD, 96);
    ggml_tensor *  weight  = g.matrix(N_EMBD, ggml_deltamem_n_proj(&p));
    ggml_tensor *  bias    = g.matrix(ggml_deltamem_n_gates(&p), 1);
    ggml_tensor *  state   = g.matrix(p.n_head * ggml_deltamem_n_record(&p), 1);
    ggml_tensor *  plan    = g.matrix(ggml_deltamem_n_plan(1, 1), 1, GGML_TYPE_I32);
    ggml_tensor *  out     = g.matrix(N_OUT, 1);
    ggml_tensor *  delta   = g.matrix(N_OUT, p.n_head * p.rank);
    ggml_tensor *  scales  = g.matrix(N_OUT, 1);
    ggml_tensor *  product = ggml_mul_mat(ctx, wide, input);
    ggml_tensor *  proj    = ggml_deltamem_mul_mat(ctx, weight, input);
    ggml_tensor *  read    = ggml_deltamem(ctx, proj, bias, state, plan, p);
    ggml_tensor *  correct = ggml_deltamem_correct(ctx, out, delta, read);
    ggml_tensor *  norm    = ggml_rms_norm(ctx, correct, 1e-6f);
    ggml_tensor *  mul     = ggml_mul(ctx, norm, scales);
    if (has_product) {
        g.end({ product, proj, read, correct, norm, mul });
        const auto joined = [&] {
            const bool is_one = g.of(product).kind == DELTAMEM_PRODUCT;
            check(g.of(proj).kind == (is_one ? DELTAMEM_JOINED : DELTAMEM_PROJECTION),
                  "a projection and the product before it are decided apart from each other");
            return is_one;
        };
        check_apart({ { "projection, product", proj, product },
                      { "projection, the product's weights", proj, wide },
                      { "projection, the product's input", proj, input },
                      { "product, the projection's weights", product, weight },
                      { "product, states", product, state },
                      { "product, plan", product, plan } },
                    joined);
    } else {
        g.end({ proj, read, correct, norm, mul });
    }
    const int with_product = has_product ? 1 : 0;

    const auto corrects = [&] {
        const bool is_one = g.of(proj).correction == 2;
        check(!with_product || g.of(product).kind != DELTAMEM_PRODUCT || g.of(product).correction == (is_one ? 3 : 0),
              "a product knows another correction than its projection");
        return is_one;
    };
    check_apart({ { "correction, projection", correct, proj },
                  { "correction, gate bias", correct, bias },
                  { "correction, states", correct, state },
                  { "correction, plan", correct, plan },
                  { "projection, states", proj, state },
                  { "projection, plan", proj, plan },
                  { "corrected, read", out, read },
                  { "corrected, states", out, state },
                  { "the correction's weights, read", delta, read },
                  { "the correction's weights, states", delta, state } },
                corrects);

    const auto norms = [&] { return g.of(proj).correction == 2 && g.of(proj).norm == 3; };
    if (!norms()) {
        printf("no norm is computed with a correction here\n");
        return;
    }
    check_apart({ { "normed, weights", mul, scales },
                  { "correction, the norm's weights", scales, correct },
                  { "normed, correction", mul, correct, true },
                  { "normed, corrected", mul, out, true },
                  { "normed, the correction's weights", mul, delta },
                  { "normed, read", mul, read },
                  { "normed, projection", mul, proj },
                  { "normed, gate bias", mul, bias },
                  { "normed, states", mul, state },
                  { "normed, plan", mul, plan },
                  { "the norm's weights, the correction's", scales, delta },
                  { "the norm's weights, read", scales, read },
                  { "the norm's weights, projection", scales, proj },
                  { "the norm's weights, gate bias", scales, bias },
                  { "the norm's weights, states", scales, state },
                  { "the norm's weights, plan", scales, plan } },
                norms);
}

// correction, addition, norm, weights
static void test_correction(bool is_added, bool is_first) {
    constexpr int64_t N_TOKENS = 40, N_READ = 16;

    graph          g;
    ggml_context * ctx     = g.context();
    ggml_tensor *  out     = g.matrix(N_OUT, N_TOKENS);
    ggml_tensor *  delta   = g.matrix(N_OUT, N_READ);
    ggml_tensor *  read    = g.matrix(N_READ, N_TOKENS);
    ggml_tensor *  other   = g.matrix(N_OUT, N_TOKENS);
    ggml_tensor *  scales  = g.matrix(N_OUT, 1);
    ggml_tensor *  correct = ggml_deltamem_correct(ctx, out, delta, read);
    ggml_tensor *  last    = correct;
    if (is_added) {
        last = is_first ? ggml_add(ctx, correct, other) : ggml_add(ctx, other, correct);
    }
    ggml_tensor * norm = ggml_rms_norm(ctx, last, 1e-6f);
    ggml_tensor * mul  = ggml_mul(ctx, norm, scales);
    if (is_added) {
        g.end({ correct, last, norm, mul });
        check_apart({ { "sum, corrected", last, out, true },
                      { "sum, added", last, other, true },
                      { "sum, weights", last, delta },
                      { "sum, read", last, read } },
                    [&] { return g.of(correct).addition == 1; });
    } else {
        g.end({ correct, norm, mul });
    }
    const int  at    = is_added ? 2 : 1;
    const auto norms = [&] { return g.of(correct).kind == DELTAMEM_CORRECTION && g.of(correct).norm == at; };
    if (!norms()) {
        return; // as above
    }
    check_apart({ { "normed, weights", mul, scales },
                  { "sum, the norm's weights", scales, last },
                  { "normed, sum", mul, last, true },
                  { "normed, corrected", mul, out, true },
                  { "normed, the correction's weights", mul, delta },
                  { "normed, read", mul, read },
                  { "the norm's weights, the correction's", scales, delta },
                  { "the norm's weights, read", scales, read } },
                norms);
    if (is_added) {
        check_apart("normed, added", mul, other, norms, true);
    }
}

// two products of an input
static void test_products() {
    constexpr int64_t N_TOKENS = 40;

    graph         g;
    ggml_tensor * input  = g.matrix(N_EMBD, N_TOKENS);
    ggml_tensor * one    = g.matrix(N_EMBD, 96);
    ggml_tensor * two    = g.matrix(N_EMBD, 32);
    ggml_tensor * first  = ggml_mul_mat(g.context(), one, input);
    ggml_tensor * second = ggml_mul_mat(g.context(), two, input);
    g.end({ first, second });
    check_apart({ { "second product, first", second, first },
                  { "second product, the first one's weights", second, one },
                  { "second product, input", second, input },
                  { "first product, the second one's weights", first, two } },
                [&] { return g.of(first).kind == DELTAMEM_PRODUCTS; });
}

int main() {
    test_projection(false);
    test_projection(true);
    test_correction(false, false);
    test_correction(true, true);
    test_correction(true, false);
    test_products();
    return finish("nodes computed as one");
}
