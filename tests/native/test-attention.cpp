// Tests flash attention of prompts through ggml beside a naive one in double: whole and partial tiles, shared heads, masks,
// and what deltamem-attention.h leaves to ggml. 1 to 4 threads must not change a bit.
//
//     test-attention              tests
//     test-attention fingerprint  prints a checksum of each result: the same by a library without deltamem-attention.h

#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <vector>

// Sums of a thousand products in float32, and exponentials.
static constexpr double TOL = 1e-11;

struct shape {
    int64_t n_qk, n_v, n_queries, n_keys, n_heads, n_kv_heads, n_seqs;
    bool    half, masked;
    float   max_bias = 0.0f, cap = 0.0f;
};

static const shape SHAPES[] = {
    { 64, 64, 512, 512, 9, 3, 1, true, true },
    { 128, 128, 128, 256, 4, 2, 1, true, true },
    { 64, 64, 64, 256, 4, 4, 1, true, true },
    { 96, 80, 77, 300, 4, 2, 1, false, true },        // no whole tile of keys
    { 48, 48, 130, 70, 2, 1, 2, true, false },        // sequences side by side, no mask
    { 128, 128, 65, 1000, 4, 1, 1, true, true },      // one query in the last tile
    { 64, 64, 256, 513, 2, 2, 1, false, true },       // one key in the last tile
    { 16, 16, 66, 17, 2, 2, 1, true, true },          // fewer keys than a tile has
    { 64, 64, 100, 100, 4, 2, 1, true, true, 0, 30 }, // ggml's from here on: a cap,
    { 64, 64, 100, 100, 4, 2, 1, true, true, 8, 0 },  // ALiBi,
    { 40, 40, 100, 100, 4, 2, 1, true, true },        // heads that are no whole vectors,
};

static std::vector<float> fill(ggml_tensor * t, random_source & random) {
    std::vector<float> values(ggml_nelements(t));
    for (size_t i = 0; i < values.size(); i++) {
        values[i] = 2.0f * random.normal();
        if (t->type == GGML_TYPE_F16) {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(values[i]);
            values[i]                    = ggml_fp16_to_fp32(((ggml_fp16_t *) t->data)[i]);
        } else {
            ((float *) t->data)[i] = values[i];
        }
    }
    return values;
}

