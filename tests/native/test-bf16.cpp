// Tests the products of deltamem-bf16.h through ggml: every type of weights, uneven shapes, corrections, 1 to 9 threads,
// which must not change a bit.
//
//     test-bf16         exits with 77 if the processor does not multiply BF16
//     test-bf16 time    tests nothing: times of a product, beside ggml's own

#include "deltamem-bf16.h"
#include "ggml-deltamem.h"
#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <chrono>
#include <memory>

// BF16 has 8 bits of mantissa: rounding changes an operand by 2^-8 of itself at most, and by the square of that over three
// on average of squares. Two operands; half as much again for sums of few products.
static constexpr double ROUNDED_TOL = 1.5 * 2 / (3 * 65536.0);

// Beside operands rounded as the kernel rounds them: float32 sums, and a weight in 2^15 whose float32 value, which ggml
// rounds once more than the kernel, lies at the edge between two in BF16.
static constexpr double EXACT_TOL = 1e-8;

struct freeing {
    void operator()(ggml_context * c) const { ggml_free(c); }
    void operator()(ggml_backend * b) const { ggml_backend_free(b); }
    void operator()(ggml_backend_buffer * b) const { ggml_backend_buffer_free(b); }
};

template <typename T> using owned = std::unique_ptr<T, freeing>;

static float as_bf16(float x) {
    return ggml_bf16_to_fp32(ggml_fp32_to_bf16(x));
}

static std::vector<float> normals(int64_t n, random_source & random) {
    std::vector<float> values(n);
    for (float & f : values) {
        f = random.normal();
    }
    return values;
}

// Random values in a tensor of float32.
static std::vector<float> fill(ggml_tensor * t, random_source & random) {
    const std::vector<float> values = normals(ggml_nelements(t), random);
    ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    return values;
}

// Random values in a weight of Q8_0. Returns them as they are stored.
static std::vector<float> fill_q8_0(ggml_tensor * t, random_source & random) {
    std::vector<float> values = normals(ggml_nelements(t), random);
    std::vector<char>  stored(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, values.data(), stored.data(), 0, t->ne[1], t->ne[0], nullptr);
    ggml_backend_tensor_set(t, stored.data(), 0, stored.size());
    ggml_get_type_traits(t->type)->to_float(stored.data(), values.data(), ggml_nelements(t));
    return values;
}

// What of its tensors a product takes. x_gap: values between two tokens of x.
struct parts {
    int64_t first_row = 0, first_in = 0; // of a greater weight
    int64_t x_gap = 0;
};

// dst = weight * x, with the weight in memory of a buffer type
class product {
public:
    product(ggml_type type, int64_t n_in, int64_t n_out, int64_t n_tokens, ggml_backend_buffer_type_t buft,
            uint64_t seed, parts p = {}) :
        n_in(n_in), n_out(n_out), n_tokens(n_tokens) {
        random_source random(seed);
        const int64_t all_in = n_in + p.first_in, all_out = n_out + p.first_row, x_row = n_in + p.x_gap;
        weights.reset(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        others.reset(ggml_init({ 6 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
        ggml_tensor * all   = ggml_new_tensor_2d(weights.get(), type, all_in, all_out);
        ggml_tensor * all_x = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, x_row, n_tokens);

        const size_t  offset = p.first_row * all->nb[1] + ggml_row_size(type, p.first_in);
        ggml_tensor * weight = ggml_view_2d(others.get(), all, n_in, n_out, all->nb[1], offset);
        ggml_tensor * x      = ggml_view_2d(others.get(), all_x, n_in, n_tokens, all_x->nb[1], p.x_gap * sizeof(float));
        dst   = ggml_mul_mat(others.get(), p.first_in || p.first_row ? weight : all, p.x_gap ? x : all_x);
        graph = ggml_new_graph(others.get());
        ggml_build_forward_expand(graph, dst);
        weight_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), buft));
        other_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(others.get(), ggml_backend_cpu_buffer_type()));

