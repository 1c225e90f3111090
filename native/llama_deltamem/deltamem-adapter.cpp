// Loads a δ-mem adapter GGUF onto the devices of a model's layers.

#include "deltamem-adapter.h"

#include "deltamem-bf16.h"
#include "deltamem-composite.h"
#include "gguf.h"
#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

// The adapter file while it is loaded. All members throw a sentence that begins with the file's name.
class reader {
public:
    explicit reader(const std::string & path) : path(path) {
        check_start();
        open(path);
        gguf = files.front().gguf.get();

        // a packed model in shards: the first one has the keys, all have tensors
        const int n_split = has("split.count") ? u16("split.count") : 0;
        if (n_split > 1) {
            std::vector<char> prefix(path.size() + 1);
            if (!llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), u16("split.no"), n_split)) {
                fail("is one shard of several, but its name is not that of a shard");
            }
            std::vector<char> shard(path.size() + 1);
            for (int i = 1; i < n_split; ++i) {
                llama_split_path(shard.data(), shard.size(), prefix.data(), i, n_split);
                open(shard.data());
            }
        }
    }

    [[noreturn]] void fail(const std::string & what) const { throw std::runtime_error(path + " " + what); }

    bool has(const std::string & key) const { return gguf_find_key(gguf, key.c_str()) >= 0; }

    uint16_t    u16(const std::string & key) const { return gguf_get_val_u16(gguf, find(key, GGUF_TYPE_UINT16)); }
    uint32_t    u32(const std::string & key) const { return gguf_get_val_u32(gguf, find(key, GGUF_TYPE_UINT32)); }
    float       f32(const std::string & key) const { return gguf_get_val_f32(gguf, find(key, GGUF_TYPE_FLOAT32)); }
    bool        flag(const std::string & key) const { return gguf_get_val_bool(gguf, find(key, GGUF_TYPE_BOOL)); }
    std::string str(const std::string & key) const { return gguf_get_val_str(gguf, find(key, GGUF_TYPE_STRING)); }

    std::vector<uint32_t> u32s(const std::string & key) const {
        const int64_t id   = find_array(key, GGUF_TYPE_UINT32);
        const auto *  data = (const uint32_t *) gguf_get_arr_data(gguf, id);
        return { data, data + gguf_get_arr_n(gguf, id) };
    }

    std::vector<std::string> strs(const std::string & key) const {
        const int64_t            id = find_array(key, GGUF_TYPE_STRING);
        std::vector<std::string> values;
        for (size_t i = 0; i < gguf_get_arr_n(gguf, id); ++i) {
            values.emplace_back(gguf_get_arr_str(gguf, id, i));
        }
        return values;
    }

    // the value's index in `names`
    template <size_t n> int choice(const std::string & key, const char * const (&names)[n]) const {
        const std::string value = str(key);
        for (size_t i = 0; i < n; ++i) {
            if (value == names[i]) {
                return (int) i;
            }
        }
        fail("has " + key + " = '" + value + "', which this library does not support");
    }

    // the adapter's keys, which a packed model has beside its own: those not of "deltamem." with a prefix
    std::map<std::string, std::string> meta() const {
        static const std::string packed    = "deltamem.packed.";
        const bool               is_packed = has(packed + "adapter.type");

        std::map<std::string, std::string> values;
        for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
            const std::string key       = gguf_get_key(gguf, i);
            const auto        begins_as = [&key](const std::string & prefix) { return key.rfind(prefix, 0) == 0; };
            if (begins_as(packed)) {
                values[key.substr(packed.size())] = gguf_kv_to_str(gguf, (int) i);
            } else if (begins_as("deltamem.") || (!is_packed && (begins_as("general.") || begins_as("adapter.")))) {
                values[key] = gguf_kv_to_str(gguf, (int) i);
            }
        }
        return values;
    }

    // metadata of a tensor of that shape; throws unless it exists, is well-formed and lies within its file
    const ggml_tensor * tensor(const std::string & name, std::vector<int64_t> ne) const {
        const source *      f = source_of(name);
        const ggml_tensor * t = f ? ggml_get_tensor(f->ctx.get(), name.c_str()) : nullptr;
        if (!t) {
            fail("has no tensor " + name);
        }
        ne.resize(GGML_MAX_DIMS, 1);
        if (!std::equal(ne.begin(), ne.end(), t->ne)) {
            fail("has tensor " + name + " of shape " + llama_format_tensor_shape(t) + ", this model needs " +
                 llama_format_tensor_shape(ne));
        }
        if (!ggml_get_type_traits(t->type)->to_float && t->type != GGML_TYPE_F32) {
            fail("has tensor " + name + " of type " + ggml_type_name(t->type) + ", which is not a weight type");
        }
        const size_t offset = f->data_offset(name);
        if (offset > f->file->size() || ggml_nbytes(t) > f->file->size() - offset) {
            fail("is truncated: tensor " + name + " reaches past its end");
        }
        return t;
    }

    // the bytes of a tensor that tensor() has checked; throws unless all of its values are finite
    std::vector<uint8_t> data(const std::string & name) const {
        const source *       f = source_of(name);
        const ggml_tensor *  t = ggml_get_tensor(f->ctx.get(), name.c_str());
        std::vector<uint8_t> bytes(ggml_nbytes(t));
        f->file->seek(f->data_offset(name), SEEK_SET);
        f->file->read_raw(bytes.data(), bytes.size());

        std::vector<float> row(t->ne[0]);
        for (int64_t i = 0; i < ggml_nrows(t); ++i) {
            const uint8_t * src = bytes.data() + i * ggml_row_size(t->type, t->ne[0]);
            if (t->type == GGML_TYPE_F32) {
                memcpy(row.data(), src, row.size() * sizeof(float));
            } else {
                ggml_get_type_traits(t->type)->to_float(src, row.data(), t->ne[0]);
            }
            if (!std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); })) {
                fail("has values in tensor " + name + " that are not finite");
            }
        }
        return bytes;
    }

    int64_t n_tensors() const {
        int64_t n = 0;
        for (const source & f : files) {
            n += gguf_get_n_tensors(f.gguf.get());
        }
        return n;
    }

