// The schedule of a composite (deltamem-composite.h): a plan, as runs of the recurrence. Compiled into ggml-base.

#include "deltamem-composite.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace {

struct step {
    int32_t write, read; // rows
};

struct run {
    int32_t           source = 0;
    std::vector<step> steps;

    void write(int32_t row, int32_t none) { steps.push_back({ row, none }); }

    void read(int32_t row, int32_t none) {
        if (steps.empty() || steps.back().read != none) {
            steps.push_back({ none, none });
        }
        steps.back().read = row;
    }

    // what ends with the same state, and reads nothing
    run without_reads(int32_t none) const {
        run copy = *this;
        for (step & each : copy.steps) {
            each.read = none;
        }
        return copy;
    }
};

// of projections
struct sum {
    std::vector<int32_t> tokens;
    int32_t              carry = 0; // the sequence whose record begins it, n_seqs for none
    int32_t              seq   = 0;
};

// one sequence of a plan
struct sequence {
    run state;   // reads, and ends with S
    run pending; // ends with the pending state
    run before;  // reads of an ingest that began in an earlier batch, until it is committed here

    std::vector<std::pair<int32_t, run>> checkpoints; // slot, and what ends with its state

    std::vector<int32_t> ingest; // rows that the pending state has and S has not: means
    sum                  left;   // what its segment has so far
};

// where a token is read: which run of a sequence, and its step
struct place {
    int32_t seq    = 0;
    bool    before = false;
    int64_t step   = 0;
};

class scheduler {
public:
    scheduler(const ggml_deltamem_params & params, const int32_t * plan, int64_t n_tokens) :
        segments(params.flags & GGML_DELTAMEM_SEGMENTS),
        n_seqs(params.n_seqs),
        n_tokens((int32_t) n_tokens),
        plan(plan),
        entries(plan + GGML_DELTAMEM_PLAN_SEQ * (int64_t) n_seqs),
        seqs(n_seqs),
        places(n_tokens) {}

    ggml_deltamem_schedule make() {
        s.n_tokens = n_tokens;
        s.n_seqs   = n_seqs;
        s.n_means  = segments ? count_means() : 0;
        none       = n_tokens + (int32_t) s.n_means;
        for (int32_t i = 0; i < n_seqs; ++i) {
            follow(i);
        }
        lay_out_runs();
        if (segments) {
            lay_out_sums();
        }
        return s;
    }

private:
    const bool      segments;
    const int32_t   n_seqs, n_tokens;
    const int32_t * plan;
    const int32_t * entries;

    ggml_deltamem_schedule s;
    int32_t                none = 0; // the row of zeros

    std::vector<sequence> seqs;
    std::vector<sum>      means;
    std::vector<place>    places;

    // The means come before the row of zeros, so their number is asked first. Rounded up, so that graphs are reused.
    int64_t count_means() const {
        int64_t n = 0;
        for (int64_t e = 0; e < n_tokens; ++e) {
            const int32_t bits = entries[GGML_DELTAMEM_PLAN_TOKEN * e + 1];
            n += (bits & GGML_DELTAMEM_TOKEN_SEGMENT) != 0;
            n += (bits & GGML_DELTAMEM_TOKEN_COMMIT) != 0;
        }
        return GGML_PAD(std::max<int64_t>(n, 1), 16);
    }

    // whether the first ingest that these entries commit began in an earlier batch
    bool is_carried(const int32_t * entry, const int32_t * end) const {
        for (; segments && entry < end; entry += GGML_DELTAMEM_PLAN_TOKEN) {
            if (entry[1] & GGML_DELTAMEM_TOKEN_BEGIN) {
                return false;
            }
            if (entry[1] & GGML_DELTAMEM_TOKEN_COMMIT) {
                return true;
            }
        }
        return false;
    }