        const std::vector<float> w = normals(all_in * all_out, random), x_all = normals(x_row * n_tokens, random);
        std::vector<float>       stored_values(w.size());
        std::vector<char>        stored(ggml_nbytes(all));
        std::vector<float>       importance(all_in, 1.0f); // some types ask for it
        if (type == GGML_TYPE_F32) {
            memcpy(stored.data(), w.data(), stored.size());
            stored_values = w;
        } else {
            ggml_quantize_chunk(type, w.data(), stored.data(), 0, all_out, all_in, importance.data());
            for (int64_t row = 0; row < all_out; row++) {
                ggml_get_type_traits(type)->to_float(stored.data() + row * all->nb[1], &stored_values[row * all_in],
                                                     all_in);
            }
        }
        ggml_backend_tensor_set(all, stored.data(), 0, stored.size());
        ggml_backend_tensor_set(all_x, x_all.data(), 0, ggml_nbytes(all_x));
        for (int64_t row = p.first_row; row < all_out; row++) {
            const float * from = &stored_values[row * all_in + p.first_in];
            w_values.insert(w_values.end(), from, from + n_in);
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            const float * from = &x_all[t * x_row + p.x_gap];
            x_values.insert(x_values.end(), from, from + n_in);
        }
    }

    std::vector<float> compute(ggml_backend_t cpu, int n_threads) {
        const std::vector<float> guards(ggml_nelements(dst), guard_value());
        ggml_backend_tensor_set(dst, guards.data(), 0, ggml_nbytes(dst));
        ggml_backend_cpu_set_n_threads(cpu, n_threads);
        check(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "the graph is not computed");
        std::vector<float> y(ggml_nelements(dst));
        ggml_backend_tensor_get(dst, y.data(), 0, ggml_nbytes(dst));
        return y;
    }

    // The normalised mean square error of y; rounded: beside operands that are rounded to BF16.
    double error(const std::vector<float> & y, bool rounded) const {
        double wrong = 0.0, all = 0.0;
        for (int64_t t = 0; t < n_tokens; t++) {
            for (int64_t row = 0; row < n_out; row++) {
                double sum = 0.0;
                for (int64_t i = 0; i < n_in; i++) {
                    const float w = w_values[row * n_in + i], v = x_values[t * n_in + i];
                    sum += rounded ? (double) as_bf16(w) * as_bf16(v) : (double) w * v;
                }
                wrong += (y[t * n_out + row] - sum) * (y[t * n_out + row] - sum);
                all += sum * sum;
            }
        }
        return wrong / all;
    }

private:
    owned<ggml_context>        weights, others;
    owned<ggml_backend_buffer> weight_buffer, other_buffer;
    int64_t                    n_in, n_out, n_tokens;
    ggml_tensor *              dst;
    ggml_cgraph *              graph;
    std::vector<float>         w_values, x_values;
};