private:
    // one file: an adapter, a packed model, or a shard of one
    struct source {
        gguf_context_ptr            gguf;
        ggml_context_ptr            ctx;
        std::unique_ptr<llama_file> file;

        size_t data_offset(const std::string & name) const {
            const int64_t id = gguf_find_tensor(gguf.get(), name.c_str());
            return gguf_get_data_offset(gguf.get()) + gguf_get_tensor_offset(gguf.get(), id);
        }
    };

    std::string          path;
    std::vector<source>  files;
    const gguf_context * gguf; // the first one's

    // gguf_init_from_file only logs why it refuses a file
    void check_start() const {
        FILE * f = ggml_fopen(path.c_str(), "rb");
        if (!f) {
            fail(std::string("cannot be opened: ") + strerror(errno));
        }
        char       magic[4]  = {};
        uint32_t   version   = 0;
        const bool is_gguf   = fread(magic, sizeof(magic), 1, f) == 1 && memcmp(magic, GGUF_MAGIC, sizeof(magic)) == 0;
        const bool continues = is_gguf && fread(&version, sizeof(version), 1, f) == 1;
        fclose(f);

        if (!is_gguf) {
            fail("is no GGUF file");
        }
        if (!continues) {
            fail("is truncated");
        }
        if (version > 0 && (version & 0xffff) == 0) {
            fail("was written for a processor of the other byte order: convert the adapter again");
        }
        if (version < 2 || version > GGUF_VERSION) {
            fail(format("has GGUF version %u, this library reads 2 to %d", version, GGUF_VERSION));
        }
    }

    void open(const std::string & name) {
        ggml_context *   ctx = nullptr;
        gguf_context_ptr keys(gguf_init_from_file(name.c_str(), { /*.no_alloc =*/true, /*.ctx =*/&ctx }));
        files.push_back({ std::move(keys), ggml_context_ptr(ctx), nullptr });
        if (!files.back().gguf) {
            fail(name == path ? "is not a readable GGUF file; it may be truncated"
                              : "has a shard that cannot be read: " + name);
        }
        files.back().file = std::make_unique<llama_file>(name.c_str(), "rb");
    }

    const source * source_of(const std::string & tensor) const {
        for (const source & f : files) {
            if (gguf_find_tensor(f.gguf.get(), tensor.c_str()) >= 0) {
                return &f;
            }
        }
        return nullptr;
    }

    int64_t find(const std::string & key, gguf_type type) const {
        const int64_t id = gguf_find_key(gguf, key.c_str());
        if (id < 0) {
            fail("has no key " + key);
        }
        if (gguf_get_kv_type(gguf, id) != type) {
            fail("has key " + key + " of an unexpected type");
        }
        return id;
    }

    int64_t find_array(const std::string & key, gguf_type type) const {
        const int64_t id = find(key, GGUF_TYPE_ARRAY);
        if (gguf_get_arr_type(gguf, id) != type) {
            fail("has key " + key + " of an unexpected type");
        }
        return id;
    }
};

