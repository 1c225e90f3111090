// Compares the CPU kernel of GGML_OP_DELTAMEM with the naive reference, for the instruction set it was compiled for.
//
//     test-kernel NAME [--quick] [--flush]
//
// NAME is what deltamem_simd_name() must return. --quick, for emulators, keeps every rank, mode, number of heads and
// number of tokens and every other group, but not their full product. --flush allows denormal projections to be taken for
// zero: SIMDe's scalef does so, the instruction does not.
//
// Tolerances. float32 rounds by at most u = 2^-24 = 6e-8 of a value. One token passes through activations (2 units in the
// last place), a normalisation, and sums of up to 64 products: an rms error of some 5 u is expected, 17 u allowed, so
// NMSE <= (17 u)^2 = 1e-12. Writes never enlarge a state here (|k| <= 1), so errors of T tokens add up at most like
// a random walk: beyond 64 tokens NMSE <= 1e-12 T/64. Special values may cancel (1 - β for β near 1): 53 u, 1e-11.
// An NMSE over a handful of numbers would measure how far their terms happen to cancel: small shapes run as so many
// sequences that every array has some 256 elements.

#include "deltamem-kernel.h"
#include "reference.h"
#include "testing.h"

#include <algorithm>
#include <functional>

static const int RANKS[]  = { 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64 };
static const int HEADS[]  = { 1, 2, 3, 4, 16 };
static const int TOKENS[] = { 1, 2, 7, 16, 17, 64 };

static bool quick   = false;
static bool is_cuda = false; // what has no kernel of its own there is not tested

static double tolerance(int n_tokens) {
    return 1e-12 * std::max(1.0, n_tokens / 64.0);
}

static constexpr double SPECIAL_TOLERANCE = 1e-11;

// λ coupled, separate, none; then every combination of the three flags
static constexpr int N_MODES = 24;

static ggml_deltamem_params make_params(int rank, int n_head, int mode, int more_flags = 0) {
    ggml_deltamem_params p = {};
    p.rank                 = rank;
    p.n_head               = n_head;
    p.lambda               = mode % 3;
    p.flags                = more_flags;
    p.flags |= (mode / 3) & 1 ? GGML_DELTAMEM_NORMALIZE_QK : 0;
    p.flags |= (mode / 6) & 1 ? GGML_DELTAMEM_RANKWISE_GATES : 0;
    p.flags |= (mode / 12) ? GGML_DELTAMEM_LAMBDA_OUTSIDE : 0;
    return p;
}

static bool normalizes(const ggml_deltamem_params & p) {
    return (p.flags & GGML_DELTAMEM_NORMALIZE_QK) != 0;
}

// Thins out a product of ranks and modes: true once in `every` calls. The 24 modes recur with each rank, so every mode and
// every rank has its turn as long as `every` and 24 have no common divisor.
static bool in_turn(int every) {
    static int turn = 0;
    return turn++ % every == 0;
}

//
// a problem: sequences whose tokens lie scattered over the columns of one projection
//

struct distribution {
    std::function<float(random_source &)> qk, v, gate, bias, state;
};

// |k| <= 1 also where keys are raw, so that states stay bounded
static distribution usual(const ggml_deltamem_params & p) {
    const float  raw = 1.0f / sqrtf((float) p.rank);
    distribution d;
    if (normalizes(p)) {
        d.qk = [](random_source & random) { return random.normal(); };
    } else {
        d.qk = [raw](random_source & random) { return random.uniform(-raw, raw); };
    }
    d.v     = [](random_source & random) { return random.normal(); };
    d.gate  = [](random_source & random) { return 2.0f * random.normal(); };
    d.bias  = [](random_source & random) { return random.normal(); };
    d.state = [](random_source & random) { return 0.5f * random.normal(); };
    return d;
}

// bits of one sequence's tokens
using plan = std::function<std::vector<int32_t>(random_source &, int n_tokens)>;

struct problem {
    ggml_deltamem_params p;
    int                  n_tokens; // of each sequence
    size_t               proj_stride, read_stride, n_columns;
    int                  n_checkpoints = 0; // slots that entries leave checkpoints in, of each sequence

    guarded                           proj, gate_bias;
    std::vector<std::vector<float>>   records; // [n_seqs*H], before
    std::vector<std::vector<int32_t>> entries; // [n_seqs]

    problem(const ggml_deltamem_params & params, int n_tokens, const plan & make_bits, const distribution & d,
            uint64_t seed, int n_seqs = 0) :
        p(with_sequences(params, n_tokens, n_seqs)),
        n_tokens(n_tokens),
        proj_stride(ggml_deltamem_n_proj(&p) + 5),
        read_stride((size_t) p.n_head * p.rank + 3),
        n_columns((size_t) p.n_seqs * n_tokens + 3), // three columns belong to no sequence
        proj(n_columns * proj_stride),
        gate_bias(ggml_deltamem_n_gates(&p)) {
        random_source random(seed);

        const size_t n_qk = 2 * (size_t) p.n_head * p.rank, n_qkv = 3 * (size_t) p.n_head * p.rank;

        std::vector<int32_t> columns(n_columns);
        for (size_t i = 0; i < n_columns; ++i) {
            columns[i] = (int32_t) i;
        }
        random.shuffle(columns);

        auto next_column = columns.begin();
        for (int seq = 0; seq < p.n_seqs; ++seq) {
            const std::vector<int32_t> bits = make_bits(random, n_tokens);

            std::vector<int32_t> entry;
            for (int t = 0; t < n_tokens; ++t, ++next_column) {
                entry.push_back(*next_column);
                entry.push_back(bits[t]);

                float * column = proj.data() + *next_column * proj_stride; // the rest keeps the guard value
                for (size_t i = 0; i < (size_t) ggml_deltamem_n_proj(&p); ++i) {
                    column[i] = (i < n_qk ? d.qk : i < n_qkv ? d.v : d.gate)(random);
                }
            }
            entries.push_back(entry);
        }
        for (size_t i = 0; i < gate_bias.size(); ++i) {
            gate_bias.data()[i] = d.bias(random);
        }
        for (int i = 0; i < p.n_seqs * p.n_head; ++i) {
            std::vector<float> record(ggml_deltamem_n_record(&p), 0.0f);
            const bool         has_two = p.flags & (GGML_DELTAMEM_SEGMENTS | GGML_DELTAMEM_DEFERRED);
            const size_t       n_state = (size_t) p.rank * p.rank * (has_two ? 2 : 1);
            for (size_t k = 0; k < n_state; ++k) {
                record[k] = d.state(random);
            }
            records.push_back(record);
        }
    }

private:
    static ggml_deltamem_params with_sequences(ggml_deltamem_params p, int n_tokens, int n_seqs) {
        const int n_elements = p.rank * p.n_head * std::min(n_tokens, p.rank); // of the smaller one of reads and state
        p.n_seqs             = n_seqs ? n_seqs : std::min((255 + n_elements) / n_elements, n_tokens > 64 ? 16 : 256);
        return p;
    }
};

