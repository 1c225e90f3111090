// Tests RMS norms through ggml, alone and with the multiplication after them, beside its formula one row after the other:
// the same bits, by 1 to 4 threads. Rows that fill no group of 16, of no whole vectors, apart in memory, and in place.

#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <vector>

static constexpr float EPS = 1e-5f;

struct shape {
    int64_t n, n1, n2, n3;
    int64_t w1 = 1, w2 = 1; // rows of weights, which repeat
    int64_t gap      = 0;   // values between two rows of x
    bool    in_place = false;
    bool    w_first  = false; // w * norm
};

static const shape SHAPES[] = {
    { 576, 512, 1, 1 },
    { 1024, 33, 1, 1 },
    { 128, 16, 7, 1 },
    { 64, 9, 5, 3, 9 },
    { 16, 100, 2, 1, 1, 2 },
    { 2560, 1, 1, 1 },
    { 128, 8, 1, 1 },
    { 256, 3, 1, 2 },
    { 100, 20, 2, 1 }, // no whole vectors: ggml's
    { 32, 21, 3, 1, 1, 1, 5 },
    { 96, 50, 1, 1, 1, 1, 0, true },
    { 64, 37, 1, 1, 37, 1, 0, false, true },
};

static void fill(ggml_tensor * t, random_source & random) {
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        ((float *) t->data)[i] = random.normal() * std::exp(random.uniform(-4.0f, 4.0f));
    }
}

// dst = x / sqrt(mean(x²) + eps) [* w], added in double from first to last
static void expected_row(const float * x, const float * w, int64_t n, float * y) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const float square = x[i] * x[i];
        sum += (double) square;
    }
    const float mean  = sum / n;
    const float scale = 1.0f / sqrtf(mean + EPS);
    for (int64_t i = 0; i < n; i++) {
        const float scaled = x[i] * scale;
        y[i]               = w ? scaled * w[i] : scaled;
    }
}

static void test(ggml_backend_t cpu, const shape & s, bool multiplied) {
    random_source  random(s.n + s.n1);
    ggml_context * ctx = ggml_init({ size_t(16) << 20, nullptr, false });
    ggml_tensor *  all = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.n + s.gap, s.n1, s.n2, s.n3);
    ggml_tensor *  w   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.n, s.w1, s.w2);
    fill(all, random);
    fill(w, random);
    const std::vector<float> before((float *) all->data, (float *) all->data + ggml_nelements(all));

    ggml_tensor * x     = ggml_view_4d(ctx, all, s.n, s.n1, s.n2, s.n3, all->nb[1], all->nb[2], all->nb[3], 0);
    ggml_tensor * norm  = s.in_place ? ggml_rms_norm_inplace(ctx, x, EPS) : ggml_rms_norm(ctx, x, EPS);
    ggml_tensor * y     = !multiplied ? norm : s.in_place ? ggml_mul_inplace(ctx, norm, w) : ggml_mul(ctx, norm, w);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);

    std::vector<float> right(s.n * s.n1 * s.n2 * s.n3);
    for (int64_t r = 0; r < s.n1 * s.n2 * s.n3; r++) {
        const int64_t i1 = r % s.n1, i2 = r / s.n1 % s.n2;
        const float * weights = (const float *) w->data + s.n * (i1 % s.w1 + s.w1 * (i2 % s.w2));
        expected_row(&before[r * (s.n + s.gap)], multiplied ? weights : nullptr, s.n, &right[r * s.n]);
    }
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        memcpy(all->data, before.data(), ggml_nbytes(all));
        if (!s.in_place) {
            std::fill_n((float *) y->data, ggml_nelements(y), guard_value());
        }
        ggml_backend_cpu_set_n_threads(cpu, n_threads);
        check(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "the graph is not computed");
        check(memcmp(y->data, right.data(), right.size() * sizeof(float)) == 0,
              "%d rows of %d%s, %d threads: other bits than the formula's", (int) (s.n1 * s.n2 * s.n3), (int) s.n,
              multiplied ? ", multiplied" : "", n_threads);
    }
    ggml_free(ctx);
}

int main() {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    for (const shape & s : SHAPES) {
        test(cpu, s, false);
        test(cpu, s, true);
    }
    ggml_backend_free(cpu);
    return finish("norm");
}
