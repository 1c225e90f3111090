// The read of ggml-deltamem.h in ggml's own operations, for a device whose backend has no GGML_OP_DELTAMEM. The same
// states and reads, with a fixed number of nodes, whatever the length of the prompt.
#pragma once

#include "ggml-backend.h"
#include "ggml-deltamem.h"

#include <cstdint>
#include <vector>

// What a plan makes of the composite: which rows a run of the recurrence writes and reads, step by step. A graph keeps
// its shape as long as the counts stay the same.
//
// A row is a token, then the mean of a segment, then zeros, which neither write nor read. A run begins with one state;
// a step writes one row, then reads with another. There is a run for each record that changes, of a sequence or of a
// checkpoint; with segments two more for each sequence: its pending state, and its reads before it commits an ingest
// that it did not begin here.
struct ggml_deltamem_schedule {
    int64_t n_tokens  = 0;
    int64_t n_seqs    = 0;
    int64_t n_records = 0; // that change: sequences, then checkpoints
    int64_t n_means   = 0; // segments that end, rounded up to 16; without GGML_DELTAMEM_SEGMENTS 0
    int64_t n_runs    = 0;
    int64_t n_steps   = 0; // of the longest run
    int64_t n_each    = 0; // with segments: tokens of the longest sequence

    std::vector<int32_t> slot;   // [n_records] where a record is
    std::vector<int32_t> source; // [n_runs] the state that a run begins with: a slot; with segments a sequence, or
                                 // n_seqs + a sequence for its pending state
    std::vector<int32_t> write;  // [n_runs][n_steps] rows
    std::vector<int32_t> read;   // [n_runs][n_steps] rows
    std::vector<int32_t> out;    // [n_tokens] run * n_steps + step that reads for a token

    // With segments: sums of projections, for each mean, then for each record what its segment has so far. Each is a product with
    // all tokens of its sequence and no others: 0 times a value that is not finite is none.
    std::vector<int32_t> first; // [n_seqs] where the records of the sequences are
    std::vector<int32_t>
            member; // [n_seqs][n_each] the tokens of a sequence, then n_tokens; of a single one empty: all, in order
    std::vector<float>   weight; // [n_seqs][n_means + n_records][n_each] 1 for a token in the sum
    std::vector<int32_t> pick;   // [n_means + n_records] where the sum is of all these; of a single sequence empty
    std::vector<int32_t> carry;  // [n_means + n_records] the sequence whose record begins the sum, n_seqs for none
    std::vector<float>   one;    // [n_tokens] 1
    std::vector<float>   count;  // [n_means + n_records] tokens in the sum, without the record's

    // whether a graph for one of the two is one for the other
    bool has_shape_of(const ggml_deltamem_schedule & other) const;
};

// Throws std::runtime_error for a plan that commits an ingest within which tokens wrote, or that names what there is not.
GGML_API ggml_deltamem_schedule ggml_deltamem_make_schedule(const ggml_deltamem_params & params, const int32_t * plan,
                                                            int64_t n_tokens);

// The schedule in a graph: one for all layers, which take no views of it: a view would cross to the device for each layer.
struct ggml_deltamem_composite_inputs {
    ggml_deltamem_schedule shape; // its counts

    ggml_tensor * slot   = nullptr; // I32 and F32 as in the schedule
    ggml_tensor * source = nullptr;
    ggml_tensor * write  = nullptr;
    ggml_tensor * read   = nullptr;
    ggml_tensor * out    = nullptr;
    ggml_tensor * first  = nullptr; // with segments
    ggml_tensor * member = nullptr; // of several sequences
    ggml_tensor * weight = nullptr;
    ggml_tensor * pick   = nullptr; // of several sequences
    ggml_tensor * carry  = nullptr;
    ggml_tensor * one    = nullptr;
    ggml_tensor * count  = nullptr;
};

GGML_API ggml_deltamem_composite_inputs ggml_deltamem_new_composite_inputs(ggml_context *                 ctx,
                                                                           const ggml_deltamem_schedule & schedule);

// Fills the tensors, which have been allocated. The schedule has the shape of the one that they were made for.
GGML_API void ggml_deltamem_set_composite_inputs(const ggml_deltamem_composite_inputs & inputs,
                                                 const ggml_deltamem_schedule &         schedule);

// The most nodes of one composite, views included.
#define GGML_DELTAMEM_COMPOSITE_NODES 128

struct ggml_deltamem_composite_result {
    ggml_tensor * reads;   // F32 [H*r, n_tokens]
    ggml_tensor * written; // writes the state: expand it into the graph, even if nothing depends on the reads
};

// The other arguments are those of ggml_deltamem. With segments, the sum of a record is that of the packed projections,
// cut into H equal pieces, and all counts are equal: for several heads another order than the kernel's.
//
// width: rows and columns of a state in GGML_OP_GATED_DELTA_NET, at least the rank. Backends have kernels for some:
// ggml_deltamem_composite_width.
GGML_API ggml_deltamem_composite_result ggml_deltamem_composite(ggml_context * ctx, ggml_tensor * proj,
                                                                ggml_tensor * gate_bias, ggml_tensor * state,
                                                                const ggml_deltamem_composite_inputs & inputs,
                                                                ggml_deltamem_params params, int width);

// The smallest width with which the device computes all nodes of a composite; 0 if there is none, as where writes are
// deferred.
GGML_API int ggml_deltamem_composite_width(ggml_backend_dev_t device, ggml_deltamem_params params);