//
// running it
//

struct result {
    std::vector<float>              reads; // [n_columns*read_stride], guard values where nothing was written
    std::vector<std::vector<float>> records;
    std::vector<std::vector<float>> checkpoints; // like records, one slot after the other
};

// max_call > 0 hands the entries over in calls of 1 to max_call entries
static result run_kernel(const problem & a, int max_call = 0) {
    random_source random(7);
    result        res;
    res.records.resize(a.records.size());
    res.checkpoints.resize(a.records.size());
    guarded read(a.n_columns * a.read_stride);

    for (int i = 0; i < a.p.n_seqs * a.p.n_head; ++i) {
        // Last head first: had a head written into the columns of the next, it would show.
        const int head = a.p.n_head - 1 - i % a.p.n_head;
        const int seq  = i / a.p.n_head;

        const std::vector<float> &   before  = a.records[seq * a.p.n_head + head];
        const std::vector<int32_t> & entries = a.entries[seq];

        guarded record(before.size());
        std::copy(before.begin(), before.end(), record.data());

        deltamem_head_args args = {};
        args.params             = a.p;
        args.head               = head;
        args.proj               = a.proj.data();
        args.proj_stride        = a.proj_stride;
        args.gate_bias          = a.gate_bias.data();
        args.record             = record.data();
        args.read               = read.data();
        args.read_stride        = a.read_stride;

        const size_t slot_stride = before.size() + 1;
        guarded      slots(a.n_checkpoints * slot_stride);
        args.slots       = slots.data();
        args.slot_stride = slot_stride;

        for (int done = 0; done < a.n_tokens; done += (int) args.n_entries) {
            const int left = a.n_tokens - done;
            args.entries   = entries.data() + GGML_DELTAMEM_PLAN_TOKEN * done;
            args.n_entries = max_call ? std::min(left, 1 + random.below(max_call)) : left;
            deltamem_head_forward(&args);
        }

        check(record.guards_intact(), "rank %d: wrote outside its record", a.p.rank);
        check(slots.guards_intact(), "rank %d: wrote outside the checkpoints", a.p.rank);
        res.checkpoints[seq * a.p.n_head + head].assign(slots.data(), slots.data() + slots.size());
        res.records[seq * a.p.n_head + head].assign(record.data(), record.data() + record.size());
    }

    check(read.guards_intact(), "rank %d: wrote outside the reads", a.p.rank);
    res.reads.assign(read.data(), read.data() + read.size());
    return res;
}

struct group {
    const char * name;
    int          n_cases       = 0;
    int          first_failure = n_failed;
    double       reads = 0.0, state = 0.0, pending = 0.0, sum = 0.0; // greatest NMSE

    explicit group(const char * name) : name(name) {}

    ~group() {
        printf("%-44s %6d cases, NMSE of reads %.1e, state %.1e, pending %.1e, sum %.1e%s\n", name, n_cases, reads,
               state, pending, sum, n_failed > first_failure ? "  FAILED" : "");
        fflush(stdout);
    }

    void compare(const problem & a, double tol, int max_call = 0) {
        const result got      = run_kernel(a, max_call);
        const size_t r        = a.p.rank;
        const size_t n_sum    = 3 * r + ggml_deltamem_n_gates_head(&a.p);
        const bool   segments = (a.p.flags & GGML_DELTAMEM_SEGMENTS) != 0;
        const bool   deferred = (a.p.flags & GGML_DELTAMEM_DEFERRED) != 0;

        nmse e_reads, e_state, e_pending, e_sum;
        bool counts = true;

        std::vector<bool>   written(got.reads.size(), false);
        std::vector<double> read(got.reads.size());

        for (int seq = 0; seq < a.p.n_seqs; ++seq) {
            const std::vector<int32_t> & entries = a.entries[seq];

            for (int head = 0; head < a.p.n_head; ++head) {
                reference_head ref(a.p, head, a.records[seq * a.p.n_head + head].data());
                ref.forward(a.proj.data(), a.proj_stride, a.gate_bias.data(), entries.data(), a.n_tokens, read.data(),
                            a.read_stride);

                for (int t = 0; t < a.n_tokens; ++t) {
                    const size_t at = entries[GGML_DELTAMEM_PLAN_TOKEN * t] * a.read_stride + head * r;
                    for (size_t i = at; i < at + r; ++i) {
                        e_reads.add(got.reads[i], read[i]);
                        written[i] = true;
                    }
                }

                const float * record = got.records[seq * a.p.n_head + head].data();
                for (size_t i = 0; i < r * r; ++i) {
                    e_state.add(record[i], ref.record[i]);
                }
                for (size_t i = r * r; i < 2 * r * r && (segments || deferred); ++i) {
                    e_pending.add(record[i], ref.record[i]); // or B
                }
                if (segments) {
                    for (size_t i = 2 * r * r; i < 2 * r * r + n_sum; ++i) {
                        e_sum.add(record[i], ref.record[i]);
                    }
                    counts = counts && record[2 * r * r + n_sum] == ref.record[2 * r * r + n_sum];
                }
            }
        }

        bool others_untouched = true;
        for (size_t i = 0; i < written.size(); ++i) {
            others_untouched = others_untouched && (written[i] || is_guard(got.reads[i]));
        }

        char shape[160];
        snprintf(shape, sizeof(shape), "%s: rank %d, heads %d, sequences %d, tokens %d, lambda %d, flags %d", name,
                 a.p.rank, a.p.n_head, a.p.n_seqs, a.n_tokens, a.p.lambda, a.p.flags);

        check(others_untouched, "%s: reads of other tokens were written", shape);
        expect("reads", shape, e_reads, tol, reads);
        expect("state", shape, e_state, tol, state);
        if (deferred) {
            expect("the turn's state", shape, e_pending, tol, pending);
        }
        if (segments) {
            expect("pending state", shape, e_pending, tol, pending);
            expect("running sum", shape, e_sum, tol, sum);
            check(counts, "%s: wrong count of tokens in the sum", shape);
        }
        n_cases++;
    }

    static void expect(const char * what, const char * shape, const nmse & e, double tol, double & greatest) {
        check(e.value() <= tol, "%s: NMSE of %s is %g, allowed %g", shape, what, e.value(), tol);
        if (!(e.value() <= greatest)) {
            greatest = e.value();
        }
    }
};

//
// plans
//

static std::vector<int32_t> mostly_writes(random_source & random, int n_tokens) {
    std::vector<int32_t> bits;
    for (int t = 0; t < n_tokens; ++t) {
        bits.push_back(random.chance(0.8f) ? GGML_DELTAMEM_TOKEN_WRITE : 0);
    }
    return bits;
}

static std::vector<int32_t> only_reads(random_source &, int n_tokens) {
    return std::vector<int32_t>(n_tokens, 0);
}

