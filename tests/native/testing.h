// What the native tests share: checks that count, seeded random numbers, buffers with guards, error measures.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static constexpr int EXIT_SKIPPED = 77; // what CMakeLists.txt tells ctest

inline int n_passed = 0;
inline int n_failed = 0;

__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char * format, ...) {
    if (ok) {
        n_passed++;
        return true;
    }
    n_failed++;
    if (n_failed <= 50) { // enough to see what is wrong
        va_list args;
        va_start(args, format);
        fprintf(stderr, "FAILED: ");
        vfprintf(stderr, format, args);
        fprintf(stderr, "\n");
        va_end(args);
    }
    return false;
}

inline int finish(const char * what) {
    printf("%s: %d passed, %d failed\n", what, n_passed, n_failed);
    return n_failed == 0 && n_passed > 0 ? 0 : 1;
}

struct random_source {
    std::mt19937_64 engine;

    explicit random_source(uint64_t seed) : engine(seed) {}

    float uniform(float from, float to) { return from + (to - from) * ((engine() >> 40) * (1.0f / (1 << 24))); }
    float sign() { return engine() & 1 ? 1.0f : -1.0f; }
    int   below(int n) { return (int) (engine() % n); }
    bool  chance(float p) { return uniform(0.0f, 1.0f) < p; }

    // near enough to a normal distribution of variance 1, the same on every machine
    float normal() {
        float sum = 0.0f;
        for (int i = 0; i < 4; ++i) {
            sum += uniform(-0.8660254f, 0.8660254f);
        }
        return sum;
    }

    template <typename T> void shuffle(std::vector<T> & x) {
        for (int i = (int) x.size() - 1; i > 0; --i) {
            std::swap(x[i], x[below(i + 1)]);
        }
    }
};

// A quiet NaN that no computation makes. What still holds it was not written; what was computed from it is NaN.
inline float guard_value() {
    const uint32_t bits = 0x7fc5a5a5;
    float          value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline bool is_guard(float x) {
    const float guard = guard_value();
    return memcmp(&x, &guard, sizeof(x)) == 0;
}

// Floats with guards on both sides, unaligned on purpose.
class guarded {
public:
    explicit guarded(size_t n) : n(n), all(n + 2 * MARGIN, guard_value()) {}

    float *       data() { return all.data() + MARGIN; }
    const float * data() const { return all.data() + MARGIN; }
    size_t        size() const { return n; }

    bool guards_intact() const {
        for (size_t i = 0; i < MARGIN; ++i) {
            if (!is_guard(all[i]) || !is_guard(all[MARGIN + n + i])) {
                return false;
            }
        }
        return true;
    }

private:
    static constexpr size_t MARGIN = 33; // longer than two vectors
    size_t                  n;
    std::vector<float>      all;
};

// Differences up to this count as none: around FLT_MIN floats have no relative accuracy, and a closed gate may be e^-88
// instead of 0.
inline double vanishing = 100 * FLT_MIN;

// Normalised mean squared error over everything that was added: sum (x - y)^2 / sum y^2. Where y is 0 throughout, x must be.
struct nmse {
    double error = 0.0, power = 0.0;

    void add(double x, double y) {
        const double difference = std::fabs(x - y);
        if (!(difference <= vanishing)) {
            error += difference * difference; // a NaN lands here
        }
        power += y * y;
    }

    double value() const { return error == 0.0 ? 0.0 : error / power; } // inf where only y is 0
};

inline bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
