"""raddle's operators in torch.library, for torch.compile(fullgraph=True) and torch.cuda.graph.

Importing this module defines torch.ops.raddle.*; each has its shape function (fake), runs on CPU
and CUDA tensors as raddle's own function of that name does, and has no gradient: it refuses inputs
that need one. Results are contiguous.

    op = AttentionOp(plan)             # a BatchDecode, BatchPrefill or BatchRaggedPrefill

    @torch.compile(fullgraph=True)
    def layer(q, cache): return op(q, cache) * 2

    plan.plan(...); layer(q, cache)    # plan between calls, as between the replays of a graph

A plan is state outside the graph: the operator is told which by a number, and runs whatever batch
was planned last. A plan with a variant of one's own takes its arguments as run() does:

    op = AttentionOp(plan, variant=capped)
    op(q, cache, variant_args=dict(bias=bias, cap=30.0))

    attention, attention_lse           a planned batch; see AttentionOp
    attention_writing, attention_lse_writing   by a variant with a hook that writes into tensors
    merge_state, merge_states          states of the same queries over disjoint keys
    append_slots, append_paged_kv_cache   into k_cache (and v_cache, None for a cache in one tensor)
    rmsnorm, layernorm, fused_add_rmsnorm, silu_and_mul, gelu_and_mul, gelu_tanh_and_mul
    rope, apply_rope                   into new tensors, or in place
    embedding, softmax, sample, token_logprobs

Eager code is faster by raddle's functions themselves, which know nothing of a dispatcher.
"""

import torch

from .. import attention as _attention
from .. import ops as _ops
from .torch_attention import AttentionOp
from .torch_library import define, nothing

__all__ = ["AttentionOp"]


def _like_first(x, *_args, **_kwargs):
    return x.new_empty(x.shape)


# ------------------------------------------------------------------ states and the cache


def _make_state(v_a, s_a, *_args, **_kwargs):
    return v_a.new_empty(v_a.shape), s_a.new_empty(s_a.shape)


def _make_merged(v, s, *_args, **_kwargs):
    shape = (v.shape[0], *v.shape[2:])
    return v.new_empty(shape), s.new_empty(shape[:-1])


define(
    "merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b, str lse_base='2') -> "
    "(Tensor, Tensor)",
    _make_state,
    lambda out, v_a, s_a, v_b, s_b, lse_base="2": _attention.merge_state(
        v_a, s_a, v_b, s_b, v_out=out[0], s_out=out[1], lse_base=lse_base
    ),
)
define(
    "merge_states(Tensor v, Tensor s, str lse_base='2') -> (Tensor, Tensor)",
    _make_merged,
    lambda out, v, s, lse_base="2": _attention.merge_states(
        v, s, v_out=out[0], s_out=out[1], lse_base=lse_base
    ),
)


def _join_cache(k_cache, v_cache):
    return k_cache if v_cache is None else (k_cache, v_cache)


define(
    "append_slots(Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) k_cache, "
    "Tensor(b!)? v_cache=None, str kv_layout='NHD') -> ()",
    nothing,
    lambda _, k, v, slot_mapping, k_cache, v_cache=None, kv_layout="NHD": _attention.append_slots(
        k, v, slot_mapping, _join_cache(k_cache, v_cache), kv_layout=kv_layout
    ),
)


def _append_paged(
    _, append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr,
    kv_layout="NHD",
):  # fmt: skip
    _attention.append_paged_kv_cache(
        append_key,
        append_value,
        batch_indices,
        positions,
        _join_cache(k_cache, v_cache),
        kv_indices,
        kv_indptr,
        kv_layout=kv_layout,
    )


define(
    "append_paged_kv_cache(Tensor append_key, Tensor append_value, Tensor batch_indices, "
    "Tensor positions, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor kv_indices, "
    "Tensor kv_indptr, str kv_layout='NHD') -> ()",
    nothing,
    _append_paged,
)

# ------------------------------------------------------------------ norms and activations

