// An adapter attached to one llama_context: its states, which sequences write, and the plan of each micro-batch.
#pragma once

#include "deltamem-adapter.h"
#include "deltamem-state.h"

#include <cstdint>
#include <string>
#include <vector>

struct llama_ubatch;

// a token of a batch
struct llama_deltamem_token {
    size_t       n_seqs;
    llama_seq_id seq_id; // the first of them
};

struct llama_deltamem_context {
    const llama_deltamem_weights_ptr weights;

    llama_deltamem_state state;

    std::vector<llama_deltamem_token>
            batch; // the tokens of the batch that begins; a member, so that its memory is allocated once

    // what the last graph built for each layer with memory; attaching checks it after it has reserved a graph
    struct coverage {
        bool        read    = false;
        uint32_t    targets = 0; // bits of enum llama_deltamem_target that were corrected
        std::string problem;     // why the layer cannot be hooked, "" if it can
    };
    std::vector<coverage> covered; // per layer with memory
    int64_t               n_graphs = 0;

    llama_deltamem_context(llama_deltamem_weights_ptr weights, uint32_t n_seq_max);

    // index of the model's layer among those with memory, -1 if it has none
    int find_layer(int il) const;

    uint32_t n_seqs() const { return (uint32_t) sequences.size(); }
    bool     has_segments() const { return weights->params.flags & GGML_DELTAMEM_SEGMENTS; }
    bool     defers() const { return weights->params.flags & GGML_DELTAMEM_DEFERRED; }

    bool get_write(llama_seq_id seq_id) const { return sequences[seq_id].write; }
    void set_write(llama_seq_id seq_id, bool write) { sequences[seq_id].write = write; }
    bool defers_replies() const { return weights->granularity == LLAMA_DELTAMEM_REPLY_DEFERRED; }
    void set_replies(llama_seq_id seq_id, bool replies) { sequences[seq_id].replies = replies; }
    void set_begins_turn(llama_seq_id seq_id, bool begins) { sequences[seq_id].begins_turn = begins; }
    bool begins_turn(llama_seq_id seq_id) const { return sequences[seq_id].begins_turn; }
    void abandon_ingest(llama_seq_id seq_id) { sequences[seq_id].ingest = {}; }

    // The sequence got a new state: one that a failed batch left incomplete is gone, and so is an unfinished ingest. Where
    // writes are deferred, the turn reads the new state.
    void renew(llama_seq_id seq_id) {
        sequences[seq_id].torn = sequences[seq_id].begins_turn = false;
        abandon_ingest(seq_id);
    }

    // throws std::runtime_error if a failed batch has left the sequence's state incomplete
    void check_whole(llama_seq_id seq_id) const;

    // describes the next batch; see llama_deltamem_set_segments
    void set_segments(const int32_t * segments, const int8_t * ends, int32_t n_tokens);

    // tokens of the next batch that leave a checkpoint; see llama_deltamem_set_checkpoints
    void set_checkpoints(const int32_t * tokens, int32_t n_tokens) {
        next.checkpoints.assign(tokens, tokens + n_tokens);
    }

    // the slot of checkpoint i of the last batch; throws std::runtime_error
    uint32_t checkpoint_slot(int32_t i) const;

    // Takes the description for `batch` and checks it. Throws std::runtime_error with the reason to refuse the batch.
    void begin_batch();

    // The batch was computed. A batch without end_batch has failed.
    void end_batch();

    // The plan (ggml-deltamem.h) of a micro-batch of the current batch; called in the order of computation.
    void make_plan(const llama_ubatch & ubatch, std::vector<int32_t> & plan);

    // The plan that make_plan will make of it. llama-cpp-python up to 0.3.35 reserves memory for a micro-batch whose tokens
    // have no sequences: its plan has as many writes.
    void preview_plan(const llama_ubatch & ubatch, std::vector<int32_t> & plan);

private:
    // tokens that read the state as it was before the first of them, and write it when the last one ends
    struct ingest {
        bool    open    = false;
        int32_t segment = -1;    // the one that the running sum belongs to, -1 if none
        bool    torn    = false; // a batch that failed, or has not ended, has summed some of its tokens
    };

    struct sequence {
        bool          write = true;
        bool          torn  = false; // a batch that failed, or has not ended, has written the state of some layers
        bool          begins_turn = false; // with its next token
        bool          replies     = false; // whether its tokens are of a reply
        struct ingest ingest;

        // its tokens in the current batch, and how many of them the micro-batches so far had; these keep their order
        std::vector<int32_t> tokens;
        size_t               n_planned = 0;
    };

    struct description {
        bool                 has_segments = false;
        std::vector<int32_t> segments;
        std::vector<int8_t>  ends; // empty: the last token of each sequence

        std::vector<int32_t> checkpoints; // tokens, ascending
    };

    // Gives each sequence its tokens of the batch. Throws std::runtime_error, as does the next.
    void deal_out_tokens(bool with_segments);

    void check_segments(const description & given) const;

    std::vector<sequence> sequences;
    description           next;
    description           current;               // of the last batch that was not refused
    int32_t               n_checkpoints = 0;     // that the last batch left
    bool                  failed        = false; // the last batch, unless it is being computed
};