static std::vector<int32_t> only_writes(random_source &, int n_tokens) {
    return std::vector<int32_t>(n_tokens, GGML_DELTAMEM_TOKEN_WRITE);
}

// Ingests as a user makes them: segments of several tokens, gaps between and in them, ingests of one token, some of gaps
// alone, some abandoned and begun anew, the last one perhaps unfinished, stretches of plain token writes in between.
static plan ingests(int max_length) {
    return [max_length](random_source & random, int n_tokens) {
        std::vector<int32_t> bits;
        while ((int) bits.size() < n_tokens) {
            const int   length    = random.chance(0.2f) ? 1 : 1 + random.below(max_length);
            const bool  by_token  = random.chance(0.1f);
            const bool  abandoned = random.chance(0.2f);
            const bool  only_gaps = random.chance(0.1f);
            const float p_new     = random.uniform(0.0f, 0.5f);

            bool any = false;
            for (int t = 0; t < length; ++t) {
                if (by_token) {
                    bits.push_back(GGML_DELTAMEM_TOKEN_WRITE);
                    continue;
                }
                int32_t b = t == 0 ? GGML_DELTAMEM_TOKEN_BEGIN : 0;
                if (!only_gaps && !random.chance(0.2f)) {
                    b |= GGML_DELTAMEM_TOKEN_ACCUMULATE;
                    if (!any || random.chance(p_new)) {
                        b |= GGML_DELTAMEM_TOKEN_SEGMENT;
                    }
                    any = true;
                }
                if (t == length - 1 && !abandoned) {
                    b |= GGML_DELTAMEM_TOKEN_COMMIT;
                }
                bits.push_back(b);
            }
        }
        bits.resize(n_tokens);
        return bits;
    };
}

// any bits on any token
static std::vector<int32_t> any_bits(random_source & random, int n_tokens) {
    std::vector<int32_t> bits;
    for (int t = 0; t < n_tokens; ++t) {
        bits.push_back(random.below(32));
    }
    return bits;
}

//
// groups
//

// every rank and mode, with every number of heads and of tokens
static void test_token_writes() {
    for (int rank : RANKS) {
        char name[64];
        snprintf(name, sizeof(name), "token writes, rank %d", rank);
        group g(name);

        int turn = rank;
        for (int mode = 0; mode < N_MODES; ++mode) {
            for (int n_head : HEADS) {
                for (int n_tokens : TOKENS) {
                    if (quick && turn++ % 30 != 0) { // one of the 30 shapes per mode, another one each time
                        continue;
                    }
                    const ggml_deltamem_params p = make_params(rank, n_head, mode);
                    g.compare(problem(p, n_tokens, mostly_writes, usual(p), 100 * rank + mode), tolerance(n_tokens));
                }
            }
            turn++;
        }
    }
}

static void test_many_tokens() {
    group g("hundreds and thousands of tokens");
    for (int rank : RANKS) {
        for (int mode = 0; mode < N_MODES; ++mode) {
            if (in_turn(quick ? 11 : 5)) {
                const ggml_deltamem_params p = make_params(rank, quick ? 1 : HEADS[mode % 3], mode);
                g.compare(problem(p, 513, mostly_writes, usual(p), 200 * rank + mode, 2), tolerance(513));
            }
        }
    }
    for (int rank : { 1, 7, 8, 16, 64 }) {
        for (int mode = 0; mode < N_MODES; ++mode) {
            if (in_turn(quick ? 25 : 7)) {
                const ggml_deltamem_params p = make_params(rank, quick ? 1 : 2, mode);
                g.compare(problem(p, 3000, only_writes, usual(p), 300 * rank + mode, rank == 1 ? 16 : 1),
                          tolerance(3000));
            }
        }
    }
}

static void test_segment_writes() {
    {
        group g("segment writes");
        for (int rank : RANKS) {
            for (int mode = 0; mode < N_MODES; ++mode) {
                // in one call, and with ingests over several
                for (int max_call : { 0, 20 }) {
                    if (in_turn(quick ? 5 : 1)) {
                        const ggml_deltamem_params p = make_params(rank, HEADS[mode % 3], mode, GGML_DELTAMEM_SEGMENTS);
                        g.compare(problem(p, 64, ingests(24), usual(p), 400 * rank + mode), tolerance(64), max_call);
                    }
                }
            }
        }
    }
    {
        group g("segment writes, any combination of bits");
        for (int rank : RANKS) {
            for (int mode = 0; mode < N_MODES; ++mode) {
                if (in_turn(quick ? 5 : 1)) {
                    const ggml_deltamem_params p = make_params(rank, HEADS[mode % 3], mode, GGML_DELTAMEM_SEGMENTS);
                    g.compare(problem(p, 40, any_bits, usual(p), 500 * rank + mode), tolerance(40), 20);
                }
            }
        }
    }
    {
        group g("segments of thousands of tokens");
        for (int rank : { 1, 5, 8, 16, 33 }) {
            for (int mode = 0; mode < N_MODES; ++mode) {
                if (in_turn(quick ? 25 : 7)) {
                    const ggml_deltamem_params p = make_params(rank, 2, mode, GGML_DELTAMEM_SEGMENTS);
                    g.compare(problem(p, 3000, ingests(4000), usual(p), 600 * rank + mode, quick ? 1 : 4),
                              tolerance(3000), 512);
                }
            }
        }
    }
}

static void test_deferred_writes() {
    const plan turns = [](random_source & random, int n_tokens) {
        std::vector<int32_t> bits = mostly_writes(random, n_tokens);
        for (int32_t & b : bits) {
            b |= random.chance(0.1f) ? GGML_DELTAMEM_TOKEN_TURN : 0;
            b |= random.chance(0.3f) ? GGML_DELTAMEM_TOKEN_PRESENT : 0;
        }
        return bits;
    };
    {
        group g("deferred writes");
        for (int rank : RANKS) {
            for (int mode = 0; mode < N_MODES; ++mode) {
                // in one call, and with turns over several
                for (int max_call : { 0, 20 }) {
                    if (in_turn(quick ? 5 : 1)) {
                        const ggml_deltamem_params p = make_params(rank, HEADS[mode % 3], mode, GGML_DELTAMEM_DEFERRED);
                        g.compare(problem(p, 100, turns, usual(p), 450 * rank + mode), tolerance(100), max_call);
                    }
                }
            }
        }
    }
    // tokens that read the present, or have a turn each, read as if writes were not deferred
    for (int i = 0; i < 6; ++i) {
        const int     rank = i % 3 == 0 ? 3 : i % 3 * 8,
                      bit  = i < 3 ? GGML_DELTAMEM_TOKEN_TURN : GGML_DELTAMEM_TOKEN_PRESENT;
        const problem plain(make_params(rank, 2, 9), 40, mostly_writes, usual(make_params(rank, 2, 9)), rank);
        problem       turned = plain;
        const size_t  n      = (size_t) rank * rank;
        turned.p.flags |= GGML_DELTAMEM_DEFERRED;
        for (std::vector<float> & record : turned.records) {
            record.resize(2 * n);
        }
        for (std::vector<int32_t> & entries : turned.entries) {
            for (size_t i = 1; i < entries.size(); i += GGML_DELTAMEM_PLAN_TOKEN) {
                entries[i] |= bit;
            }
        }
        check(same_bits(run_kernel(plain).reads, run_kernel(turned).reads), "rank %d: reads of the present differ",
              rank);
    }
}

