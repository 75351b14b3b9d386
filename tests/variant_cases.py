"""Batches of every kind for the tests of attention variants: how they are planned, run and compared
with the reference.

Needs: numpy."""

from dataclasses import dataclass

import numpy as np
from raddle.attention import BatchDecode, BatchPrefill, BatchRaggedPrefill

from tests.attention_cases import Batch, assert_close, from_bits, place, to_bits, value
from tests.reference.attention import Variant, attend


@dataclass(frozen=True)
class Kind:
    """A kind of batch: which class runs it, and how long its requests are."""

    kv_lens: tuple
    qo_lens: tuple | None = None  # None: decode
    causal: bool = False
    fixed_chunk: int = 0
    ragged: bool = False
    limits: tuple = ()


KINDS = {
    "decode": Kind((1, 0, 15, 16, 17, 100, 257, 3)),
    "few tokens": Kind((200, 1, 0, 33, 70), (4, 1, 2, 3, 4), True, limits=(("max_qo_len", 4),)),
    "prefill": Kind((150, 3, 0, 40), (90, 5, 2, 40), True),
    "no causality": Kind((70, 3, 40), (33, 5, 0)),
    "ragged": Kind((80, 0, 20, 130), (80, 1, 4, 3), True, ragged=True),
    "split": Kind((3000, 10)),
    "fixed chunks": Kind((300, 64, 1, 200), (1, 40, 1, 5), True, fixed_chunk=64),
}


def plan_spec(kind, heads, head_dim, device, dtype, **spec):
    """The keywords that all three classes share."""
    num_qo_heads, num_kv_heads = heads
    spec = dict(
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        max_batch=len(kind.kv_lens),
        fixed_chunk=kind.fixed_chunk,
        device=device,
        **spec,
    )
    if kind.qo_lens is not None:
        spec.update(causal=kind.causal, max_qo_tokens=sum(kind.qo_lens))
        spec.update(kind.limits)
    return spec


def run_paged(rng, kind, device, heads, head_dim, dtype, spec, run, page_size=7):
    """(batch, plan's results) of a paged batch."""
    kv_dtype = spec.get("kv_dtype") or dtype
    batch = Batch(
        rng,
        kind.kv_lens,
        qo_lens=kind.qo_lens,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    words = plan_spec(kind, heads, head_dim, device, dtype, **spec)
    words.update(page_size=page_size, max_pages=len(batch.indices))
    tables = (batch.indptr, batch.indices, batch.last_page_len)
    if kind.qo_lens is None:
        plan = BatchDecode(**words)
        plan.plan(*tables)
    else:
        plan = BatchPrefill(**words)
        plan.plan(batch.qo_indptr, *tables)
    q = place(batch.q, dtype, device)
    return batch, plan.run(q, place(batch.kv_cache, kv_dtype, device), **run)


def run_ragged(rng, kind, device, heads, head_dim, dtype, spec, run):
    """(q, k, v, indptrs, plan's results) of a ragged batch."""
    kv_dtype = spec.get("kv_dtype") or dtype
    q = to_bits(rng.standard_normal((sum(kind.qo_lens), heads[0], head_dim)), dtype)
    k, v = (
        to_bits(rng.standard_normal((sum(kind.kv_lens), heads[1], head_dim)), kv_dtype)
        for _ in range(2)
    )
    indptrs = [np.concatenate([[0], np.cumsum(x)]) for x in (kind.qo_lens, kind.kv_lens)]
    words = plan_spec(kind, heads, head_dim, device, dtype, **spec)
    plan = BatchRaggedPrefill(**words, max_kv_tokens=sum(kind.kv_lens))
    plan.plan(*indptrs)
    arrays = place(q, dtype, device), place(k, kv_dtype, device), place(v, kv_dtype, device)
    return q, k, v, indptrs, plan.run(*arrays, **run)


def expect_ragged(q, k, v, indptrs, dtype, kv_dtype, **options):
    q, k, v = from_bits(q, dtype), from_bits(k, kv_dtype), from_bits(v, kv_dtype)
    results = [
        attend(
            q[indptrs[0][r] : indptrs[0][r + 1]],
            k[indptrs[1][r] : indptrs[1][r + 1]],
            v[indptrs[1][r] : indptrs[1][r + 1]],
            request=r,
            first_token=indptrs[0][r],
            **options,
        )
        for r in range(len(indptrs[0]) - 1)
    ]
    return tuple(np.concatenate(x) for x in zip(*results, strict=True))


def place_words(words, device):
    """NumPy arrays among the keywords of a run, where the test runs."""
    return {
        name: place_words(x, device)
        if isinstance(x, dict)
        else place(x, str(x.dtype), device)
        if isinstance(x, np.ndarray)
        else x
        for name, x in words.items()
    }


def check(
    rng,
    kind,
    device,
    variant,
    *,
    spec=None,
    run=None,
    heads=(8, 2),
    head_dim=64,
    dtype=None,
    page_size=7,
    window_left=-1,
    sm_scale=None,
    lse_base="2",
):
    """Runs a batch of a kind with the keywords of a spec and a run, and compares it with the
    reference of variant. Returns (out, lse) as float64; lse is None without a softmax."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    variant = variant if isinstance(variant, Variant) else Variant(**variant)
    dtype = dtype or ("float32" if device == "cpu" else "float16")
    has_lse = variant.softmax and not variant.sigmoid
    spec = dict(spec or {}, window_left=window_left, sm_scale=sm_scale, lse_base=lse_base)
    kv_dtype = spec.get("kv_dtype") or dtype
    run = dict(place_words(run or {}, device), return_lse=has_lse)
    options = dict(
        sm_scale=sm_scale,
        causal=kind.causal,
        window_left=window_left,
        lse_base=lse_base,
        variant=variant,
    )
    if kind.ragged:
        *arrays, got = run_ragged(rng, kind, device, heads, head_dim, dtype, spec, run)
        want_out, want_lse = expect_ragged(*arrays, dtype, kv_dtype, **options)
    else:
        batch, got = run_paged(rng, kind, device, heads, head_dim, dtype, spec, run, page_size)
        want_out, want_lse = batch.expected(**options)
    out, lse = got if has_lse else (got, None)
    out = value(out, dtype)
    scale = 1.0 if has_lse else max(1.0, np.abs(want_out).max())
    # The CUDA kernels round what they rotate back to 16 bits.
    turns_keys = variant.rope is not None or variant.key is not None
    factor = 3 if device == "cuda" and turns_keys else 1
    assert_close(out / scale, want_out / scale, dtype, factor)
    if has_lse:
        lse = value(lse, "float32")
        rounded = dtype if factor > 1 else "float16"
        assert_close(lse, want_lse, "float32" if dtype == "float32" else rounded, factor)
    return out, lse
