// The states of one context: one slot per sequence, then one per checkpoint. They are not part of the KV cache.
#pragma once

#include "deltamem-adapter.h"

#include <vector>

class llama_deltamem_state {
public:
    // Makes empty states, those of each layer on the device of its operator. Throws std::runtime_error.
    llama_deltamem_state(const llama_deltamem_weights & weights, uint32_t n_slots);

    // F32 [H*n_record, n_slots], records as in ggml-deltamem.h; i counts the layers with memory
    ggml_tensor * tensor(size_t i) const { return layers[i].tensor; }

    uint32_t n_slots() const { return n; }
    size_t   n_bytes() const;

    // floats of a slot's state, L*H*r*r, in the order [L, H, r (row), r (column)]
    size_t size() const;

    void get(uint32_t slot, float * dst) const;
    void set(uint32_t slot, const float * src);
    void set_turn(uint32_t slot, const float * src); // what the turn reads, where writes are deferred
    void reset(uint32_t slot);
    void copy(uint32_t src, uint32_t dst);

private:
    struct layer {
        ggml_tensor * tensor; // a part of its device's records
        size_t        device_index;
        size_t        offset; // of this layer's records in a slot, floats
    };

    // all records of a device; a slot is contiguous, so one copy moves it
    struct records {
        ggml_backend_dev_t      device;
        ggml_context_ptr        ctx;
        ggml_backend_buffer_ptr buf;
        ggml_tensor *           tensor  = nullptr; // F32 [n_layers_here*H*n_record, n_slots]
        size_t                  n_layer = 0;
    };

    const ggml_deltamem_params params;
    const uint32_t             n;

    std::vector<layer>   layers;
    std::vector<records> devices;

    template <typename F> void for_each_head(F visit) const;

    // a slot's records, by device
    std::vector<std::vector<float>> read(uint32_t slot) const;
    void                            write(uint32_t slot, const std::vector<std::vector<float>> & host);
};
