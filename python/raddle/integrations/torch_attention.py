"""A planned batch of attention as operators of torch; see raddle.integrations.torch."""

import itertools
import weakref

import torch

from ..errors import ArgumentError, DTypeError, StateError
from .torch_library import define

_plans = weakref.WeakValueDictionary()  # number -> plan; its AttentionOp keeps it alive
_numbers = itertools.count(1)


class AttentionOp:
    """A planned attention object as an operator of torch.

    plan: BatchDecode, BatchPrefill or BatchRaggedPrefill, planned before each call; its number
    `handle` is good for as long as this object lives. out_dtype: the plan's o_dtype where it is not
    that of q.
    """

    def __init__(self, plan, out_dtype=None):
        self.plan = plan
        self.out_dtype = out_dtype
        self.handle = next(_numbers)
        _plans[self.handle] = plan

    def __call__(
        self,
        q,
        kv_cache,
        *,
        sinks=None,
        k_scale=None,
        v_scale=None,
        variant_args=None,
        return_lse=False,
    ):
        """run() of the plan.

        q: [qo tokens, num_qo_heads, head_dim]. kv_cache: one tensor or a pair (k, v), that of a
        ragged plan too. sinks: float32 [num_qo_heads]. k_scale, v_scale: numbers or float32
        [num_kv_heads]. variant_args: a dict of what the variant declares; torch tensors on the
        device of q with the dtypes of the declaration, and numbers. Tensors that a hook writes are
        mutated inputs of the operator. Returns out [qo tokens, num_qo_heads, head_dim_vo], or (out,
        lse float32 [qo tokens, num_qo_heads]) with return_lse.

        Raises what run() raises; ArgumentError for variant_args that are not the variant's, with
        the names that are expected, DTypeError for one that is no tensor or no number."""
        k, v = kv_cache if isinstance(kv_cache, (tuple, list)) else (kv_cache, None)
        options = dict(sinks=sinks, out_dtype=self.out_dtype)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if isinstance(scale, torch.Tensor):
                options[name + "s"] = scale
            elif scale is not None:
                options[name] = float(scale)
        name = "attention_lse" if return_lse else "attention"
        if variant_args is not None or self.plan.variant is not None:
            options |= _spread_arguments(self.plan.variant, variant_args or {})
            name += "_writing" if "variant_written" in options else ""
        return getattr(torch.ops.raddle, name)(q, k, v, self.handle, **options)


def _find_plan(handle):
    plan = _plans.get(handle)
    if plan is None:
        raise StateError(f"plan: there is no plan {handle}; its AttentionOp is gone")
    return plan


# ------------------------------------------------------------------ what a variant is given


def _spread_arguments(variant, given):
    """The operators' keywords for variant_args."""
    if variant is None:
        raise ArgumentError("variant_args: the plan was made without a variant")
    read = [name for name, _, is_written in variant.tensors if not is_written]
    written = [name for name, _, is_written in variant.tensors if is_written]
    scalars = [name for name, *_ in variant.scalars]
    names = read + written + scalars
    if sorted(given) != sorted(names):
        raise ArgumentError(
            f"variant_args: variant {variant.name} declares {', '.join(names) or 'nothing'}; "
            f"got {', '.join(given) or 'nothing'}"
        )
    for name in names:
        is_number = name in scalars
        if not isinstance(given[name], (int, float) if is_number else torch.Tensor):
            expected = "a number" if is_number else "a torch tensor"
            kind = type(given[name]).__name__
            raise DTypeError(f"variant_args: {name}: expected {expected}, got {kind}")
    options = dict(
        variant_names=names,
        variant_tensors=[given[name] for name in read],
        variant_scalars=[float(given[name]) for name in scalars],
    )
    if written:
        options["variant_written"] = [given[name] for name in written]
    return options


# ------------------------------------------------------------------ operators

_ATTENTION = (
    "Tensor q, Tensor k, Tensor? v, SymInt plan, *, Tensor? sinks=None, float k_scale=1.0, "
    "float v_scale=1.0, Tensor? k_scales=None, Tensor? v_scales=None, ScalarType? out_dtype=None, "
    # names of variant_tensors, variant_written and variant_scalars, in this order
    "str[]? variant_names=None, Tensor[]? variant_tensors=None, float[] variant_scalars=[]"
)
_WRITING = f"{_ATTENTION}, Tensor(a!)[] variant_written"


def _make_attention(q, k, v, plan, *, out_dtype=None, **_kwargs):
    dim = (k if v is None else v).shape[-1]
    return q.new_empty((*q.shape[:2], dim), dtype=out_dtype or q.dtype)


def _make_attention_lse(q, k, v, plan, **kwargs):
    out = _make_attention(q, k, v, plan, **kwargs)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


def _run_attention(
    results, q, k, v, plan, *, sinks=None, k_scale=1.0, v_scale=1.0, k_scales=None, v_scales=None,
    out_dtype=None, variant_names=None, variant_tensors=None, variant_scalars=(),
    variant_written=(),
):  # fmt: skip
    out, lse = results if isinstance(results, tuple) else (results, None)
    variant_args = None
    if variant_names is not None:
        values = (*(variant_tensors or ()), *variant_written, *variant_scalars)
        if len(values) != len(variant_names):
            raise ArgumentError(
                f"variant_names: expected one for each of {len(values)} arguments, "
                f"got {len(variant_names)}"
            )
        variant_args = dict(zip(variant_names, values))
    _find_plan(plan)._plan.run(
        q,
        k,
        v,
        out,
        lse,
        lse is not None,
        None,
        sinks,
        _scale(k_scale, k_scales),
        _scale(v_scale, v_scales),
        variant_args,
    )


def _scale(number, tensor):
    return tensor if tensor is not None else None if number == 1.0 else number


for _arguments, _suffix in ((_ATTENTION, ""), (_WRITING, "_writing")):
    define(f"attention{_suffix}({_arguments}) -> Tensor", _make_attention, _run_attention)
    define(
        f"attention_lse{_suffix}({_arguments}) -> (Tensor, Tensor)",
        _make_attention_lse,
        _run_attention,
    )
