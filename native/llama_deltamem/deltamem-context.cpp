// What each token of a batch does: checks a batch and its description, and makes the plan of each micro-batch.

#include "deltamem-context.h"

#include "llama-batch.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

llama_deltamem_context::llama_deltamem_context(llama_deltamem_weights_ptr weights, uint32_t n_seq_max) :
    weights(weights),
    state(*weights, n_seq_max + LLAMA_DELTAMEM_MAX_CHECKPOINTS),
    covered(weights->layers.size()),
    sequences(n_seq_max) {}

int llama_deltamem_context::find_layer(int il) const {
    const auto & layers = weights->layers;
    const auto   it     = std::lower_bound(layers.begin(), layers.end(), il,
                                           [](const llama_deltamem_layer_weights & lw, int il) { return lw.il < il; });
    return it != layers.end() && it->il == il ? (int) (it - layers.begin()) : -1;
}

void llama_deltamem_context::set_segments(const int32_t * segments, const int8_t * ends, int32_t n_tokens) {
    next.has_segments = true;
    next.segments.assign(segments, segments + n_tokens);
    next.ends.clear();
    if (ends) {
        next.ends.assign(ends, ends + n_tokens);
    }
}

void llama_deltamem_context::begin_batch() {
    // a description holds for one llama_decode, even if it is refused
    description given;
    std::swap(given, next);

    current       = {};
    n_checkpoints = 0;
    failed        = true;

    const size_t n_tokens = batch.size();
    if (!given.checkpoints.empty() && given.checkpoints.back() >= (int64_t) n_tokens) {
        throw std::runtime_error(format("a checkpoint after token %d was asked for, the batch has %zu",
                                        given.checkpoints.back(), n_tokens));
    }
    if (given.has_segments && given.segments.size() != n_tokens) {
        throw std::runtime_error(
                format("segments were given for %zu tokens, the batch has %zu", given.segments.size(), n_tokens));
    }
    deal_out_tokens(given.has_segments);
    if (given.has_segments) {
        if (given.ends.empty()) {
            given.ends.resize(n_tokens, 0);
            for (const sequence & s : sequences) {
                if (!s.tokens.empty()) {
                    given.ends[s.tokens.back()] = 1;
                }
            }
        }
        check_segments(given);
    }
    current = std::move(given);
}

void llama_deltamem_context::deal_out_tokens(bool with_segments) {
    for (sequence & s : sequences) {
        s.tokens.clear();
        s.n_planned = 0;
    }
    for (size_t i = 0; i < batch.size(); ++i) {
        if (batch[i].n_seqs != 1) {
            throw std::runtime_error(
                    format("token %zu of the batch belongs to %zu sequences; with an adapter attached, it must be one",
                           i, batch[i].n_seqs));
        }
        const llama_seq_id seq_id = batch[i].seq_id;
        if (seq_id < 0 || (uint32_t) seq_id >= n_seqs()) {
            throw std::runtime_error(
                    format("token %zu of the batch belongs to sequence %d, this context has %u sequences", i, seq_id,
                           n_seqs()));
        }
        check_whole(seq_id);
        if (sequences[seq_id].ingest.torn) {
            throw std::runtime_error(
                    format("a llama_decode that failed interrupted the ingest of sequence %d: abandon the ingest first",
                           seq_id));
        }
        if (!with_segments && sequences[seq_id].ingest.open && sequences[seq_id].write) {
            throw std::runtime_error(format(
                    "sequence %d has an unfinished ingest, and this batch gives it no segments: end or abandon the "
                    "ingest first",
                    seq_id));
        }
        sequences[seq_id].tokens.push_back((int32_t) i);
    }
}

void llama_deltamem_context::check_segments(const description & given) const {
    // segments are written in order: ids must not decrease within an ingest
    std::vector<int32_t> segment;
    for (const sequence & s : sequences) {
        segment.push_back(s.ingest.open ? s.ingest.segment : -1);
    }
    for (size_t i = 0; i < batch.size(); ++i) {
        const llama_seq_id seq_id = batch[i].seq_id;
        const int32_t      id     = given.segments[i];
        if (id < -1) {
            throw std::runtime_error(
                    format("token %zu of the batch has segment %d: ids are 0 and above, -1 for none", i, id));
        }
        if (id >= 0 && id < segment[seq_id]) {
            throw std::runtime_error(
                    format("token %zu of the batch has segment %d after segment %d: segment ids must not decrease "
                           "within an ingest",
                           i, id, segment[seq_id]));
        }
        segment[seq_id] = given.ends[i] ? -1 : std::max(segment[seq_id], id);
    }
}

void llama_deltamem_context::end_batch() {
    n_checkpoints = (int32_t) current.checkpoints.size();
    failed        = false;
    for (sequence & s : sequences) {
        if (!s.tokens.empty()) {
            s.torn = s.ingest.torn = s.begins_turn = false;
        }
    }
}