ggml_backend_dev_t cpu_device() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {
        throw std::runtime_error("ggml has no CPU backend");
    }
    return cpu;
}

// Whether some of the model's weights are unpacked to BF16 (deltamem-bf16.h): others gain nothing by it, or are repacked.
bool has_unpacked(const llama_model & model) {
    return std::any_of(model.tensors_by_name.begin(), model.tensors_by_name.end(), [](const auto & named) {
        const ggml_backend_buffer_t buffer = named.second->buffer;
        return buffer && ggml_backend_buffer_get_type(buffer) == ggml_backend_deltamem_bf16_buffer_type();
    });
}

// The buffer type for the adapter's weights of a layer: that of the layer's own weights, unless it holds nothing else,
// as those of weights repacked for the CPU, of rows split over GPUs, and of mapped files do. On a CPU that unpacks some
// of the model's weights, these are, too.
ggml_backend_buffer_type_t select_buft(const ggml_tensor * layer_weight, ggml_backend_dev_t layer_device,
                                       bool unpacked) {
    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(layer_weight->buffer);

    if (!ggml_backend_buft_is_host(buft) && layer_device &&
        ggml_backend_dev_type(layer_device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return ggml_backend_dev_buffer_type(layer_device);
    }

    if (unpacked) {
        return ggml_backend_deltamem_bf16_buffer_type();
    }
    ggml_backend_dev_t cpu = cpu_device();

    auto get_extra_bufts = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts");
    if (get_extra_bufts) {
        for (ggml_backend_buffer_type_t * extra = get_extra_bufts(cpu); extra && *extra; ++extra) {
            if (*extra == buft) {
                return ggml_backend_dev_buffer_type(cpu);
            }
        }
    }
    return buft;
}

// Asks the device about a node of the shape that the graphs will have.
bool supports_operator(ggml_backend_dev_t dev, const ggml_deltamem_params & params) {
    ggml_context_ptr ctx { ggml_init({ 8 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }) };

    ggml_tensor * node = ggml_deltamem(
            ctx.get(), ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_proj(&params), 1),
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_deltamem_n_gates(&params)),
            ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, params.n_head * ggml_deltamem_n_record(&params), 1),
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, ggml_deltamem_n_plan(1, 1)), params);

    return ggml_backend_dev_supports_op(dev, node);
}

// What computes the memory of a layer, by the environment variable DELTAMEM_OPERATOR: the operator where the layer's
// device has it, else the composite of ggml's own operations; the operator alone, on the CPU if need be; the composite
// alone.
enum operator_choice {
    AUTO,
    KERNEL,
    COMPOSITE
};

operator_choice choose_operator() {
    const char *      value  = getenv("DELTAMEM_OPERATOR");
    const std::string choice = value ? value : "auto";
    const char *      all[]  = { "auto", "kernel", "composite" };
    for (const operator_choice each : { AUTO, KERNEL, COMPOSITE }) {
        if (choice == all[each]) {
            return each;
        }
    }
    throw std::runtime_error("DELTAMEM_OPERATOR is '" + choice + "': set it to auto, kernel or composite, or unset it");
}

// Collects tensors per buffer type, then allocates and fills them.
class loader {
public:
    // rows of a tensor that the file has under that name; zero if the name is empty
    struct part {
        std::string name;
        int64_t     n_rows;
    };