static bool is_same(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

static constexpr ggml_type TYPES[] = { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                       GGML_TYPE_Q8_0, GGML_TYPE_Q6_K, GGML_TYPE_BF16 };

static void test_type(ggml_backend_t cpu, ggml_type type) {
    static const struct {
        int64_t n_in, n_out, n_tokens;
    } shapes[] = {
        { 8, 1, 8 },      { 2, 31, 9 },   { 3, 32, 12 },   { 8, 33, 13 },   { 9, 100, 24 },
        { 10, 192, 131 }, { 16, 65, 37 }, { 1, 64, 66 },   { 2, 128, 50 },  { 2, 129, 8 },
        { 4, 161, 13 },   { 1, 225, 70 }, { 64, 161, 29 }, { 64, 192, 12 }, // too wide for all panels at once
    };
    uint64_t seed = 1000 * type;
    for (const auto & s : shapes) {
        // blocks of 32 also in rows that are no multiple of 256
        const int64_t n_in = s.n_in * std::max<int64_t>(ggml_blck_size(type), 32);
        product       ours(type, n_in, s.n_out, s.n_tokens, ggml_backend_deltamem_bf16_buffer_type(), ++seed);
        const auto    y    = ours.compute(cpu, 1);
        const double  near = ours.error(y, true), far = ours.error(y, false);
        check(near < EXACT_TOL, "%s [%d, %d] x %d: NMSE %g beside operands in BF16", ggml_type_name(type), (int) n_in,
              (int) s.n_out, (int) s.n_tokens, near);
        check(far < ROUNDED_TOL, "%s [%d, %d] x %d: NMSE %g", ggml_type_name(type), (int) n_in, (int) s.n_out,
              (int) s.n_tokens, far);
        for (const int n_threads : { 2, 3, 4, 9 }) {
            check(is_same(ours.compute(cpu, n_threads), y), "%s: %d threads change a bit", ggml_type_name(type),
                  n_threads);
        }
    }
}

// Parts of a weight, tokens that do not follow each other, and more threads than panels of rows.
static void test_parts(ggml_backend_t cpu, ggml_type type) {
    const int64_t block = std::max<int64_t>(ggml_blck_size(type), 32);
    const struct {
        int64_t n_out;
        parts   p;
        int64_t n_blocks = 3;
    } cases[] = {
        { 77, { 13, block, 0 } },
        { 5, { 0, 0, 7 } },
        { 40, { 1, 3 * block, 5 } },
        { 205, { 13, block, 7 }, 67 },
    };
    for (const auto & c : cases) {
        product    ours(type, c.n_blocks * block, c.n_out, 68, ggml_backend_deltamem_bf16_buffer_type(), 11, c.p);
        const auto y = ours.compute(cpu, 9);
        check(ours.error(y, true) < EXACT_TOL, "%s, a part of %d rows: NMSE %g", ggml_type_name(type), (int) c.n_out,
              ours.error(y, true));
        check(is_same(ours.compute(cpu, 1), y), "%s: 9 threads change a bit", ggml_type_name(type));
    }
}

// Corrections by weights in Q8_0, alone and with the addition that follows: beside operands in BF16, over 1 to 4 threads;
// fewer than eight tokens, and more than 64 columns, are float32's.
static void test_corrections(ggml_backend_t cpu) {
    static const struct {
        int64_t n_read, n_out, n_tokens;
        bool    in_bf16;
    } shapes[] = {
        { 32, 576, 8, true }, { 32, 33, 13, true },  { 64, 256, 12, true }, { 64, 289, 41, true },
        { 32, 1, 100, true }, { 64, 600, 25, true }, { 32, 576, 7, false }, { 96, 256, 12, false },
    };
    uint64_t seed = 77;
    for (const auto & s : shapes) {
        for (const bool with_addition : { false, true }) {
            random_source       random(++seed);
            owned<ggml_context> weights(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
            owned<ggml_context> others(
                    ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
            ggml_tensor * w      = ggml_new_tensor_2d(weights.get(), GGML_TYPE_Q8_0, s.n_read, s.n_out);
            ggml_tensor * out    = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, s.n_out, s.n_tokens);
            ggml_tensor * added  = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, s.n_out, s.n_tokens);
            ggml_tensor * read   = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, s.n_read, s.n_tokens);
            ggml_tensor * result = ggml_deltamem_correct(others.get(), out, w, read);
            if (with_addition) {
                result = ggml_add(others.get(), result, added);
            }
            ggml_cgraph * graph = ggml_new_graph(others.get());
            ggml_build_forward_expand(graph, result);
            owned<ggml_backend_buffer> a(
                    ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), ggml_backend_deltamem_bf16_buffer_type()));
            owned<ggml_backend_buffer> b(
                    ggml_backend_alloc_ctx_tensors_from_buft(others.get(), ggml_backend_cpu_buffer_type()));

            const auto         values = fill_q8_0(w, random), reads = fill(read, random), outs = fill(out, random),
                               addeds = fill(added, random);
            std::vector<float> first;
            for (int n_threads = 1; n_threads <= 4; n_threads++) {
                std::vector<float> y(ggml_nelements(result), guard_value());
                ggml_backend_tensor_set(result, y.data(), 0, ggml_nbytes(result));
                ggml_backend_cpu_set_n_threads(cpu, n_threads);
                check(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "the graph is not computed");
                ggml_backend_tensor_get(result, y.data(), 0, ggml_nbytes(result));
                if (n_threads == 1) {
                    first = y;
                }
                check(is_same(y, first), "a correction: %d threads change a bit", n_threads);
            }
            double in_bf16 = 0.0, in_float = 0.0, all = 0.0;
            for (int64_t t = 0; t < s.n_tokens; t++) {
                for (int64_t row = 0; row < s.n_out; row++) {
                    const int64_t at      = t * s.n_out + row;
                    const double  base    = outs[at] + (with_addition ? (double) addeds[at] : 0.0);
                    double        rounded = 0.0, exact = 0.0;
                    for (int64_t i = 0; i < s.n_read; i++) {
                        const float x = values[row * s.n_read + i], r = reads[t * s.n_read + i];
                        rounded += (double) as_bf16(x) * as_bf16(r);
                        exact += (double) x * r;
                    }
                    in_bf16 += (first[at] - base - rounded) * (first[at] - base - rounded);
                    in_float += (first[at] - base - exact) * (first[at] - base - exact);
                    all += exact * exact;
                }
            }
            check((s.in_bf16 ? in_bf16 : in_float) / all < EXACT_TOL, "a correction [%d, %d] x %d%s: NMSE %g",
                  (int) s.n_read, (int) s.n_out, (int) s.n_tokens, with_addition ? " and an addition" : "",
                  (s.in_bf16 ? in_bf16 : in_float) / all);
            check(in_float / all < ROUNDED_TOL, "a correction [%d, %d] x %d: NMSE %g beside float32", (int) s.n_read,
                  (int) s.n_out, (int) s.n_tokens, in_float / all);
        }
    }
}