void llama_deltamem_context::check_whole(llama_seq_id seq_id) const {
    if (sequences[seq_id].torn) {
        throw std::runtime_error(
                format("the state of sequence %d is incomplete, because a llama_decode failed: set it, "
                       "reset it or copy another over it first",
                       seq_id));
    }
}

uint32_t llama_deltamem_context::checkpoint_slot(int32_t i) const {
    if (failed) {
        throw std::runtime_error("the last llama_decode failed and left no checkpoints");
    }
    if (i < 0 || i >= n_checkpoints) {
        throw std::runtime_error(format("the last batch left %d checkpoints, none has index %d", n_checkpoints, i));
    }
    return n_seqs() + i;
}

void llama_deltamem_context::preview_plan(const llama_ubatch & ubatch, std::vector<int32_t> & plan) {
    const bool has_tokens = ubatch.n_tokens > 0 && ubatch.seq_id && ubatch.seq_id[0];
    if (has_tokens) {
        const std::vector<sequence> before = sequences;
        make_plan(ubatch, plan);
        sequences = before;
        return;
    }
    const int32_t n_seqs = (int32_t) std::max(1u, ubatch.n_seqs_unq);
    plan.clear();
    for (int32_t s = 0; s < n_seqs; ++s) {
        const int32_t first = (int32_t) ((int64_t) ubatch.n_tokens * s / n_seqs);
        plan.insert(plan.end(), { s, first, (int32_t) ((int64_t) ubatch.n_tokens * (s + 1) / n_seqs) - first });
    }
    for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
        plan.insert(plan.end(), { i, GGML_DELTAMEM_TOKEN_WRITE });
    }
}

void llama_deltamem_context::make_plan(const llama_ubatch & ubatch, std::vector<int32_t> & plan) {
    const uint32_t n_seqs = std::max(1u, ubatch.n_seqs_unq);

    plan.assign(ggml_deltamem_n_plan(n_seqs, ubatch.n_tokens), 0);
    int32_t * seq   = plan.data();
    int32_t * entry = plan.data() + GGML_DELTAMEM_PLAN_SEQ * n_seqs;

    int32_t first = 0;
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const llama_seq_id seq_id = ubatch.seq_id_unq[s];
        sequence &         sq     = sequences[seq_id];

        int32_t count = 0;
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.seq_id[i][0] != seq_id) {
                continue;
            }

            // its index in the batch; -1 if begin_batch was not given it
            const int32_t at = sq.n_planned < sq.tokens.size() ? sq.tokens[sq.n_planned++] : -1;

            int32_t bits = 0;
            if (!current.has_segments || at < 0) {
                bits = sq.write ? GGML_DELTAMEM_TOKEN_WRITE : 0;
            } else {
                const int32_t id = sq.write ? current.segments[at] : -1;

                if (!sq.ingest.open) {
                    bits |= GGML_DELTAMEM_TOKEN_BEGIN;
                    sq.ingest = { /*.open =*/true, /*.segment =*/-1 };
                }
                if (id >= 0) {
                    if (sq.ingest.segment >= 0 && id != sq.ingest.segment) {
                        bits |= GGML_DELTAMEM_TOKEN_SEGMENT;
                    }
                    bits |= GGML_DELTAMEM_TOKEN_ACCUMULATE;
                    sq.ingest.segment = id;
                }
                if (current.ends[at]) {
                    bits |= GGML_DELTAMEM_TOKEN_COMMIT;
                    sq.torn |= sq.ingest.segment >= 0; // an ingest without segments writes nothing
                    sq.ingest = {};
                }
            }

            if (sq.begins_turn && sq.n_planned == 1) {
                bits |= GGML_DELTAMEM_TOKEN_TURN;
            }
            if (defers_replies() && !sq.replies) {
                bits |= GGML_DELTAMEM_TOKEN_PRESENT;
            }

            if (!current.checkpoints.empty()) {
                const auto & marks = current.checkpoints;
                const auto   it    = std::lower_bound(marks.begin(), marks.end(), at);
                if (it != marks.end() && *it == at) {
                    bits |= GGML_DELTAMEM_TOKEN_CHECKPOINT((int32_t) (this->n_seqs() + (it - marks.begin())));
                }
            }

            sq.torn |= (bits & GGML_DELTAMEM_TOKEN_WRITE) != 0;
            sq.ingest.torn |= current.has_segments && at >= 0;

            entry[0] = (int32_t) i;
            entry[1] = bits;
            entry += GGML_DELTAMEM_PLAN_TOKEN;
            count++;
        }

        seq[0] = seq_id;
        seq[1] = first;
        seq[2] = count;
        seq += GGML_DELTAMEM_PLAN_SEQ;
        first += count;
    }
}