    loader(const reader & file, llama_deltamem_weights & weights, size_t n_tensors_max) :
        file(file), weights(weights), n_tensors_max(n_tensors_max) {}

    ggml_tensor * add_vector(ggml_backend_buffer_type_t buft, const std::string & name, int64_t n) {
        const ggml_tensor * src = file.tensor(name, { n });
        if (src->type != GGML_TYPE_F32) {
            file.fail("has tensor " + name + " of type " + ggml_type_name(src->type) + ", it must be f32");
        }
        ggml_tensor * t = ggml_new_tensor_1d(context(buft), src->type, n);
        ggml_set_name(t, name.c_str());
        fills.push_back({ t, { { name, 1 } }, false });
        return t;
    }

    ggml_tensor * add_matrix(ggml_backend_buffer_type_t buft, const std::string & name, int64_t n_cols,
                             int64_t n_rows) {
        ggml_tensor * t =
                ggml_new_tensor_2d(context(buft), file.tensor(name, { n_cols, n_rows })->type, n_cols, n_rows);
        ggml_set_name(t, name.c_str());
        fills.push_back({ t, { { name, n_rows } }, false });
        return t;
    }

    // A correction whose rows are those of one or more parts in order. `device` has the operator, null for none: it
    // computes the correction as one node if it takes weights of this type.
    llama_deltamem_correction add_correction(ggml_backend_buffer_type_t buft, const std::string & name, int64_t n_read,
                                             const std::vector<part> & parts, ggml_backend_dev_t device) {
        int64_t   n_rows = 0;
        ggml_type type   = GGML_TYPE_COUNT;
        for (const part & p : parts) {
            n_rows += p.n_rows;
            if (!p.name.empty()) {
                const ggml_type part_type = file.tensor(p.name, { n_read, p.n_rows })->type;
                if (type != GGML_TYPE_COUNT && type != part_type) {
                    file.fail("has corrections of different types in one layer");
                }
                type = part_type;
            }
        }
        const bool has_blocks = ggml_blck_size(type) > 1;
        const bool one_node =
                device && (!has_blocks ||
                           (type == GGML_TYPE_Q8_0 && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU));
        const bool by_columns = one_node && !has_blocks;

        ggml_tensor * t = by_columns ? ggml_new_tensor_2d(context(buft), type, n_rows, n_read)
                                     : ggml_new_tensor_2d(context(buft), type, n_read, n_rows);
        ggml_set_name(t, name.c_str());
        fills.push_back({ t, parts, by_columns });
        return { t, one_node, n_rows };
    }

    void finish() {
        for (const auto & [buft, ctx] : ctx_map) {
            ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
            if (!buf) {
                throw std::runtime_error(format("the adapter cannot be allocated in %s", ggml_backend_buft_name(buft)));
            }
            ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
            LLAMA_LOG_INFO("%s: %10s δ-mem buffer size = %8.2f MiB\n", __func__, ggml_backend_buffer_name(buf.get()),
                           ggml_backend_buffer_get_size(buf.get()) / 1024.0 / 1024.0);
            weights.bufs.emplace_back(std::move(buf));
        }
        for (const fill & f : fills) {
            const std::vector<uint8_t> bytes = assemble(f);
            ggml_backend_tensor_set(f.dst, bytes.data(), 0, bytes.size());
        }
    }

private:
    struct fill {
        ggml_tensor *     dst;
        std::vector<part> parts;
        bool              by_columns;
    };

    const reader &           file;
    llama_deltamem_weights & weights;
    const size_t             n_tensors_max;

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    std::vector<fill>                                    fills;

    ggml_context * context(ggml_backend_buffer_type_t buft) {
        ggml_context *& ctx = ctx_map[buft];
        if (!ctx) {
            ctx = ggml_init({ n_tensors_max * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true });
            if (!ctx) {
                throw std::runtime_error("the adapter's tensors cannot be allocated");
            }
            weights.ctxs.emplace_back(ctx);
        }
        return ctx;
    }