define(
    "rmsnorm(Tensor x, Tensor weight, float eps=1e-06, float weight_offset=0.0) -> Tensor",
    _like_first,
    lambda out, x, weight, eps=1e-6, weight_offset=0.0: _ops.rmsnorm(
        x, weight, eps, weight_offset=weight_offset, out=out
    ),
)
define(
    "layernorm(Tensor x, Tensor weight, Tensor bias, float eps=1e-06) -> Tensor",
    _like_first,
    lambda out, x, weight, bias, eps=1e-6: _ops.layernorm(x, weight, bias, eps, out=out),
)
define(
    "fused_add_rmsnorm(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps=1e-06, "
    "float weight_offset=0.0) -> ()",
    nothing,
    lambda _, x, residual, weight, eps=1e-6, weight_offset=0.0: _ops.fused_add_rmsnorm(
        x, residual, weight, eps, weight_offset=weight_offset
    ),
)


def _make_half(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


define("silu_and_mul(Tensor x) -> Tensor", _make_half, lambda out, x: _ops.silu_and_mul(x, out=out))
define("gelu_and_mul(Tensor x) -> Tensor", _make_half, lambda out, x: _ops.gelu_and_mul(x, out=out))
define(
    "gelu_tanh_and_mul(Tensor x) -> Tensor",
    _make_half,
    lambda out, x: _ops.gelu_tanh_and_mul(x, out=out),
)

# ------------------------------------------------------------------ rotary embedding

_ROPE = "Tensor positions, Tensor cos_sin_cache, bool interleave=False"


def _make_rotated(q, k, *_args, **_kwargs):
    return q.new_empty(q.shape), k.new_empty(k.shape)


define(
    f"rope(Tensor q, Tensor k, {_ROPE}) -> (Tensor, Tensor)",
    _make_rotated,
    lambda out, q, k, positions, cos_sin_cache, interleave=False: _ops.apply_rope(
        q, k, positions, cos_sin_cache, interleave=interleave, q_out=out[0], k_out=out[1]
    ),
)
define(
    f"apply_rope(Tensor(a!) q, Tensor(b!)? k, {_ROPE}) -> ()",
    nothing,
    lambda _, q, k, positions, cos_sin_cache, interleave=False: _ops.apply_rope(
        q, k, positions, cos_sin_cache, interleave=interleave
    ),
)

# ------------------------------------------------------------------ tokens


def _make_rows(ids, table):
    return table.new_empty((ids.shape[0], table.shape[1]))


def _make_probabilities(logits, *_args, **_kwargs):
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _make_ids(logits, **_kwargs):
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


def _make_logprobs(logits, ids, top=0):
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty((n, top), dtype=torch.int32),
        logits.new_empty((n, top), dtype=torch.float32),
    )


def _run_logprobs(out, logits, ids, top=0):
    for mine, theirs in zip(out, _ops.token_logprobs(logits, ids, top=top)):
        mine.copy_(theirs)


define(
    "embedding(Tensor ids, Tensor table) -> Tensor",
    _make_rows,
    lambda out, ids, table: _ops.embedding(ids, table, out=out),
)
define(
    "softmax(Tensor logits, float temperature=1.0) -> Tensor",
    _make_probabilities,
    lambda out, logits, temperature=1.0: _ops.softmax(logits, temperature=temperature, out=out),
)
# Settings are tensors of one number per row; None: what raddle.ops.sample does without.
_SETTINGS = ", ".join(
    f"Tensor? {name}=None" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "offset")
)
define(
    f"sample(Tensor logits, *, {_SETTINGS}) -> Tensor",
    _make_ids,
    lambda out, logits, **settings: _ops.sample(
        logits, out=out, **{name: x for name, x in settings.items() if x is not None}
    ),
)
define(
    "token_logprobs(Tensor logits, Tensor ids, int top=0) -> (Tensor, Tensor, Tensor)",
    _make_logprobs,
    _run_logprobs,
)
