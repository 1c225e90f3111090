// The buffer type of deltamem-bf16.h: the CPU's memory under another name. Compiled into ggml-base.

#include "deltamem-bf16.h"

#include "ggml-backend-impl.h"

static const char * get_name(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return "DELTAMEM_BF16";
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft = buft;
    }
    return buffer;
}

static size_t get_alignment(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

static bool is_host(ggml_backend_buffer_type_t buft) {
    GGML_UNUSED(buft);
    return true;
}

ggml_backend_buffer_type_t ggml_backend_deltamem_bf16_buffer_type(void) {
    static ggml_backend_buffer_type type = {
        /* .iface   = */ { get_name, alloc_buffer, get_alignment, /* .get_max_size = */ nullptr,
                           /* .get_alloc_size = */ nullptr, is_host },
        /* .device  = */ nullptr, // as the CPU's
        /* .context = */ nullptr,
    };
    return &type;
}