    std::vector<uint8_t> assemble(const fill & f) const {
        std::vector<uint8_t> bytes(ggml_nbytes(f.dst), 0);

        int64_t row = 0;
        for (const part & p : f.parts) {
            const std::vector<uint8_t> src = p.name.empty() ? std::vector<uint8_t>() : file.data(p.name);
            if (!f.by_columns) {
                std::copy(src.begin(), src.end(), bytes.begin() + row * f.dst->nb[1]);
            } else if (!src.empty()) {
                const size_t  size   = ggml_type_size(f.dst->type);
                const int64_t n_cols = f.dst->ne[1];
                for (int64_t i = 0; i < p.n_rows; ++i) {
                    for (int64_t j = 0; j < n_cols; ++j) {
                        memcpy(bytes.data() + j * f.dst->nb[1] + (row + i) * size, src.data() + (i * n_cols + j) * size,
                               size);
                    }
                }
            }
            row += p.n_rows;
        }
        return bytes;
    }
};

// what the file is, and for which model
void check_base(const reader & file, const llama_model & model) {
    if (!file.has("deltamem.version")) {
        file.fail("is not a δ-mem adapter: it has no key deltamem.version");
    }
    if (const uint32_t version = file.u32("deltamem.version"); version < 1 || version > LLAMA_DELTAMEM_VERSION) {
        file.fail(format(
                "has adapter version %u, this library loads version %d: update pydeltamem, or convert the PyTorch "
                "checkpoint again",
                version, LLAMA_DELTAMEM_VERSION));
    }

    const std::string arch = file.str("general.architecture");
    if (arch != llm_arch_name(model.arch)) {
        file.fail("is an adapter for '" + arch + "', the model is '" + llm_arch_name(model.arch) + "'");
    }

    llama_deltamem_check_attention(model.arch);

    // there llama.cpp splits every node over devices, has no rule for this operator and would abort
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        file.fail("cannot be used with split mode 'tensor': load the model with split mode 'layer'");
    }

    const uint32_t n_embd  = model.hparams.n_embd;
    const uint32_t n_layer = model.hparams.n_layer();
    if (const uint32_t n = file.u32("deltamem.base.embedding_length"); n != n_embd) {
        file.fail(format("is an adapter for a model of width %u, this model's is %u", n, n_embd));
    }
    if (const uint32_t n = file.u32("deltamem.base.block_count"); n != n_layer) {
        file.fail(format("is an adapter for a model of %u layers, this model has %u", n, n_layer));
    }
}

ggml_deltamem_params read_params(const reader & file, llama_deltamem_granularity granularity) {
    static const char * const modes[] = { "standard", "lambda_outside", "no_lambda" };

    const int      mode   = file.choice("deltamem.update_mode", modes);
    const uint32_t rank   = file.u32("deltamem.rank");
    const uint32_t n_head = file.u32("deltamem.head_count");
    if (rank < 1 || rank > GGML_DELTAMEM_MAX_RANK) {
        file.fail(format("has rank %u, this library supports 1 to %d", rank, GGML_DELTAMEM_MAX_RANK));
    }
    if (n_head < 1 || n_head > 1024) {
        file.fail(format("has %u state heads, this library supports 1 to 1024", n_head));
    }

    ggml_deltamem_params params = {};
    params.rank                 = (int32_t) rank;
    params.n_head               = (int32_t) n_head;
    params.n_seqs               = 1;
    params.lambda               = mode == 2                             ? GGML_DELTAMEM_LAMBDA_NONE
                                  : file.flag("deltamem.couple_lambda") ? GGML_DELTAMEM_LAMBDA_COUPLED
                                                                        : GGML_DELTAMEM_LAMBDA_SEPARATE;
    params.flags = (file.flag("deltamem.normalize_qk") ? GGML_DELTAMEM_NORMALIZE_QK : 0) |
                   (file.flag("deltamem.rankwise_gates") ? GGML_DELTAMEM_RANKWISE_GATES : 0) |
                   (mode == 1 ? GGML_DELTAMEM_LAMBDA_OUTSIDE : 0) |
                   (granularity == LLAMA_DELTAMEM_MESSAGE_MEAN || granularity == LLAMA_DELTAMEM_SENTENCE_MEAN
                            ? GGML_DELTAMEM_SEGMENTS
                            : 0) |
                   (granularity == LLAMA_DELTAMEM_TOKEN_DEFERRED || granularity == LLAMA_DELTAMEM_REPLY_DEFERRED
                            ? GGML_DELTAMEM_DEFERRED
                            : 0);
    return params;
}

