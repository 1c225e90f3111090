"""How llama.cpp's converter orders the rows of attention projections: python converter_rows.py CONVERTER_DIR

Gives each of its model classes weights with numbered rows, and prints {architecture: {class: {head: order}}} as JSON.
The order is "in order", "permuted" (RoPE's pairs side by side) or "other"; "unknown" if a class knows no such tensor,
or needs more of the model than is made up here.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

converter = sys.argv[1]
sys.path[:0] = [converter, f"{converter}/gguf-py"]

import conversion  # noqa: E402
import gguf  # noqa: E402
import torch  # noqa: E402

N_HEAD, N_HEAD_KV, HEAD_DIM = 4, 2, 16
N_EMBD = N_HEAD * HEAD_DIM
HPARAMS = dict(
    num_attention_heads=N_HEAD, n_head=N_HEAD, n_heads=N_HEAD, hidden_size=N_EMBD, n_embd=N_EMBD, head_dim=HEAD_DIM,
    num_key_value_heads=N_HEAD_KV, num_kv_heads=N_HEAD_KV, n_kv_heads=N_HEAD_KV,
    num_hidden_layers=2, n_layer=2, intermediate_size=8, shared_intermediate_size=8, num_local_experts=2,
    num_experts=2, expert_layer_offset=0, expert_layer_period=1, qk_scale_factor=1.0,
)  # fmt: skip
# attributes that classes set when they load a model
ATTRIBUTES = dict(
    _is_nvfp4=False, fuse_qkv=False, fuse_gate_up_exps=False, _experts=None, hf_arch="", model_name="", block_count=2,
    _ssm_layers=[], _attn_layers=[0, 1], _num_heads=[N_HEAD] * 2, _num_kv_heads=[N_HEAD_KV] * 2,
    hparam_prefixes=["mamba"], attention_in_multiplier=2.0, attention_out_multiplier=2.0, key_multiplier=2.0,
)  # fmt: skip
HEADS = {"q": N_HEAD, "k": N_HEAD_KV, "v": N_HEAD_KV, "o": N_HEAD}


def subclasses(kind):
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def numbered(head):
    """A weight whose rows are their numbers, from 1 on."""
    return (torch.arange(HEADS[head] * HEAD_DIM, dtype=torch.float32) + 1)[:, None].repeat(1, N_EMBD)


def permuted(rows, n_head):
    return rows.reshape(n_head, 2, len(rows) // n_head // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def fused():
    """By class, the weight that holds q, k and v together, where the model has no others: its name and its rows."""
    q, k, v = map(numbered, "qkv")
    groups = torch.cat([part.reshape(N_HEAD_KV, -1, HEAD_DIM, N_EMBD) for part in (q, k, v)], 1)
    heads = torch.cat([q.reshape(N_HEAD, 1, HEAD_DIM, N_EMBD)] * 3, 1)  # as many of k and v as of q
    layer = "layers.0.attention"
    return {
        "BailingMoeModel": (f"model.{layer}.query_key_value.weight", torch.cat([q, k, v])),
        "FalconModel": ("transformer.h.0.self_attention.query_key_value.weight", groups.reshape(-1, N_EMBD)),
        "GPTNeoXModel": (f"gpt_neox.{layer}.query_key_value.weight", heads.reshape(-1, N_EMBD)),
        "InternLM2Model": (f"model.{layer}.wqkv.weight", groups.reshape(-1, N_EMBD)),
    }


def order(rows, head, n_head):
    expected = numbered("q" if len(rows) == N_EMBD else head)
    if rows.shape == expected.shape and torch.equal(rows, expected):
        return "in order"
    if rows.shape == expected.shape and torch.equal(rows, permuted(expected, n_head)):
        return "permuted"
    return "other"


def shown(kind, name, weight, **attributes):
    """The tensors that the class writes for one weight."""
    model = object.__new__(kind)  # the constructor needs a model's files
    vars(model).update(ATTRIBUTES, hparams=dict(HPARAMS), **attributes)
    model.tensor_map = gguf.get_tensor_name_map(kind.model_arch, 2)
    return {out: values for out, values in kind.modify_tensors(model, weight, name, 0)}


def orders(kind, **attributes):
    found = {}
    for head, n_head in HEADS.items():
        try:
            out = shown(kind, f"model.layers.0.self_attn.{head}_proj.weight", numbered(head), **attributes)
            written = "blk.0.attn_output.weight" if head == "o" else f"blk.0.attn_{head}.weight"
            found[head] = order(out[written], head, n_head)
        except Exception:  # whatever a class raises without a model
            found[head] = "unknown"
    if kind.__name__ in FUSED:
        out = shown(kind, *FUSED[kind.__name__])
        if "blk.0.attn_qkv.weight" in out:
            whole = out["blk.0.attn_qkv.weight"]
            n = len(whole) - N_EMBD
            parts = whole.split([N_EMBD, n // 2, n // 2])
        else:
            parts = [out[f"blk.0.attn_{head}.weight"] for head in "qkv"]
        found |= {head: order(rows, head, len(rows) // HEAD_DIM) for head, rows in zip("qkv", parts)}
    return found


FUSED = fused()


def main():
    for module in pkgutil.iter_modules(conversion.__path__):
        importlib.import_module(f"conversion.{module.name}")
    found = {}
    for kind in sorted(set(subclasses(conversion.TextModel)), key=lambda kind: kind.__name__):
        arch = getattr(kind, "model_arch", None)
        if arch is None:
            continue
        classes = found.setdefault(gguf.MODEL_ARCH_NAMES[arch], {})
        classes[kind.__name__] = orders(kind)
        if hasattr(kind, "use_mrope"):  # GLM-4's order depends on it
            classes[f"{kind.__name__} with M-RoPE"] = orders(kind, use_mrope=True)
    print(json.dumps(found))


main()