static void test_special_values() {
    struct special {
        const char *                        name;
        bool                                normalized_only; // raw values of this size overflow a state
        std::function<void(distribution &)> change;
    };

    const auto constant = [](float x) { return [x](random_source &) { return x; }; };
    const auto around   = [](float x) { return [x](random_source & random) { return x * random.normal(); }; };
    const auto either   = [](float x) { return [x](random_source & random) { return x * random.sign(); }; };

    const special specials[] = {
        { "zeros", false, [&](distribution & d) { d.qk = d.v = d.gate = d.bias = constant(0.0f); } },
        { "empty state", false, [&](distribution & d) { d.state                = constant(0.0f); } },
        { "denormal projections", false, [&](distribution & d) { d.qk = d.v = d.gate = around(1e-40f); } },
        { "keys below the norm's floor", false, [&](distribution & d) { d.qk         = around(1e-8f); } },
        { "keys at the norm's floor", false, [&](distribution & d) { d.qk            = around(1e-6f); } },
        { "keys whose squares vanish", false, [&](distribution & d) { d.qk           = around(1e-25f); } },
        { "keys where tanh turns", true,
          [&](distribution & d) {
              d.qk = [](random_source & random) { return random.sign() * random.uniform(0.62f, 0.63f); };
          } },
        { "keys that saturate", true, [&](distribution & d) { d.qk        = around(1e4f); } },
        { "greatest keys", true, [&](distribution & d) { d.qk             = either(FLT_MAX); } },
        { "gates of 1e4", false, [&](distribution & d) { d.gate           = either(1e4f); } },
        { "gates near 1e4 by bias", false, [&](distribution & d) { d.bias = either(1e4f); } },
        { "greatest gates", false, [&](distribution & d) { d.gate = d.bias = either(FLT_MAX); } },
        { "gates where exp underflows", false,
          [&](distribution & d) {
              d.gate = around(90.0f);
              d.bias = constant(0.0f);
          } },
        { "closed gates", false, [&](distribution & d) { d.gate         = constant(-1e4f); } },
        { "open gates", false, [&](distribution & d) { d.gate           = constant(1e4f); } },
        { "large values and states", false, [&](distribution & d) { d.v = d.state = around(1e10f); } },
    };

    for (const special & s : specials) {
        group g(s.name);
        for (int rank : { 1, 2, 7, 8, 16, 31, 64 }) {
            for (int mode = 0; mode < N_MODES; ++mode) {
                if (quick && !in_turn(7)) {
                    continue;
                }
                for (int flags : { 0, (int) GGML_DELTAMEM_SEGMENTS }) {
                    const ggml_deltamem_params p = make_params(rank, 2, mode, flags);
                    if (s.normalized_only && !normalizes(p)) {
                        continue;
                    }
                    if (flags && (p.rank > 16 || strcmp(s.name, "greatest keys") == 0 ||
                                  strcmp(s.name, "greatest gates") == 0)) {
                        continue; // a sum of several FLT_MAX is infinite
                    }
                    distribution d = usual(p);
                    s.change(d);
                    g.compare(problem(p, 20, flags ? ingests(8) : plan(mostly_writes), d, 700 * rank + mode, 8),
                              SPECIAL_TOLERANCE);
                }
            }
        }
    }
}

// Element by element through reads and states that pass an activation on unchanged. The functions are good to 2 units in
// the last place, 4 u; the divisions and products on the way add 2 u: 6 u = 3 FLT_EPSILON.
static void test_activations() {
    const double allowed = 3 * FLT_EPSILON;

    const auto relative_error = [](double got, double want) { return std::fabs(got - want) / std::fabs(want); };
    const auto keep_greatest  = [](double & greatest, double x) {
        if (!(x <= greatest)) {
            greatest = x;
        }
    };

    const auto run = [](const ggml_deltamem_params & p, std::vector<float> & record, const std::vector<float> & proj,
                        int n_tokens, int32_t bits) {
        std::vector<float>   bias(ggml_deltamem_n_gates(&p), 0.0f), read((size_t) n_tokens * p.rank);
        std::vector<int32_t> entries;
        for (int t = 0; t < n_tokens; ++t) {
            entries.push_back(t);
            entries.push_back(bits);
        }
        deltamem_head_args args = {};
        args.params             = p;
        args.proj               = proj.data();
        args.proj_stride        = ggml_deltamem_n_proj(&p);
        args.gate_bias          = bias.data();
        args.record             = record.data();
        args.read               = read.data();
        args.read_stride        = p.rank;
        args.entries            = entries.data();
        args.n_entries          = n_tokens;
        deltamem_head_forward(&args);
        return read;
    };

    std::vector<float> arguments;
    for (double x = 1e-30; x < 100.0; x *= 1.01) {
        arguments.push_back((float) x);
        arguments.push_back((float) -x);
    }
    const int n = (int) arguments.size();

    // tanh: with q = (x, 100) and S = 1 the reads' ratio is tanh(x)
    double e_tanh = 0.0;
    {
        ggml_deltamem_params p    = make_params(2, 1, 0);
        p.flags                   = GGML_DELTAMEM_NORMALIZE_QK;
        std::vector<float> record = { 1, 0, 0, 1 }, proj;
        for (float x : arguments) {
            proj.insert(proj.end(), { x, 100.0f, 0, 0, 0, 0, 0 });
        }
        const std::vector<float> read = run(p, record, proj, n, 0);
        for (int t = 0; t < n; ++t) {
            keep_greatest(e_tanh,
                          relative_error((double) read[2 * t] / read[2 * t + 1], std::tanh((double) arguments[t])));
        }
    }
    check(e_tanh <= allowed, "tanh: relative error %g, allowed %g", e_tanh, allowed);

    // the norm's floor: for rank 1 and S = 1 the read is tanh(x)/max(|tanh(x)|, 1e-6)
    double e_norm = 0.0;
    {
        ggml_deltamem_params p    = make_params(1, 1, 0);
        p.flags                   = GGML_DELTAMEM_NORMALIZE_QK;
        std::vector<float> record = { 1 }, proj;
        for (float x : arguments) {
            proj.insert(proj.end(), { x, 0, 0, 0 });
        }
        const std::vector<float> read = run(p, record, proj, n, 0);
        for (int t = 0; t < n; ++t) {
            const double y = std::tanh((double) arguments[t]);
            keep_greatest(e_norm, relative_error(read[t], y / std::max(std::fabs(y), 1e-6)));
        }
    }
    check(e_norm <= allowed, "l2 norm: relative error %g, allowed %g", e_norm, allowed);

    // sigmoid: the gates of 32 rows at a time, k = (1, 0, ..)
    double               e_beta = 0.0, e_lambda = 0.0;
    const int            r = 32;
    ggml_deltamem_params p = make_params(r, 1, 0);
    p.lambda               = GGML_DELTAMEM_LAMBDA_SEPARATE;
    p.flags                = GGML_DELTAMEM_RANKWISE_GATES;

    for (float from = -120.0f; from < 120.0f; from += 0.5f) {
        std::vector<float> proj(ggml_deltamem_n_proj(&p), 0.0f), record(r * r, 0.0f);
        proj[r] = 1.0f;
        for (int i = 0; i < r; ++i) {
            proj[2 * r + i] = 1.0f;                                  // v
            proj[3 * r + i] = proj[4 * r + i] = from + 0.5f * i / r; // β, λ
            record[1 * r + i]                 = 1.0f;                // S[i, 1], which k does not touch
        }
        run(p, record, proj, 1, GGML_DELTAMEM_TOKEN_WRITE);

        for (int i = 0; i < r; ++i) {
            const float  x    = from + 0.5f * i / r;
            const double want = 1.0 / (1.0 + std::exp((double) -x));
            if (x > -87.0f) {
                keep_greatest(e_beta, relative_error(record[i], want));       // S[i, 0] = β v k
                keep_greatest(e_lambda, relative_error(record[r + i], want)); // S[i, 1] = λ S[i, 1]
            } else { // e^-x leaves float32's range: next to nothing
                check(record[i] >= 0.0f && record[i] <= 2 * FLT_MIN, "sigmoid(%g) is %g", x, record[i]);
            }
        }
    }
    check(e_beta <= allowed, "sigmoid of beta: relative error %g, allowed %g", e_beta, allowed);
    check(e_lambda <= allowed, "sigmoid of lambda: relative error %g, allowed %g", e_lambda, allowed);

    printf("%-44s relative errors, in FLT_EPSILON: tanh %.2f, norm %.2f, beta %.2f, lambda %.2f\n", "activations",
           e_tanh / FLT_EPSILON, e_norm / FLT_EPSILON, e_beta / FLT_EPSILON, e_lambda / FLT_EPSILON);
}