// the projections whose outputs are corrected
struct corrected_heads {
    bool q = false, k = false, v = false, o = false;

    explicit corrected_heads(const reader & file) {
        for (const std::string & head : file.strs("deltamem.delta_heads")) {
            bool * flag = head == "q" ? &q : head == "k" ? &k : head == "v" ? &v : head == "o" ? &o : nullptr;
            if (!flag) {
                file.fail("corrects '" + head + "', this library corrects q, k, v and o");
            }
            *flag = true;
        }
    }
};

float read_o_norm_eps(const reader & file) {
    const float eps = file.f32("deltamem.o_norm_epsilon");
    if (!(eps >= 0.0f) || !std::isfinite(eps)) {
        file.fail(format("has deltamem.o_norm_epsilon = %g, it must be finite and not negative", eps));
    }
    return eps;
}

// Chooses what computes the memory of a layer, and adds its weights to a loader.
class layer_maker {
public:
    // of any layer that was made: the composite computes its memory, or the CPU instead of its device
    bool composite = false, fallback = false;

    layer_maker(const llama_model & model, const ggml_deltamem_params & params, const corrected_heads & heads,
                bool has_o_norm, loader & load) :
        model(model),
        params(params),
        n_read((int64_t) params.n_head * params.rank),
        heads(heads),
        has_o_norm(has_o_norm),
        load(load) {}

    llama_deltamem_layer_weights make(int il) {
        const llama_layer & layer = model.layers[il];

        // rows of a fused projection: q, k, v. Layers of a hybrid without attention may have another one in its place
        const int64_t n_k        = model.hparams.n_embd_k_gqa(il);
        const int64_t n_v        = model.hparams.n_embd_v_gqa(il);
        const bool    has_common = layer.wqkv ? layer.wqkv->ne[1] > n_k + n_v : layer.wq && layer.wk && layer.wv;
        if (!has_common || (heads.o && !layer.wo)) {
            llama_deltamem_refuse(model.arch, il, "it has no attention projections of the common kind");
        }

        llama_deltamem_layer_weights lw;
        lw.il                   = il;
        const bool has_operator = choose_device(lw);
        const auto device       = has_operator ? lw.device : nullptr; // of corrections as one node
        const auto buft         = select_buft(layer.wqkv ? layer.wqkv : layer.wq, model.dev_layer(il), unpacked);
        const auto name         = [il](const char * what) { return format("blk.%d.deltamem_%s", il, what); };

        lw.in = load.add_matrix(buft, name("in.weight"), model.hparams.n_embd, ggml_deltamem_n_proj(&params));
        // on the operator's device, which may not be that of the other weights: saves a copy per token
        lw.gate_bias = load.add_vector(ggml_backend_dev_buffer_type(lw.device), name("gate.bias"),
                                       ggml_deltamem_n_gates(&params));

        const auto correction = [&](bool is_corrected, const char * what, const ggml_tensor * projection,
                                    ggml_backend_dev_t on) {
            return is_corrected
                           ? load.add_correction(buft, name(what), n_read, { { name(what), projection->ne[1] } }, on)
                           : llama_deltamem_correction();
        };
        if (!layer.wqkv) {
            lw.q = correction(heads.q, "q.weight", layer.wq, device);
            lw.k = correction(heads.k, "k.weight", layer.wk, device);
            lw.v = correction(heads.v, "v.weight", layer.wv, device);
        } else if (heads.q || heads.k || heads.v) {
            lw.qkv = load.add_correction(buft, name("qkv.weight"), n_read,
                                         {
                                                 { heads.q ? name("q.weight") : "", layer.wqkv->ne[1] - n_k - n_v },
                                                 { heads.k ? name("k.weight") : "", n_k },
                                                 { heads.v ? name("v.weight") : "", n_v },
                                         },
                                         device);
        }
        // a norm stands between the product and the addition
        lw.o = correction(heads.o, "o.weight", layer.wo, has_o_norm ? nullptr : device);
        if (has_o_norm) {
            lw.o_norm = load.add_vector(buft, name("o_norm.weight"), model.hparams.n_embd);
        }
        return lw;
    }

private:
    const llama_model &          model;
    const ggml_deltamem_params & params;
    const int64_t                n_read;
    const corrected_heads &      heads;
    const bool                   has_o_norm;
    loader &                     load;