// A correction, an addition, and the norm of the sum have the bits that a norm has in a graph of its own.
static void test_normed(ggml_backend_t cpu) {
    for (const int64_t n_tokens : { 8, 41, 500 }) {
        constexpr int64_t   N_READ = 64, N_OUT = 576;
        random_source       random(n_tokens);
        owned<ggml_context> weights(ggml_init({ ggml_tensor_overhead(), nullptr, true }));
        owned<ggml_context> others(
                ggml_init({ 16 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr, true }));
        const auto matrix = [&](int64_t n) { return ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, n, n_tokens); };
        const auto normed = [&](ggml_tensor * t, ggml_tensor * scales) {
            return ggml_mul(others.get(), ggml_rms_norm(others.get(), t, 1e-5f), scales);
        };
        ggml_tensor * w   = ggml_new_tensor_2d(weights.get(), GGML_TYPE_Q8_0, N_READ, N_OUT);
        ggml_tensor * out = matrix(N_OUT), *added = matrix(N_OUT), *read = matrix(N_READ), *copy = matrix(N_OUT);
        ggml_tensor * scales = ggml_new_tensor_1d(others.get(), GGML_TYPE_F32, N_OUT);
        ggml_tensor * sum    = ggml_add(others.get(), ggml_deltamem_correct(others.get(), out, w, read), added);
        ggml_tensor * both = normed(sum, scales), *alone = normed(copy, scales);
        ggml_cgraph * whole = ggml_new_graph(others.get()), *second = ggml_new_graph(others.get());
        ggml_build_forward_expand(whole, both);
        ggml_build_forward_expand(second, alone);
        owned<ggml_backend_buffer> a(
                ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), ggml_backend_deltamem_bf16_buffer_type()));
        owned<ggml_backend_buffer> b(
                ggml_backend_alloc_ctx_tensors_from_buft(others.get(), ggml_backend_cpu_buffer_type()));
        fill_q8_0(w, random);
        for (ggml_tensor * t : { out, added, read, scales }) {
            fill(t, random);
        }
        for (const int n_threads : { 1, 2, 3, 9 }) {
            std::vector<float> got(ggml_nelements(both), guard_value()), expected(got.size());
            ggml_backend_tensor_set(both, got.data(), 0, ggml_nbytes(both));
            ggml_backend_cpu_set_n_threads(cpu, n_threads);
            check(ggml_backend_graph_compute(cpu, whole) == GGML_STATUS_SUCCESS, "the graph is not computed");
            ggml_backend_tensor_get(both, got.data(), 0, ggml_nbytes(both));
            ggml_backend_tensor_get(sum, expected.data(), 0, ggml_nbytes(sum));
            ggml_backend_tensor_set(copy, expected.data(), 0, ggml_nbytes(copy));
            check(ggml_backend_graph_compute(cpu, second) == GGML_STATUS_SUCCESS, "the norm is not computed");
            ggml_backend_tensor_get(alone, expected.data(), 0, ggml_nbytes(alone));
            check(is_same(got, expected), "a correction of %d tokens, %d threads: its norm has other bits",
                  (int) n_tokens, n_threads);
        }
    }
}