// What must not change a single bit.
static void test_same_bits() {
    const int before = n_failed;

    for (int rank : RANKS) {
        for (int mode = 0; mode < N_MODES; ++mode) {
            if (quick && !in_turn(11)) {
                continue;
            }
            for (int flags : { 0, (int) GGML_DELTAMEM_SEGMENTS }) {
                const ggml_deltamem_params p = make_params(rank, 2, mode, flags);
                const problem a(p, 70, flags ? ingests(24) : plan(mostly_writes), usual(p), 800 * rank + mode, 2);
                const result  whole = run_kernel(a);

                // how the tokens are cut into calls: one by one, and at random
                for (int max_call : { 1, 30 }) {
                    const result cut = run_kernel(a, max_call);
                    check(same_bits(cut.reads, whole.reads), "rank %d, mode %d: calls of %d change reads", rank, mode,
                          max_call);
                    for (size_t i = 0; i < cut.records.size(); ++i) {
                        check(same_bits(cut.records[i], whole.records[i]),
                              "rank %d, mode %d: calls of %d change a record", rank, mode, max_call);
                    }
                }

                // tokens that only read leave no trace: without them the records are the same
                problem b = a;
                for (std::vector<int32_t> & entries : b.entries) {
                    std::vector<int32_t> kept;
                    for (size_t e = 0; e < entries.size(); e += GGML_DELTAMEM_PLAN_TOKEN) {
                        if (entries[e + 1] != 0) {
                            kept.insert(kept.end(), { entries[e], entries[e + 1] });
                        }
                    }
                    entries = kept;
                }
                for (int seq = 0; seq < b.p.n_seqs; ++seq) {
                    problem one  = b;
                    one.p.n_seqs = 1;
                    one.n_tokens = (int) b.entries[seq].size() / GGML_DELTAMEM_PLAN_TOKEN;
                    one.entries  = { b.entries[seq] };
                    one.records  = { b.records.begin() + seq * p.n_head, b.records.begin() + (seq + 1) * p.n_head };
                    const result without = run_kernel(one);
                    for (int head = 0; head < p.n_head; ++head) {
                        check(same_bits(without.records[head], whole.records[seq * p.n_head + head]),
                              "rank %d, mode %d: tokens that only read change a record", rank, mode);
                    }
                }

                // reading alone changes nothing at all
                const problem c(p, 40, only_reads, usual(p), 900 * rank + mode, 2);
                const result  read = run_kernel(c);
                for (size_t i = 0; i < read.records.size(); ++i) {
                    check(same_bits(read.records[i], c.records[i]), "rank %d, mode %d: reading changes a record", rank,
                          mode);
                }
            }

            // an ingest of one token and one segment is a token write
            const ggml_deltamem_params p = make_params(rank, 2, mode, GGML_DELTAMEM_SEGMENTS);
            problem                    a(p, 20, only_writes, usual(p), 1000 * rank + mode, 1);
            const result               writes = run_kernel(a);
            for (size_t e = 0; e < a.entries[0].size(); e += GGML_DELTAMEM_PLAN_TOKEN) {
                a.entries[0][e + 1] = GGML_DELTAMEM_TOKEN_BEGIN | GGML_DELTAMEM_TOKEN_SEGMENT |
                                      GGML_DELTAMEM_TOKEN_ACCUMULATE | GGML_DELTAMEM_TOKEN_COMMIT;
            }
            const result segments = run_kernel(a);
            check(same_bits(segments.reads, writes.reads), "rank %d, mode %d: one-token segments read differently",
                  rank, mode);
            for (int head = 0; head < p.n_head; ++head) {
                check(memcmp(segments.records[head].data(), writes.records[head].data(), sizeof(float) * rank * rank) ==
                              0,
                      "rank %d, mode %d: one-token segments write differently", rank, mode);
            }
        }
    }
    printf("%-44s%s\n", "calls, masks and one-token segments, bits", n_failed > before ? "  FAILED" : " the same");
}