    const operator_choice choice   = choose_operator();
    const bool            unpacked = has_unpacked(model);

    // Sets the device and the composite of a layer. Returns whether the operator computes it on its own device.
    bool choose_device(llama_deltamem_layer_weights & lw) {
        lw.device               = model.dev_layer(lw.il);
        const bool has_operator = choice != COMPOSITE && lw.device && supports_operator(lw.device, params);
        if (!has_operator && choice != KERNEL && lw.device) {
            lw.composite_width = ggml_deltamem_composite_width(lw.device, params);
            composite |= lw.composite_width > 0;
        }
        if (!has_operator && !lw.composite_width) {
            lw.device = cpu_device();
            fallback  = true;
        }
        return has_operator;
    }
};

} // namespace

llama_deltamem_weights::llama_deltamem_weights(const llama_model & model, const std::string & path,
                                               bool defers_replies) :
    model(model) {
    static const char * const granularities[] = { "token", "message_mean", "sentence_mean", "token_deferred",
                                                  "reply_deferred" };

    const reader file(path);
    check_base(file, model);
    granularity = (llama_deltamem_granularity) file.choice("deltamem.write_granularity", granularities);
    if (defers_replies && granularity == LLAMA_DELTAMEM_TOKEN) {
        granularity = LLAMA_DELTAMEM_REPLY_DEFERRED;
    }
    if (defers_replies && granularity < LLAMA_DELTAMEM_TOKEN_DEFERRED) {
        file.fail("writes per segment: only of an adapter that writes per token can replies be deferred");
    }
    params = read_params(file, granularity);
    meta   = file.meta();

    const corrected_heads heads(file);
    const bool            has_o_norm = heads.o && file.has("deltamem.o_norm_epsilon");
    o_norm_eps                       = has_o_norm ? read_o_norm_eps(file) : 0.0f;

    const uint32_t n_layer = model.hparams.n_layer();
    loader         load(file, *this, file.n_tensors() + n_layer);
    layer_maker    maker(model, params, heads, has_o_norm, load);
    for (const uint32_t il : file.u32s("deltamem.layers")) {
        if (il >= n_layer || (!layers.empty() && (int) il <= layers.back().il)) {
            file.fail(format("has %u in deltamem.layers, which must be ascending layers of the model, 0 to %u", il,
                             n_layer - 1));
        }
        layers.push_back(maker.make((int) il));
    }
    if (layers.empty()) {
        file.fail("has no layer in deltamem.layers");
    }
    load.finish();

    if (maker.composite) {
        LLAMA_LOG_INFO("%s: operations of ggml compute the memory where a device has no δ-mem operator\n", __func__);
    }
    if (maker.fallback) {
        LLAMA_LOG_WARN(
                "%s: a device of this model has no δ-mem operator, so the CPU computes the memory of its layers\n",
                __func__);
    }
}

void llama_deltamem_refuse(llm_arch arch, const std::string & why) {
    throw std::runtime_error(format("architecture '%s' is not supported: %s", llm_arch_name(arch), why.c_str()));
}

void llama_deltamem_refuse(llm_arch arch, int il, const std::string & why) {
    llama_deltamem_refuse(arch, format("the adapter names layer %d, but %s", il, why.c_str()));
}

void llama_deltamem_check_attention(llm_arch arch) {
    if (llm_arch_is_recurrent(arch)) {
        llama_deltamem_refuse(arch, "it has no attention");
    }
}

size_t llama_deltamem_weights::n_bytes() const {
    size_t n = 0;
    for (const auto & buf : bufs) {
        n += ggml_backend_buffer_get_size(buf.get());
    }
    return n;
}