    // makes the runs of sequence i, entry by entry
    void follow(int32_t i) {
        const int32_t slot  = plan[GGML_DELTAMEM_PLAN_SEQ * i];
        const int64_t first = plan[GGML_DELTAMEM_PLAN_SEQ * i + 1], count = plan[GGML_DELTAMEM_PLAN_SEQ * i + 2];
        if (slot < 0 || first < 0 || count < 0 || first + count > n_tokens) {
            throw std::runtime_error("sequence " + std::to_string(i) +
                                     " of the plan has a slot or entries that there are not");
        }
        const int32_t * entry = entries + GGML_DELTAMEM_PLAN_TOKEN * first;
        const int32_t * end   = entry + GGML_DELTAMEM_PLAN_TOKEN * count;

        const int32_t S = segments ? i : slot, pending = n_seqs + i; // sources
        const bool    carried = is_carried(entry, end);

        sequence & seq     = seqs[i];
        seq.state.source   = carried ? pending : S;
        seq.pending.source = pending;
        seq.before.source  = S;
        seq.left           = { {}, i, i };

        run * now        = carried ? &seq.before : &seq.state; // ends with S as it is
        bool  has_writes = false;                              // of tokens, that the pending state has not

        for (; entry < end; entry += GGML_DELTAMEM_PLAN_TOKEN) {
            const int32_t token = entry[0];
            const int32_t bits  = entry[1];
            if (token < 0 || token >= n_tokens) {
                throw std::runtime_error("the plan names token " + std::to_string(token) + ", which there is not");
            }
            if (segments && (bits & GGML_DELTAMEM_TOKEN_BEGIN)) {
                seq.pending = now->without_reads(none);
                seq.ingest.clear();
                seq.left   = { {}, n_seqs, i };
                has_writes = false;
            }

            now->read(token, none);
            places[token] = { i, now == &seq.before, (int64_t) now->steps.size() - 1 };

            if (bits & GGML_DELTAMEM_TOKEN_WRITE) {
                now->write(token, none);
                has_writes = now == &seq.state;
            }
            if (segments && (bits & GGML_DELTAMEM_TOKEN_SEGMENT)) {
                end_segment(seq);
            }
            if (segments && (bits & GGML_DELTAMEM_TOKEN_ACCUMULATE)) {
                seq.left.tokens.push_back(token);
            }
            if (segments && (bits & GGML_DELTAMEM_TOKEN_COMMIT)) {
                if (has_writes) {
                    throw std::runtime_error("token writes of sequence " + std::to_string(i) +
                                             " lie within an ingest, which operations of ggml do not compute");
                }
                end_segment(seq);
                for (const int32_t row : seq.ingest) {
                    seq.state.write(row, none);
                }
                seq.ingest.clear();
                now = &seq.state;
            }
            if (const int32_t kept = GGML_DELTAMEM_TOKEN_CHECKPOINT_SLOT(bits); kept >= 0) {
                seq.checkpoints.push_back({ kept, now->without_reads(none) });
            }
        }
    }

    // its mean is a row, which the pending state gets
    void end_segment(sequence & seq) {
        const int32_t row = n_tokens + (int32_t) means.size();
        means.push_back(seq.left);
        seq.left = { {}, n_seqs, seq.left.seq };
        seq.pending.write(row, none);
        seq.ingest.push_back(row);
    }

    // the states of sequences and checkpoints, the same of the pending states, the reads before
    void lay_out_runs() {
        std::vector<const run *> runs;
        for (int32_t i = 0; i < n_seqs; ++i) {
            s.slot.push_back(plan[GGML_DELTAMEM_PLAN_SEQ * i]);
            runs.push_back(&seqs[i].state);
        }
        for (const sequence & seq : seqs) {
            for (const auto & [slot, kept] : seq.checkpoints) {
                s.slot.push_back(slot);
                runs.push_back(&kept);
            }
        }
        s.n_records = (int64_t) runs.size();
        if (segments) {
            for (const sequence & seq : seqs) {
                runs.push_back(&seq.pending);
            }
            for (int64_t i = n_seqs; i < s.n_records; ++i) {
                runs.push_back(runs[i]);
            }
            for (const sequence & seq : seqs) {
                runs.push_back(&seq.before);
            }
        }
        s.n_runs = (int64_t) runs.size();

        s.n_steps = 1;
        for (const run * each : runs) {
            s.n_steps = std::max(s.n_steps, (int64_t) each->steps.size());
        }
        s.write.assign(s.n_runs * s.n_steps, none);
        s.read.assign(s.n_runs * s.n_steps, none);
        for (int64_t r = 0; r < s.n_runs; ++r) {
            s.source.push_back(runs[r]->source);
            for (size_t i = 0; i < runs[r]->steps.size(); ++i) {
                s.write[r * s.n_steps + i] = runs[r]->steps[i].write;
                s.read[r * s.n_steps + i]  = runs[r]->steps[i].read;
            }
        }
        for (const place & p : places) {
            const int64_t r = p.before ? s.n_runs - n_seqs + p.seq : p.seq;
            s.out.push_back((int32_t) (r * s.n_steps + p.step));
        }
    }

