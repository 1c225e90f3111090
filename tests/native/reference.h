// The naive reference of GGML_OP_DELTAMEM: one head of one sequence in double precision, line by line from the
// comments of ggml-deltamem.h and section 3 of the paper (arXiv 2605.12357). No cleverness, so that it is easy to check.
#pragma once

#include "ggml-deltamem.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

class reference_head {
public:
    std::vector<double> record; // as in ggml-deltamem.h

    reference_head(const ggml_deltamem_params & params, int head, const float * initial_record) :
        record(initial_record, initial_record + ggml_deltamem_n_record(&params)), p(params), head(head) {}

    // the arguments are those of struct deltamem_head_args
    void forward(const float * proj, size_t proj_stride, const float * gate_bias, const int32_t * entries,
                 int64_t n_entries, double * read, size_t read_stride) {
        const size_t r = p.rank;

        double * S       = record.data();
        double * pending = S + r * r;
        double * sum     = pending + r * r;
        double * count   = sum + 3 * r + ggml_deltamem_n_gates_head(&p);

        for (int64_t e = 0; e < n_entries; ++e) {
            const int32_t token = entries[GGML_DELTAMEM_PLAN_TOKEN * e];
            const int32_t bits  = entries[GGML_DELTAMEM_PLAN_TOKEN * e + 1];

            const std::vector<double> x = rows_of_head(proj + token * proj_stride);

            if (has(GGML_DELTAMEM_SEGMENTS) && (bits & GGML_DELTAMEM_TOKEN_BEGIN)) {
                std::copy(S, S + r * r, pending);
                std::fill(sum, count + 1, 0.0);
            }

            double * const B = S + r * r;
            if (has(GGML_DELTAMEM_DEFERRED) && (bits & GGML_DELTAMEM_TOKEN_TURN)) {
                std::copy(S, S + r * r, B);
            }

            const bool of_turn = has(GGML_DELTAMEM_DEFERRED) && !(bits & GGML_DELTAMEM_TOKEN_PRESENT);

            const std::vector<double> q = normalized(&x[0]);
            for (size_t i = 0; i < r; ++i) {
                double dot = 0.0;
                for (size_t j = 0; j < r; ++j) {
                    dot += (of_turn ? B : S)[j * r + i] * q[j];
                }
                read[token * read_stride + head * r + i] = dot;
            }

            if (bits & GGML_DELTAMEM_TOKEN_WRITE) {
                write(S, x, gate_bias);
            }
            if (bits & GGML_DELTAMEM_TOKEN_SEGMENT) {
                flush(pending, sum, count, gate_bias);
            }
            if (bits & GGML_DELTAMEM_TOKEN_ACCUMULATE) {
                for (size_t i = 0; i < x.size(); ++i) {
                    sum[i] += x[i];
                }
                *count += 1.0;
            }
            if (bits & GGML_DELTAMEM_TOKEN_COMMIT) {
                flush(pending, sum, count, gate_bias);
                std::copy(pending, pending + r * r, S);
            }
        }
    }

private:
    ggml_deltamem_params p;
    int                  head;

    bool   has(int flag) const { return (p.flags & flag) != 0; }
    size_t n_gate() const { return has(GGML_DELTAMEM_RANKWISE_GATES) ? p.rank : 1; } // floats per gate

    // q [r], k [r], v [r], β [n_gate], and λ [n_gate] if it is separate: before biases and activations
    std::vector<double> rows_of_head(const float * column) const {
        const size_t r = p.rank, n = (size_t) p.n_head * r, g = n_gate();

        std::vector<double> x;
        for (size_t part = 0; part < 3; ++part) {
            x.insert(x.end(), column + part * n + head * r, column + part * n + (head + 1) * r);
        }
        const size_t n_gates = p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? 2 : 1;
        for (size_t gate = 0; gate < n_gates; ++gate) {
            const float * rows = column + 3 * n + gate * p.n_head * g;
            x.insert(x.end(), rows + head * g, rows + (head + 1) * g);
        }
        return x;
    }

    // tanh, then x / max(|x|, 1e-6) as torch.nn.functional.normalize does it
    std::vector<double> normalized(const double * x) const {
        std::vector<double> y(x, x + p.rank);
        if (has(GGML_DELTAMEM_NORMALIZE_QK)) {
            double squares = 0.0;
            for (double & value : y) {
                value = std::tanh(value);
                squares += value * value;
            }
            for (double & value : y) {
                value /= std::max(std::sqrt(squares), 1e-6);
            }
        }
        return y;
    }

    static double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

    // S_i,: <- keep_i S_i,: - erase_i (S k)_i kᵀ + write_i v_i kᵀ
    void write(double * S, const std::vector<double> & x, const float * gate_bias) const {
        const size_t r = p.rank, g = n_gate();

        const std::vector<double> k = normalized(&x[r]);
        const double *            v = &x[2 * r];

        for (size_t i = 0; i < r; ++i) {
            const size_t row = g == r ? i : 0;

            const double beta   = sigmoid(x[3 * r + row] + gate_bias[head * g + row]);
            double       lambda = 1.0 - beta;
            if (p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE) {
                lambda = sigmoid(x[3 * r + g + row] + gate_bias[p.n_head * g + head * g + row]);
            }
            if (p.lambda == GGML_DELTAMEM_LAMBDA_NONE) {
                lambda = 1.0;
            }
            const double erase = has(GGML_DELTAMEM_LAMBDA_OUTSIDE) ? lambda * beta : beta;

            double Sk = 0.0;
            for (size_t j = 0; j < r; ++j) {
                Sk += S[j * r + i] * k[j];
            }
            for (size_t j = 0; j < r; ++j) {
                S[j * r + i] = lambda * S[j * r + i] - erase * Sk * k[j] + beta * v[i] * k[j];
            }
        }
    }

    // one write of the mean; an empty sum writes nothing
    void flush(double * pending, double * sum, double * count, const float * gate_bias) const {
        if (*count == 0.0) {
            return;
        }
        std::vector<double> mean(sum, count);
        for (double & value : mean) {
            value /= *count;
        }
        write(pending, mean, gate_bias);
        std::fill(sum, count + 1, 0.0);
    }
};