// A checkpoint is the state that a call of the entries up to it leaves, bit for bit, and nothing else changes.
static void test_checkpoints() {
    const int before = n_failed;

    for (int rank : RANKS) {
        for (int mode = 0; mode < N_MODES; ++mode) {
            if (quick && !in_turn(7)) {
                continue;
            }
            for (int flags : { 0, (int) GGML_DELTAMEM_SEGMENTS }) {
                const ggml_deltamem_params p = make_params(rank, 2, mode, flags);
                const problem plain(p, 70, flags ? ingests(24) : plan(mostly_writes), usual(p), 1500 * rank + mode, 2);
                const result  whole = run_kernel(plain);

                problem   a       = plain;
                const int after[] = { 0, 1, 17, 31, 32, 33, 68, 69 };
                a.n_checkpoints   = (int) (sizeof(after) / sizeof(after[0]));
                for (std::vector<int32_t> & entries : a.entries) {
                    for (int c = 0; c < a.n_checkpoints; ++c) {
                        entries[after[c] * GGML_DELTAMEM_PLAN_TOKEN + 1] |= GGML_DELTAMEM_TOKEN_CHECKPOINT(c);
                    }
                }
                for (int max_call : { 0, 5 }) {
                    const result got = run_kernel(a, max_call);
                    check(same_bits(got.reads, whole.reads), "rank %d, mode %d: checkpoints change reads", rank, mode);
                    for (int c = 0; c < a.n_checkpoints; ++c) {
                        problem prefix   = plain;
                        prefix.n_tokens  = after[c] + 1;
                        const result cut = run_kernel(prefix);
                        for (size_t i = 0; i < got.records.size(); ++i) {
                            const size_t  stride = plain.records[i].size() + 1;
                            const float * kept   = got.checkpoints[i].data() + c * stride;
                            check(memcmp(kept, cut.records[i].data(), sizeof(float) * rank * rank) == 0,
                                  "rank %d, mode %d: the checkpoint after %d differs", rank, mode, after[c]);
                            check(same_bits(got.records[i], whole.records[i]),
                                  "rank %d, mode %d: checkpoints change a record", rank, mode);
                        }
                    }
                }
            }
        }
    }
    printf("%-44s%s\n", "checkpoints, bits", n_failed > before ? "  FAILED" : " the same");
}

// A NaN in the input comes out: a clamp must not turn it into a number that looks right.
static void test_nan() {
    const int before = n_failed;

    for (int rank : { 1, 3, 8, 16, 33 }) {
        for (int mode = 0; mode < N_MODES; ++mode) {
            const ggml_deltamem_params p       = make_params(rank, 1, mode);
            const int                  n_parts = p.lambda == GGML_DELTAMEM_LAMBDA_SEPARATE ? 5 : 4;
            for (int part = 0; part < n_parts; ++part) { // q, k, v, β, λ of the first token
                problem      a(p, 2, only_writes, usual(p), 1100 * rank + mode, 1);
                const size_t row = part < 4 ? (size_t) part * rank : ggml_deltamem_n_proj(&p) - 1;
                a.proj.data()[a.entries[0][0] * a.proj_stride + row] = NAN;

                const result  res   = run_kernel(a);
                const float * first = res.reads.data() + a.entries[0][0] * a.read_stride;
                const float * next  = res.reads.data() + a.entries[0][GGML_DELTAMEM_PLAN_TOKEN] * a.read_stride;

                bool in_first = false, in_next = false;
                for (int i = 0; i < rank; ++i) {
                    in_first = in_first || std::isnan(first[i]);
                    in_next  = in_next || std::isnan(next[i]);
                }
                check(part == 0 ? in_first && !in_next : !in_first && in_next,
                      "rank %d, mode %d: NaN in part %d is lost or astray", rank, mode, part);
            }
        }
    }
    printf("%-44s%s\n", "a NaN in comes out", n_failed > before ? "  FAILED" : " as it should");
}

// A value of half precision up to 2 and its bits; one in eight is subnormal.
static float random_half(random_source & random, uint16_t & bits) {
    const int sign = random.below(2), exponent = random.below(8) ? 8 + random.below(8) : 0,
              mantissa = random.below(1024);
    bits               = (uint16_t) (sign << 15 | exponent << 10 | mantissa);
    return (sign ? -1.0f : 1.0f) *
           std::ldexp((float) (exponent ? 1024 + mantissa : mantissa), (exponent ? exponent : 1) - 25);
}

// Rows of weights, stored in float32 or half precision; NaN in the gaps between them.
class random_weights {
public:
    random_weights(random_source & random, int n_rows, int n, size_t stride, bool half) :
        half(half), values(n_rows * stride), halves(values.size() + 1, 0x7e00) {
        for (int row = 0; row < n_rows; ++row) {
            for (int i = 0; i < n; ++i) {
                float & w = values.data()[row * stride + i];
                w         = half ? random_half(random, halves[1 + row * stride + i]) : random.normal();
            }
        }
    }

    const float * data() const { return values.data(); }

    const void * stored() const { return half ? (const void *) (halves.data() + 1) : data(); }

private:
    bool                  half;
    guarded               values;
    std::vector<uint16_t> halves; // the first is not used
};

// std::max loses a NaN, which is what stands where nothing was written
static double greater(double worst, double error) {
    return std::isnan(error) ? INFINITY : std::max(worst, error);
}

// dst = out + added + read weight, weights in float32 or half precision, for widths around every vector's, in place and not,
// with gaps between rows
static void test_corrections() {
    const int before = n_failed;

    for (int n_out : { 1, 3, 4, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 256, 300 }) {
        for (int n_read : { 1, 2, 4, 8, 16, 33 }) {
            for (int n_tokens : { 1, 2, 5 }) {
                for (int way = 0; way < 12; ++way) {
                    const bool half = way & 1, addition = way & 2;
                    const int  place = way / 4; // dst is another, out or added
                    if (addition ? is_cuda : place == 2) {
                        continue;
                    }
                    random_source random(1200 * n_out + 10 * n_read + n_tokens);
                    const size_t  weight_stride = n_out + 3, read_stride = n_read + 1, out_stride = n_out + 2;

                    const random_weights weight(random, n_read, n_out, weight_stride, half);
                    guarded read(n_tokens * read_stride), out(n_tokens * out_stride), other(n_tokens * out_stride),
                            added(n_tokens * out_stride);
                    for (int t = 0; t < n_tokens; ++t) {
                        for (int j = 0; j < n_read; ++j) {
                            read.data()[t * read_stride + j] = random.normal();
                        }
                        for (int i = 0; i < n_out; ++i) {
                            out.data()[t * out_stride + i]   = random.normal();
                            added.data()[t * out_stride + i] = addition ? random.normal() : 0.0f;
                        }
                    }
                    const std::vector<float> base(out.data(), out.data() + out.size());
                    const std::vector<float> base_added(added.data(), added.data() + added.size());

                    guarded &             dst  = place == 0 ? other : place == 1 ? out : added;
                    deltamem_correct_args args = {};
                    args.out                   = out.data();
                    args.out_stride            = out_stride;
                    args.weight                = weight.stored();
                    args.weight_stride         = weight_stride;
                    args.read                  = read.data();
                    args.read_stride           = read_stride;
                    args.added                 = addition ? added.data() : nullptr;
                    args.added_stride          = out_stride;
                    args.dst                   = dst.data();
                    args.dst_stride            = out_stride;
                    args.n_out                 = n_out;
                    args.n_read                = n_read;
                    args.n_tokens              = n_tokens;
                    args.half                  = half;
                    deltamem_correct_forward(&args);

                    // 35 terms of normal size: each product and sum rounds by u of some 6, so 50 u at most
                    double worst  = 0.0;
                    bool   intact = dst.guards_intact() && out.guards_intact() && added.guards_intact();
                    for (int t = 0; t < n_tokens; ++t) {
                        for (size_t i = 0; i < out_stride; ++i) {
                            const float got = dst.data()[t * out_stride + i];
                            if (i >= (size_t) n_out) {
                                intact = intact && is_guard(got);
                                continue;
                            }
                            double expected = (double) base[t * out_stride + i] + base_added[t * out_stride + i];
                            for (int j = 0; j < n_read; ++j) {
                                expected += (double) weight.data()[j * weight_stride + i] *
                                            read.data()[t * read_stride + j];
                            }
                            worst = greater(worst, std::fabs(got - expected));
                        }
                    }
                    check(worst <= 50 * 6e-8 * 6, "outputs %d, columns %d, tokens %d: a correction is off by %g", n_out,
                          n_read, n_tokens, worst);
                    check(intact, "outputs %d, columns %d, tokens %d: a correction writes past its rows", n_out, n_read,
                          n_tokens);
                }
            }
        }
    }
    printf("%-44s%s\n", "corrections", n_failed > before ? "  FAILED" : " within 50 u");
}

