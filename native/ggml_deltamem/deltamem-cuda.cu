// CUDA forward of GGML_OP_DELTAMEM: selects and launches the kernels. Compiled into ggml-cuda.

#include "deltamem-cuda.cuh"

#ifndef DELTAMEM_NO_CUDA

    #define DELTAMEM_WAIT_FOR_PREDECESSOR ggml_cuda_pdl_sync

    #include "ggml-cuda/common.cuh"
    #include "ggml-impl.h"

static __device__ __forceinline__ float to_float(float x) {
    return x;
}

static __device__ __forceinline__ float to_float(half x) {
    return __half2float(x);
}

static __device__ __forceinline__ float to_float(nv_bfloat16 x) {
    return __bfloat162float(x);
}

    #include "deltamem-cuda-kernel.cuh"

using namespace deltamem;

static cuda_read_args read_args(const ggml_tensor * node) {
    ggml_deltamem_check(node);
    const ggml_tensor * proj  = node->src[0];
    const ggml_tensor * state = node->src[2];

    cuda_read_args             args = {};
    const ggml_deltamem_params p    = ggml_deltamem_get_params(node);
    args.prepare(p, node->ne[1]);
    args.proj        = (const float *) proj->data;
    args.proj_stride = proj->nb[1] / sizeof(float);
    args.gate_bias   = (const float *) node->src[1]->data;
    args.state       = (float *) state->data;
    args.slot_stride = state->nb[1] / sizeof(float);
    args.n_slots     = (int) state->ne[1];
    args.n_tokens    = (int) node->ne[1];
    args.plan        = (const int *) node->src[3]->data;
    args.read        = (float *) node->data;
    args.read_stride = node->nb[1] / sizeof(float);
    return args;
}

static void op_read(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    const cuda_read_args         args = read_args(node);
    const ggml_deltamem_params & p    = args.params;

    const size_t shared = args.layout.size * sizeof(float);
    GGML_ASSERT(shared <= MAX_SHARED);

    const dim3 blocks(p.n_head, p.n_seqs);
    const dim3 threads((args.n_recur_warps + args.n_stage_warps) * WARP);
    for_rank(p, [&](auto rank, auto segments) {
        ggml_cuda_kernel_launch(read_kernel<rank.value, segments.value>,
                                ggml_cuda_kernel_launch_params(blocks, threads, shared, ctx.stream()), args);
    });
}

template <typename W>
static void correct(ggml_backend_cuda_context & ctx, const W * weight, const cuda_correct_args & args) {
    args.for_shape(weight, [&](auto outputs, auto tokens) {
        constexpr int V = decltype(outputs)::value, T = decltype(tokens)::value;

        const dim3   blocks(args.n_blocks_x<V, T>(), args.n_blocks_y<V, T>());
        const size_t shared = T * CORRECT_COLUMNS * sizeof(float);
        ggml_cuda_kernel_launch(correct_kernel<W, V, T>,
                                ggml_cuda_kernel_launch_params(blocks, dim3(CORRECT_THREADS), shared, ctx.stream()),
                                weight, args);
    });
}

static void op_correct(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    ggml_deltamem_check(node);
    const ggml_tensor * out    = node->src[0];
    const ggml_tensor * weight = node->src[1];
    const ggml_tensor * read   = node->src[2];

    cuda_correct_args args = {};
    args.out               = (const float *) out->data;
    args.out_stride        = out->nb[1] / sizeof(float);
    args.weight_stride     = weight->nb[1] / weight->nb[0];
    args.read              = (const float *) read->data;
    args.read_stride       = read->nb[1] / sizeof(float);
    args.dst               = (float *) node->data;
    args.dst_stride        = node->nb[1] / sizeof(float);
    args.n_out             = (int) out->ne[0];
    args.n_read            = (int) read->ne[0];
    args.n_tokens          = (int) out->ne[1];

    switch (weight->type) {
        case GGML_TYPE_F32:  correct(ctx, (const float *) weight->data, args); break;
        case GGML_TYPE_F16:  correct(ctx, (const half *) weight->data, args); break;
        case GGML_TYPE_BF16: correct(ctx, (const nv_bfloat16 *) weight->data, args); break;
        default:             GGML_ABORT("a correction cannot have weights of type %s", ggml_type_name(weight->type));
    }
}