// Products that follow each other share the work buffer, and wide ones the counter of panels: each waits for the one before.
static void test_chain(ggml_backend_t cpu) {
    const int64_t       sizes[] = { 256, 96, 2048, 256, 1056, 32, 512 }, n_tokens = 40; // the third and fourth are wide
    const int           n_links = 6;
    owned<ggml_context> weights(ggml_init({ n_links * ggml_tensor_overhead(), nullptr, true }));
    owned<ggml_context> others(ggml_init({ 10 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    ggml_tensor *       x = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, sizes[0], n_tokens);
    ggml_tensor *       y = x;
    for (int i = 0; i < n_links; i++) {
        ggml_tensor * w = ggml_new_tensor_2d(weights.get(), GGML_TYPE_Q8_0, sizes[i], sizes[i + 1]);
        y               = ggml_mul_mat(others.get(), w, y);
    }
    ggml_cgraph * graph = ggml_new_graph(others.get());
    ggml_build_forward_expand(graph, y);
    owned<ggml_backend_buffer> a(
            ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), ggml_backend_deltamem_bf16_buffer_type()));
    owned<ggml_backend_buffer> b(
            ggml_backend_alloc_ctx_tensors_from_buft(others.get(), ggml_backend_cpu_buffer_type()));
    random_source random(5);
    for (ggml_tensor * t = ggml_get_first_tensor(weights.get()); t; t = ggml_get_next_tensor(weights.get(), t)) {
        fill_q8_0(t, random);
    }
    fill(x, random);
    std::vector<float> first, now(ggml_nelements(y));
    for (int i = 0; i < 200; i++) {
        ggml_backend_cpu_set_n_threads(cpu, 1 + i % 4);
        ggml_backend_graph_compute(cpu, graph);
        ggml_backend_tensor_get(y, now.data(), 0, ggml_nbytes(y));
        if (i == 0) {
            first = now;
        }
        check(is_same(now, first), "a chain of products, %d threads: other bits", 1 + i % 4);
    }
}

// Two products of the same input, one after the other, have the bits that each has alone. The first is wide, or all its
// panels lie in the work buffer; the second is of another type, and may be left to ggml.
static void test_two(ggml_backend_t cpu) {
    static const struct {
        ggml_type types[2];
        int64_t   n_out[2];
        int64_t   n_tokens;
    } pairs[] = {
        { { GGML_TYPE_Q4_1, GGML_TYPE_Q8_0 }, { 300, 25 }, 40 },
        { { GGML_TYPE_BF16, GGML_TYPE_Q8_0 }, { 257, 200 }, 70 },
        { { GGML_TYPE_Q8_0, GGML_TYPE_Q6_K }, { 64, 300 }, 13 },
        { { GGML_TYPE_Q6_K, GGML_TYPE_Q6_K }, { 300, 300 }, 8 },
        { { GGML_TYPE_Q8_0, GGML_TYPE_F16 }, { 300, 25 }, 40 },
        { { GGML_TYPE_F16, GGML_TYPE_Q8_0 }, { 300, 25 }, 40 },
        { { GGML_TYPE_BF16, GGML_TYPE_Q8_0 }, { 300, 25 }, 20 },
        { { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 }, { 300, 25 }, 4 },
    };
    constexpr int64_t N_IN = 1024;
    for (const auto & pair : pairs) {
        random_source       random(5);
        owned<ggml_context> weights(ggml_init({ 2 * ggml_tensor_overhead(), nullptr, true }));
        owned<ggml_context> others(
                ggml_init({ 3 * ggml_tensor_overhead() + 3 * ggml_graph_overhead(), nullptr, true }));
        ggml_tensor * x = ggml_new_tensor_2d(others.get(), GGML_TYPE_F32, N_IN, pair.n_tokens);
        ggml_tensor * y[2];
        ggml_cgraph * alone[2];
        ggml_cgraph * both = ggml_new_graph(others.get());
        for (int i = 0; i < 2; i++) {
            ggml_tensor * w = ggml_new_tensor_2d(weights.get(), pair.types[i], N_IN, pair.n_out[i]);
            y[i]            = ggml_mul_mat(others.get(), w, x);
            alone[i]        = ggml_new_graph(others.get());
            ggml_build_forward_expand(alone[i], y[i]);
            ggml_build_forward_expand(both, y[i]);
        }
        owned<ggml_backend_buffer> a(
                ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), ggml_backend_deltamem_bf16_buffer_type()));
        owned<ggml_backend_buffer> b(
                ggml_backend_alloc_ctx_tensors_from_buft(others.get(), ggml_backend_cpu_buffer_type()));
        fill(x, random);
        for (ggml_tensor * w = ggml_get_first_tensor(weights.get()); w; w = ggml_get_next_tensor(weights.get(), w)) {
            const std::vector<float> values = normals(ggml_nelements(w), random);
            std::vector<char>        stored(ggml_nbytes(w));
            ggml_quantize_chunk(w->type, values.data(), stored.data(), 0, w->ne[1], N_IN, nullptr);
            ggml_backend_tensor_set(w, stored.data(), 0, stored.size());
        }
        const auto computed = [&](ggml_cgraph * graph, int i, int n_threads) {
            std::vector<float> values(ggml_nelements(y[i]), guard_value());
            ggml_backend_tensor_set(y[i], values.data(), 0, ggml_nbytes(y[i]));
            ggml_backend_cpu_set_n_threads(cpu, n_threads);
            check(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "the graph is not computed");
            ggml_backend_tensor_get(y[i], values.data(), 0, ggml_nbytes(y[i]));
            return values;
        };
        for (int i = 0; i < 2; i++) {
            const std::vector<float> expected = computed(alone[i], i, 1);
            for (const int n_threads : { 1, 2, 3, 9 }) {
                check(is_same(computed(both, i, n_threads), expected),
                      "%s [%d] and %s [%d] x %d, %d threads: product %d has other bits than alone",
                      ggml_type_name(pair.types[0]), (int) pair.n_out[0], ggml_type_name(pair.types[1]),
                      (int) pair.n_out[1], (int) pair.n_tokens, n_threads, i);
            }
        }
    }
}