// Weights in Q8_0, rows of n_blocks blocks: what is stored, and its values.
class blocks_of_weights {
public:
    blocks_of_weights(random_source & random, int n_rows, int n_blocks) :
        n(n_blocks * 32), bytes((size_t) n_rows * n_blocks * 34) {
        for (size_t at = 0; at < bytes.size(); at += 34) {
            uint16_t    bits;
            const float d = random_half(random, bits);
            memcpy(&bytes[at], &bits, sizeof(bits));
            for (int i = 0; i < 32; ++i) {
                const int8_t q    = (int8_t) (random.below(256) - 128);
                bytes[at + 2 + i] = (uint8_t) q;
                values.push_back(d * (float) q);
            }
        }
    }

    const float * data() const { return values.data(); }

    const void * stored() const { return bytes.data(); }

    const int n;

private:
    std::vector<uint8_t> bytes;
    std::vector<float>   values;
};

// What a product gives, against double precision: relative to the sum of the terms' sizes, off by `tolerance` at most.
static void test_product(const deltamem_product_args & args, guarded & dst, const float * weight, size_t weight_stride,
                         double tolerance, const std::function<void()> & compute) {
    const std::vector<float> out(args.out ? args.out : dst.data(), (args.out ? args.out : dst.data()) + dst.size());
    const std::vector<float> added(args.added ? args.added : dst.data(),
                                   (args.added ? args.added : dst.data()) + dst.size());
    compute();

    double worst  = 0.0;
    bool   intact = dst.guards_intact();
    for (int t = 0; t < args.n_tokens; ++t) {
        for (size_t row = 0; row < args.dst_stride; ++row) {
            const float got = dst.data()[t * args.dst_stride + row];
            if (row >= (size_t) args.n_out) {
                intact = intact && is_guard(got);
                continue;
            }
            double expected = 0.0, size = 1e-30;
            for (int i = 0; i < args.n_in; ++i) {
                const double term = (double) weight[row * weight_stride + i] * args.in[t * args.in_stride + i];
                expected += term;
                size += std::fabs(term);
            }
            for (const auto & [base, more] : { std::pair(args.out, &out), std::pair(args.added, &added) }) {
                if (base) {
                    expected += (*more)[t * args.dst_stride + row];
                    size += std::fabs((*more)[t * args.dst_stride + row]);
                }
            }
            worst = greater(worst, std::fabs(got - expected) / size);
        }
    }
    check(worst <= tolerance, "inputs %d, outputs %d, tokens %d: a product is off by %g", (int) args.n_in,
          (int) args.n_out, (int) args.n_tokens, worst);
    check(intact, "inputs %d, outputs %d, tokens %d: a product writes past its rows", (int) args.n_in, (int) args.n_out,
          (int) args.n_tokens);
}

// inputs, what is corrected, and what is added, with gaps between rows
struct product_problem {
    deltamem_product_args args = {};
    guarded               in, other, out, added;

    product_problem(random_source & random, int n_in, int n_out, int n_tokens) :
        in((size_t) n_tokens * (n_in + 1)),
        other((size_t) n_tokens * (n_out + 2)),
        out(other.size()),
        added(other.size()) {
        args.in         = in.data();
        args.in_stride  = n_in + 1;
        args.dst_stride = args.out_stride = args.added_stride = n_out + 2;

        args.n_in     = n_in;
        args.n_out    = n_out;
        args.n_tokens = n_tokens;
        for (int t = 0; t < n_tokens; ++t) {
            for (int i = 0; i < n_in; ++i) {
                in.data()[t * args.in_stride + i] = random.normal();
            }
            for (int i = 0; i < n_out; ++i) {
                out.data()[t * args.out_stride + i]     = random.normal();
                added.data()[t * args.added_stride + i] = random.normal();
            }
        }
    }

    // by weights in Q8_0
    product_problem(random_source & random, const blocks_of_weights & weight, int n_out, int n_tokens) :
        product_problem(random, weight.n, n_out, n_tokens) {
        args.weight        = weight.stored();
        args.weights       = DELTAMEM_WEIGHTS_Q8_0;
        args.weight_stride = weight.n / 32;
    }

    // 0: a product; 1: a correction in place; 2: a correction and an addition, in the place of what is added
    guarded & set(int way) {
        args.out   = way > 0 ? out.data() : nullptr;
        args.added = way > 1 ? added.data() : nullptr;

        guarded & dst = way == 0 ? other : way == 1 ? out : added;
        args.dst      = dst.data();
        return dst;
    }
};

// dst = out + added + in weight^T, for widths around every vector's
static void test_products() {
    const int before = n_failed;

    // a sum of n terms is off by n u at most
    const auto test = [](product_problem & p, guarded & dst, const float * weight, size_t stride) {
        test_product(p.args, dst, weight, stride, (p.args.n_in + 4) * 6e-8, [&] { deltamem_product_forward(&p.args); });
    };
    for (int n_out : { 1, 2, 13 }) {
        for (int n_tokens : { 1, 3 }) {
            for (int way = 0; way < 3; ++way) {
                for (int n_in : { 1, 7, 8, 16, 31, 63, 64, 65, 100, 256, 2560 }) {
                    for (bool half : { false, true }) {
                        random_source        random(1300 * n_in + 10 * n_out + n_tokens);
                        const random_weights weight(random, n_out, n_in, n_in + 3, half);
                        product_problem      p(random, n_in, n_out, n_tokens);
                        guarded &            dst = p.set(way);
                        p.args.weight            = weight.stored();
                        p.args.weights           = half ? DELTAMEM_WEIGHTS_F16 : DELTAMEM_WEIGHTS_F32;
                        p.args.weight_stride     = n_in + 3;
                        test(p, dst, weight.data(), n_in + 3);
                    }
                }
                for (int n_blocks : { 1, 2, 3, 4, 5, 18, 80 }) {
                    random_source           random(1400 * n_blocks + 10 * n_out + n_tokens);
                    const blocks_of_weights weight(random, n_out, n_blocks);
                    product_problem         p(random, weight, n_out, n_tokens);
                    guarded &               dst = p.set(way);
                    test(p, dst, weight.data(), weight.n);
                }
            }
        }
    }
    printf("%-44s%s\n", "products", n_failed > before ? "  FAILED" : " within n u");
}