bool ggml_cuda_deltamem_supports(const ggml_tensor * node) {
    // the constructors have checked types, shapes and contiguous rows
    if (ggml_deltamem_get_kind(node) == GGML_DELTAMEM_CORRECT) {
        return node->src[0]->ne[1] <= 65535 && // blocks in y
               !ggml_is_quantized(node->src[1]->type);
    }
    const ggml_deltamem_params params = ggml_deltamem_get_params(node);
    return params.n_seqs <= 65535 && !(params.flags & GGML_DELTAMEM_DEFERRED);
}

bool ggml_cuda_op_deltamem(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    switch (ggml_deltamem_get_kind(node)) {
        case GGML_DELTAMEM_READ:    op_read(ctx, node); break;
        case GGML_DELTAMEM_CORRECT: op_correct(ctx, node); break;
    }
    return true;
}

int ggml_cuda_deltamem_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    // what ggml_can_fuse checks, except that the two have the same shape
    if (cgraph->nodes[i]->op != GGML_OP_MUL_MAT || i + 1 >= cgraph->n_nodes ||
        cgraph->nodes[i + 1]->op != GGML_OP_DELTAMEM || !ggml_node_has_n_uses(cgraph, i, 1) ||
        !(cgraph->nodes[i]->flags & cgraph->nodes[i + 1]->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return 0;
    }
    const ggml_tensor * mul_mat = cgraph->nodes[i];
    const ggml_tensor * node    = cgraph->nodes[i + 1];
    const ggml_tensor * weight  = mul_mat->src[0];
    const ggml_tensor * input   = mul_mat->src[1];

    if (ggml_deltamem_get_kind(node) != GGML_DELTAMEM_READ || node->src[0] != mul_mat || node->ne[1] != 1) {
        return 0;
    }
    const cuda_read_args         args = read_args(node);
    const ggml_deltamem_params & p    = args.params;

    const int64_t n_embd = input->ne[0];
    const bool    fits   = weight->ne[0] == n_embd && weight->ne[1] == args.n_proj &&
                           ggml_deltamem_is_matrix_of_rows(weight) && p.n_head == 1 && p.n_seqs == 1 && p.rank == 8 &&
                           input->type == GGML_TYPE_F32 && ggml_is_contiguous(input) && n_embd % 8 == 0 &&
                           (uintptr_t) input->data % 16 == 0 && (uintptr_t) weight->data % 16 == 0 &&
                           weight->nb[1] % 16 == 0;
    // one multiprocessor loads the weights: larger ones take less time in a product on all multiprocessors
    if (!fits || ggml_nbytes(weight) > PROJECT_MAX_BYTES) {
        return 0;
    }

    const size_t shared = (n_embd + round_up(args.n_proj, 4) + args.layout.size) * sizeof(float);
    if (shared > MAX_SHARED) {
        return 0;
    }

    const ggml_cuda_kernel_launch_params params(dim3(1), dim3(PROJECT_WARPS * WARP), shared, ctx.stream());

    const auto launch = [&](const auto * data) {
        using W                    = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
        const size_t weight_stride = weight->nb[1] / sizeof(W);
        const auto   kernel =
                p.flags & GGML_DELTAMEM_SEGMENTS ? project_read_kernel<W, 8, true> : project_read_kernel<W, 8, false>;
        ggml_cuda_kernel_launch(kernel, params, data, weight_stride, (const float *) input->data, (int) n_embd, args);
        return 1;
    };
    switch (weight->type) {
        case GGML_TYPE_F32:  return launch((const float *) weight->data);
        case GGML_TYPE_F16:  return launch((const half *) weight->data);
        case GGML_TYPE_BF16: return launch((const nv_bfloat16 *) weight->data);
        default:             return 0;
    }
}

#endif