    // Where each token is among those of its sequence. Of a single sequence, the order of all tokens is as good.
    std::vector<int32_t> lay_out_members() {
        std::vector<int32_t> column(n_tokens);
        if (n_seqs == 1) {
            std::iota(column.begin(), column.end(), 0);
            s.n_each = n_tokens;
            return column;
        }
        s.n_each = 1;
        for (int32_t i = 0; i < n_seqs; ++i) {
            s.n_each = std::max<int64_t>(s.n_each, plan[GGML_DELTAMEM_PLAN_SEQ * i + 2]);
        }
        s.member.assign(n_seqs * s.n_each, n_tokens);
        for (int32_t i = 0; i < n_seqs; ++i) {
            const int64_t first = plan[GGML_DELTAMEM_PLAN_SEQ * i + 1], count = plan[GGML_DELTAMEM_PLAN_SEQ * i + 2];
            for (int64_t j = 0; j < count; ++j) {
                const int32_t token        = entries[GGML_DELTAMEM_PLAN_TOKEN * (first + j)];
                s.member[i * s.n_each + j] = token;
                column[token]              = (int32_t) j;
            }
        }
        return column;
    }

    // of the means, then of the records; a checkpoint's is zero
    void lay_out_sums() {
        const int64_t              n_sums = s.n_means + s.n_records;
        const std::vector<int32_t> column = lay_out_members();
        s.first.assign(s.slot.begin(), s.slot.begin() + n_seqs);
        s.weight.assign(n_seqs * n_sums * s.n_each, 0.0f);
        s.pick.assign(n_seqs > 1 ? n_sums : 0, 0);
        s.carry.assign(n_sums, n_seqs);
        s.one.assign(n_tokens, 1.0f);
        s.count.assign(n_sums, 0.0f);

        const auto lay_out = [&](int64_t at, const sum & of) {
            const int64_t row = of.seq * n_sums + at;
            for (const int32_t token : of.tokens) {
                s.weight[row * s.n_each + column[token]] = 1.0f;
            }
            if (n_seqs > 1) {
                s.pick[at] = (int32_t) row;
            }
            s.carry[at] = of.carry;
            s.count[at] = (float) of.tokens.size();
        };
        for (size_t i = 0; i < means.size(); ++i) {
            lay_out((int64_t) i, means[i]);
        }
        int64_t at = s.n_means;
        for (int32_t i = 0; i < n_seqs; ++i) {
            lay_out(at++, seqs[i].left);
        }
        for (int32_t i = 0; i < n_seqs; ++i) {
            for (size_t k = 0; k < seqs[i].checkpoints.size(); ++k) {
                lay_out(at++, { {}, n_seqs, i });
            }
        }
    }
};

} // namespace

bool ggml_deltamem_schedule::has_shape_of(const ggml_deltamem_schedule & other) const {
    return n_tokens == other.n_tokens && n_seqs == other.n_seqs && n_records == other.n_records &&
           n_means == other.n_means && n_runs == other.n_runs && n_steps == other.n_steps && n_each == other.n_each;
}

ggml_deltamem_schedule ggml_deltamem_make_schedule(const ggml_deltamem_params & params, const int32_t * plan,
                                                   int64_t n_tokens) {
    return scheduler(params, plan, n_tokens).make();
}