// The same by AMX. bfloat16 has eight digits, so a product of two is off by 2^-8 of itself. A token's results do not depend on
// how many threads there are, nor on the other tokens.
static void test_tiles() {
    const int before = n_failed;

    for (int n_out : { 1, 15, 16, 17, 33, 96, 129, 300 }) {
        for (int n_blocks : { 1, 2, 12, 13, 40 }) {
            for (int n_tokens : { 1, 5, 16, 17, 32, 33, 100 }) {
                for (int way = 0; way < 3; ++way) {
                    random_source           random(1500 * n_blocks + 10 * n_out + n_tokens);
                    const blocks_of_weights weight(random, n_out, n_blocks);
                    product_problem         p(random, weight, n_out, n_tokens);
                    guarded &               dst = p.set(way);

                    const std::vector<float> given(dst.data(), dst.data() + dst.size());
                    test_product(p.args, dst, weight.data(), weight.n, 0x1p-8,
                                 [&] { deltamem_tiles_forward(&p.args, 0, 1); });
                    const std::vector<float> all(dst.data(), dst.data() + dst.size());

                    std::copy(given.begin(), given.end(), dst.data());
                    for (int ith = 0; ith < 3; ++ith) {
                        deltamem_tiles_forward(&p.args, ith, 3);
                    }
                    check(same_bits(std::vector<float>(dst.data(), dst.data() + dst.size()), all),
                          "inputs %d, outputs %d, tokens %d: three threads change a product", weight.n, n_out,
                          n_tokens);

                    std::copy(given.begin(), given.end(), dst.data());
                    deltamem_product_args last = p.args;
                    const size_t          at   = (n_tokens - 1) * last.dst_stride;
                    last.in += (n_tokens - 1) * last.in_stride;
                    last.dst += at;
                    last.out      = last.out ? last.out + at : nullptr;
                    last.added    = last.added ? last.added + at : nullptr;
                    last.n_tokens = 1;
                    deltamem_tiles_forward(&last, 0, 1);
                    check(same_bits(std::vector<float>(last.dst, last.dst + n_out),
                                    std::vector<float>(all.begin() + at, all.begin() + at + n_out)),
                          "inputs %d, outputs %d, tokens %d: the other tokens change the last one's product", weight.n,
                          n_out, n_tokens);
                }
            }
        }
    }
    printf("%-44s%s\n", "products by tiles", n_failed > before ? "  FAILED" : " within 2^-8");
}

// Plans that anybody may have sent: every number of one that fits is replaced by others.
static void test_plans() {
    constexpr int n_seqs = 2, n_tokens = 5, n_slots = 4;

    const int32_t good[] = {
        3, 0,
        2, // slot, first, count
        1, 2,
        3, //
        4, GGML_DELTAMEM_TOKEN_WRITE,
        0, GGML_DELTAMEM_TOKEN_WRITE | GGML_DELTAMEM_TOKEN_CHECKPOINT(0),
        1, 0,
        2, GGML_DELTAMEM_TOKEN_CHECKPOINT(2),
        3, GGML_DELTAMEM_TOKEN_WRITE,
    };
    std::vector<int32_t> plan(std::begin(good), std::end(good));
    const auto fits = [&](int seq) { return deltamem_sequence_fits(plan.data(), n_seqs, seq, n_tokens, n_slots); };
    check(fits(0) && fits(1), "a plan that fits is refused");

    struct change {
        int  at;
        int  value;
        bool fits;
    };
    const int    n_entry   = GGML_DELTAMEM_PLAN_SEQ * n_seqs + GGML_DELTAMEM_PLAN_TOKEN * 2; // the first of sequence 1
    const change changes[] = {
        { 3, 0, true },
        { 3, n_slots - 1, true },
        { 3, n_slots, false },
        { 3, -1, false },
        { 3, INT32_MAX, false },
        { 3, INT32_MIN, false },
        { 4, 0, true },
        { 4, 3, false },
        { 4, -1, false },
        { 4, INT32_MAX, false },
        { 4, INT32_MIN, false },
        { 5, 0, true },
        { 5, 4, false },
        { 5, -1, false },
        { 5, INT32_MAX, false },
        { 5, INT32_MIN, false },
        { n_entry, n_tokens - 1, true },
        { n_entry, n_tokens, false },
        { n_entry + 2, -1, false },
        { n_entry + 4, INT32_MAX, false },
        { n_entry, INT32_MIN, false },
        { n_entry + 1, GGML_DELTAMEM_TOKEN_CHECKPOINT(n_slots - 1), true },
        { n_entry + 1, GGML_DELTAMEM_TOKEN_CHECKPOINT(n_slots), false },
        { n_entry + 5, GGML_DELTAMEM_TOKEN_CHECKPOINT(1 << 20), false },
        { n_entry + 3, INT32_MAX, false },
        { n_entry + 3, -1, false },
        { n_entry + 5, INT32_MIN, false },
    };
    for (const change & c : changes) {
        plan[c.at] = c.value;
        check(fits(1) == c.fits, "a plan with %d at %d: %s", c.value, c.at, c.fits ? "refused" : "accepted");
        check(fits(0), "a plan with %d at %d: another sequence of it is refused", c.value, c.at);
        plan[c.at] = good[c.at];
    }
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s NAME [--quick] [--flush]\n", argv[0]);
        return 1;
    }
    for (int i = 2; i < argc; ++i) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
        } else if (strcmp(argv[i], "--flush") == 0) {
            vanishing /= 1e-6; // a denormal key that is taken for 0, over the least norm
        } else {
            fprintf(stderr, "unknown option %s\n", argv[i]);
            return 1;
        }
    }

    is_cuda = strcmp(argv[1], "CUDA") == 0;
    printf("instruction set: %s\n", deltamem_simd_name());
    check(strcmp(deltamem_simd_name(), argv[1]) == 0, "compiled for %s, expected %s", deltamem_simd_name(), argv[1]);

    test_token_writes();
    test_many_tokens();
    test_segment_writes();
    if (!is_cuda) {
        test_deferred_writes();
    }
    test_special_values();
    test_activations();
    test_same_bits();
    test_checkpoints();
    test_plans();
    test_nan();
    test_corrections();
    if (!is_cuda) {
        test_products();
        if (deltamem_has_tiles()) {
            test_tiles();
        }
    }

    return finish(argv[1]);
}
