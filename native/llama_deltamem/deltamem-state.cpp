// The state store: places the states on devices, and copies slots in and out.

#include "deltamem-state.h"

#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

llama_deltamem_state::llama_deltamem_state(const llama_deltamem_weights & weights, uint32_t n_slots) :
    params(weights.params), n(n_slots) {
    const int64_t n_layer_record = params.n_head * ggml_deltamem_n_record(&params);

    for (const auto & lw : weights.layers) {
        auto it = std::find_if(devices.begin(), devices.end(),
                               [&lw](const records & r) { return r.device == lw.device; });
        if (it == devices.end()) {
            devices.emplace_back();
            it         = devices.end() - 1;
            it->device = lw.device;
        }
        layers.push_back({ nullptr, (size_t) (it - devices.begin()), it->n_layer * n_layer_record });
        it->n_layer++;
    }

    for (auto & d : devices) {
        d.ctx.reset(ggml_init({ (1 + d.n_layer) * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }));
        d.tensor = ggml_new_tensor_2d(d.ctx.get(), GGML_TYPE_F32, d.n_layer * n_layer_record, n_slots);
        ggml_set_name(d.tensor, "deltamem_state");
        d.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(d.ctx.get(), ggml_backend_dev_buffer_type(d.device)));
        if (!d.buf) {
            throw std::runtime_error(
                    format("%u states cannot be allocated on %s", n_slots, ggml_backend_dev_name(d.device)));
        }
        ggml_backend_buffer_clear(d.buf.get(), 0);
    }

    // a leaf for each layer rather than a view, which would be a node of the graph
    for (size_t i = 0; i < layers.size(); ++i) {
        const records & d = devices[layers[i].device_index];
        ggml_tensor *   t = ggml_new_tensor_2d(d.ctx.get(), GGML_TYPE_F32, n_layer_record, n_slots);
        t->nb[1]          = d.tensor->nb[1];
        t->nb[2] = t->nb[3] = t->nb[1] * n_slots;
        ggml_backend_tensor_alloc(d.buf.get(), t, (char *) d.tensor->data + layers[i].offset * sizeof(float));
        ggml_format_name(t, "deltamem_state-%d", weights.layers[i].il);
        layers[i].tensor = t;
    }
}

size_t llama_deltamem_state::n_bytes() const {
    size_t bytes = 0;
    for (const auto & d : devices) {
        bytes += ggml_backend_buffer_get_size(d.buf.get());
    }
    return bytes;
}

size_t llama_deltamem_state::size() const {
    return layers.size() * params.n_head * params.rank * params.rank;
}

// visit(device, offset of S in the slot's records on that device, offset in the [L, H, r, r] order)
template <typename F> void llama_deltamem_state::for_each_head(F visit) const {
    const size_t n_record = ggml_deltamem_n_record(&params);
    const size_t n_state  = (size_t) params.rank * params.rank;

    for (size_t i = 0; i < layers.size(); ++i) {
        for (size_t h = 0; h < (size_t) params.n_head; ++h) {
            visit(layers[i].device_index, layers[i].offset + h * n_record, (i * params.n_head + h) * n_state);
        }
    }
}

// The operator stores S column-major, the API has it row-major.
static void transpose(float * dst, const float * src, int r) {
    for (int i = 0; i < r; ++i) {
        for (int j = 0; j < r; ++j) {
            dst[i * r + j] = src[j * r + i];
        }
    }
}

std::vector<std::vector<float>> llama_deltamem_state::read(uint32_t slot) const {
    std::vector<std::vector<float>> host;
    for (const auto & d : devices) {
        host.emplace_back(d.tensor->ne[0]);
        ggml_backend_tensor_get(d.tensor, host.back().data(), slot * d.tensor->nb[1], d.tensor->nb[1]);
    }
    return host;
}

void llama_deltamem_state::write(uint32_t slot, const std::vector<std::vector<float>> & host) {
    for (size_t i = 0; i < devices.size(); ++i) {
        ggml_tensor * t = devices[i].tensor;
        ggml_backend_tensor_set(t, host[i].data(), slot * t->nb[1], t->nb[1]);
    }
}

void llama_deltamem_state::get(uint32_t slot, float * dst) const {
    const auto host = read(slot);
    for_each_head([&](size_t d, size_t at, size_t out) { transpose(dst + out, host[d].data() + at, params.rank); });
}

void llama_deltamem_state::set(uint32_t slot, const float * src) {
    std::vector<std::vector<float>> host;
    for (const auto & d : devices) {
        host.emplace_back(d.tensor->ne[0], 0.0f); // zero also drops an unfinished ingest
    }
    const size_t n_state = (size_t) params.rank * params.rank;
    for_each_head([&](size_t d, size_t at, size_t in) {
        transpose(host[d].data() + at, src + in, params.rank);
        if (params.flags & GGML_DELTAMEM_DEFERRED) { // a turn begins
            transpose(host[d].data() + at + n_state, src + in, params.rank);
        }
    });
    write(slot, host);
}

void llama_deltamem_state::set_turn(uint32_t slot, const float * src) {
    const size_t n_state = (size_t) params.rank * params.rank;
    auto         host    = read(slot);
    for_each_head(
            [&](size_t d, size_t at, size_t in) { transpose(host[d].data() + at + n_state, src + in, params.rank); });
    write(slot, host);
}

void llama_deltamem_state::reset(uint32_t slot) {
    for (const auto & d : devices) {
        const std::vector<uint8_t> zeros(d.tensor->nb[1]); // not every backend can fill a part of a tensor
        ggml_backend_tensor_set(d.tensor, zeros.data(), slot * d.tensor->nb[1], zeros.size());
    }
}

void llama_deltamem_state::copy(uint32_t src, uint32_t dst) {
    for (const auto & d : devices) {
        ggml_context_ptr ctx { ggml_init({ 2 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }) };
        const auto       row = [&](uint32_t slot) {
            ggml_tensor * view = ggml_view_1d(ctx.get(), d.tensor, d.tensor->ne[0], slot * d.tensor->nb[1]);
            ggml_backend_view_init(view);
            return view;
        };
        ggml_backend_tensor_copy(row(src), row(dst));
    }
}