static void test(ggml_backend_t cpu, const shape & s, bool fingerprint) {
    random_source  random(7);
    const auto     type = s.half ? GGML_TYPE_F16 : GGML_TYPE_F32;
    ggml_context * ctx  = ggml_init({ size_t(64) << 20, nullptr, false });
    ggml_tensor *  q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.n_qk, s.n_heads, s.n_queries, s.n_seqs);
    ggml_tensor *  k    = ggml_new_tensor_4d(ctx, type, s.n_qk, s.n_kv_heads, s.n_keys, s.n_seqs);
    ggml_tensor *  v    = ggml_new_tensor_4d(ctx, type, s.n_v, s.n_kv_heads, s.n_keys, s.n_seqs);
    ggml_tensor *  mask = s.masked ? ggml_new_tensor_2d(ctx, GGML_TYPE_F16, s.n_keys, s.n_queries) : nullptr;

    const auto         qs = fill(q, random), ks = fill(k, random), vs = fill(v, random);
    std::vector<float> masks(s.n_keys * s.n_queries, 0.0f);
    for (int64_t i = 0; mask && i < s.n_queries; i++) {
        for (int64_t j = 0; j < s.n_keys; j++) {
            // later keys, some others, and all of query 20 are hidden; some weigh less
            const bool is_seen = j <= i + s.n_keys - s.n_queries && (7 * j + i) % 11 != 3 && i != 20;
            float &    m       = masks[i * s.n_keys + j];
            m                  = !is_seen ? -INFINITY : j % 5 == 0 ? -0.5f * (j % 3) : 0.0f;
            ((ggml_fp16_t *) mask->data)[i * s.n_keys + j] = ggml_fp32_to_fp16(m);
        }
    }
    const float   scale = 1.0f / std::sqrt((float) s.n_qk);
    ggml_tensor * y     = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3),
                                              ggml_permute(ctx, v, 0, 2, 1, 3), mask, scale, s.max_bias, s.cap);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);

    std::vector<float> first, now(ggml_nelements(y));
    for (int n_threads = 1; n_threads <= 4; n_threads++) {
        std::fill_n((float *) y->data, now.size(), guard_value());
        ggml_backend_cpu_set_n_threads(cpu, n_threads);
        check(ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS, "the graph is not computed");
        memcpy(now.data(), y->data, ggml_nbytes(y));
        if (n_threads == 1) {
            first = now;
        }
        check(memcmp(now.data(), first.data(), ggml_nbytes(y)) == 0, "heads of %d, %d queries: %d threads change a bit",
              (int) s.n_qk, (int) s.n_queries, n_threads);
    }
    if (fingerprint) {
        uint64_t hash = 14695981039346656037ull; // FNV-1a
        for (size_t i = 0; i < ggml_nbytes(y); i++) {
            hash = (hash ^ ((const uint8_t *) first.data())[i]) * 1099511628211ull;
        }
        printf("%016llx\n", (unsigned long long) hash);
    }

    double wrong = 0.0, all = 0.0;
    for (int64_t seq = 0; seq < s.n_seqs; seq++) {
        for (int64_t head = 0; head < s.n_heads; head++) {
            // ALiBi: 2^(-max_bias / n) to the power of head + 1, where the heads are a power of two
            const double slope = s.max_bias > 0.0f ? std::pow(2.0, -s.max_bias / s.n_heads * (head + 1)) : 1.0;
            for (int64_t i = 0; i < s.n_queries; i++) {
                std::vector<double> weights(s.n_keys), sums(s.n_v);
                double              max = -INFINITY, total = 0.0;
                const int64_t       kv_head = head / (s.n_heads / s.n_kv_heads);
                for (int64_t j = 0; j < s.n_keys; j++) {
                    double product = 0.0;
                    for (int64_t d = 0; d < s.n_qk; d++) {
                        product += (double) qs[((seq * s.n_queries + i) * s.n_heads + head) * s.n_qk + d] *
                                   ks[((seq * s.n_keys + j) * s.n_kv_heads + kv_head) * s.n_qk + d];
                    }
                    product *= scale;
                    product    = s.cap > 0.0f ? s.cap * std::tanh(product / s.cap) : product;
                    weights[j] = product + slope * masks[i * s.n_keys + j];
                    max        = std::max(max, weights[j]);
                }
                for (int64_t j = 0; j < s.n_keys && max > -INFINITY; j++) {
                    const double weight = std::exp(weights[j] - max);
                    total += weight;
                    for (int64_t d = 0; d < s.n_v; d++) {
                        sums[d] += weight * vs[((seq * s.n_keys + j) * s.n_kv_heads + kv_head) * s.n_v + d];
                    }
                }
                for (int64_t d = 0; d < s.n_v; d++) {
                    const double right = total > 0.0 ? sums[d] / total : 0.0;
                    const double error = first[((seq * s.n_queries + i) * s.n_heads + head) * s.n_v + d] - right;
                    wrong += error * error;
                    all += right * right;
                }
            }
        }
    }
    check(wrong / all < TOL, "heads of %d, %d queries, %d keys: NMSE %g", (int) s.n_qk, (int) s.n_queries,
          (int) s.n_keys, wrong / all);
    ggml_free(ctx);
}

int main(int argc, char ** argv) {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    for (const shape & s : SHAPES) {
        test(cpu, s, argc > 1 && strcmp(argv[1], "fingerprint") == 0);
    }
    ggml_backend_free(cpu);
    return finish("attention");
}