// What is left to ggml is ggml's to the last bit: few tokens, and types that are no blocks.
static void test_left(ggml_backend_t cpu) {
    static const struct {
        ggml_type type;
        int64_t   n_tokens;
    } left[] = {
        { GGML_TYPE_Q4_1, 1 },  { GGML_TYPE_Q6_K, 7 }, { GGML_TYPE_Q8_0, 2 },    { GGML_TYPE_BF16, 63 },
        { GGML_TYPE_Q4_K, 40 }, { GGML_TYPE_F32, 40 }, { GGML_TYPE_IQ4_XS, 40 }, { GGML_TYPE_F16, 40 },
    };
    for (const auto & l : left) {
        product ours(l.type, 256, 48, l.n_tokens, ggml_backend_deltamem_bf16_buffer_type(), 7);
        product plain(l.type, 256, 48, l.n_tokens, ggml_backend_cpu_buffer_type(), 7);
        check(is_same(ours.compute(cpu, 2), plain.compute(cpu, 2)), "%s, %d tokens: is not ggml's",
              ggml_type_name(l.type), (int) l.n_tokens);
    }
    product ours(GGML_TYPE_Q4_1, 256, 48, 40, ggml_backend_deltamem_bf16_buffer_type(), 7);
    product plain(GGML_TYPE_Q4_1, 256, 48, 40, ggml_backend_cpu_buffer_type(), 7);
    check(!is_same(ours.compute(cpu, 2), plain.compute(cpu, 2)), "40 tokens are left to ggml");
}

static void time(ggml_backend_t cpu) {
    printf("%8s %6s %6s %6s %14s %14s %8s\n", "type", "in", "out", "tokens", "ours GFLOP/s", "ggml GFLOP/s", "ratio");
    for (const ggml_type type : TYPES) {
        for (const int64_t n_tokens : { 8, 32, 128, 512 }) {
            const int64_t n_in = 2048, n_out = 2048;
            double        rate[2] = { 0.0, 0.0 }; // the best of alternating runs
            product       both[2] = {
                { type, n_in, n_out, n_tokens, ggml_backend_deltamem_bf16_buffer_type(), 1 },
                { type, n_in, n_out, n_tokens, ggml_backend_cpu_buffer_type(), 1 },
            };
            for (int i = 0; i < 7; i++) {
                for (int j = 0; j < 2; j++) {
                    const auto begin = std::chrono::steady_clock::now();
                    both[j].compute(cpu, 1);
                    const std::chrono::duration<double> s = std::chrono::steady_clock::now() - begin;
                    rate[j] = std::max(rate[j], 2e-9 * n_in * n_out * n_tokens / s.count());
                }
            }
            printf("%8s %6d %6d %6d %14.0f %14.0f %8.2f\n", ggml_type_name(type), (int) n_in, (int) n_out,
                   (int) n_tokens, rate[0], rate[1], rate[0] / rate[1]);
        }
    }
}

int main(int argc, char ** argv) {
    if (!ggml_cpu_has_avx512_bf16()) {
        printf("skipped: the processor does not multiply BF16\n");
        return EXIT_SKIPPED;
    }
    owned<ggml_backend> cpu(ggml_backend_cpu_init());
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        time(cpu.get());
        return 0;
    }
    for (const ggml_type type : TYPES) {
        test_type(cpu.get(), type);
        test_parts(cpu.get(), type);
    }
    test_left(cpu.get());
    test_corrections(cpu.get());
    test_normed(cpu.get());
    test_chain(cpu.get());
    test_two(cpu.get());
    return finish("bf16");
}
