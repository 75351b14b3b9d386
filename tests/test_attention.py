"""Paged and ragged attention against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle.attention import (
    BatchDecode,
    BatchPrefill,
    BatchRaggedPrefill,
)

from tests.attention_cases import Batch, assert_close, from_bits, place, to_bits, value
from tests.reference.attention import attend


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def skip_unless_supported(device, *dtypes):
    if device == "cuda" and ("float32" in dtypes or len(set(dtypes)) > 1):
        pytest.skip("the CUDA kernels take float16 or bfloat16, the same for q and the cache")


def run_batch(
    batch, device, *, num_qo_heads, num_kv_heads, head_dim, decode=False, limits=None, **options
):
    """Plans and runs batch; returns float64 (out, lse)."""
    head_dim_vo = batch.v.shape[-1]
    lse_base = options.pop("lse_base", "2")
    spec = dict(
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_vo=head_dim_vo,
        page_size=batch.page_size,
        dtype=batch.dtype,
        kv_dtype=batch.kv_dtype,
        kv_layout=batch.layout,
        max_batch=len(batch.kv_lens),
        max_pages=len(batch.indices),
        lse_base=lse_base,
        device=device,
        **options,
    )
    if not decode:
        spec["max_qo_tokens"] = sum(batch.qo_lens)
    spec.update(limits or {})
    if decode:
        plan = BatchDecode(**spec)
        plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    else:
        plan = BatchPrefill(**spec)
        plan.plan(batch.qo_indptr, batch.indptr, batch.indices, batch.last_page_len)
    q = place(batch.q, batch.dtype, device)
    out, lse = plan.run(q, place(batch.kv_cache, batch.kv_dtype, device), return_lse=True)
    return value(out, batch.dtype), value(lse, "float32"), plan


def check(batch, device, *, sm_scale=None, causal=False, window_left=-1, lse_base="2", **options):
    prefill = {} if options.get("decode") else {"causal": causal}
    out, lse, plan = run_batch(
        batch,
        device,
        sm_scale=sm_scale,
        window_left=window_left,
        lse_base=lse_base,
        **prefill,
        **options,
    )
    want_out, want_lse = batch.expected(
        sm_scale=sm_scale, causal=causal, window_left=window_left, lse_base=lse_base
    )
    assert_close(out, want_out, batch.dtype)
    assert_close(lse, want_lse, "float32" if batch.dtype == "float32" else "float16")
    return plan


RAGGED_LENGTHS = [1, 0, 15, 16, 17, 100, 257, 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode_matches_reference(rng, device, dtype, page_size, layout):
    skip_unless_supported(device, dtype)
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, RAGGED_LENGTHS, page_size=page_size, layout=layout, dtype=dtype, **heads)
    check(batch, device, decode=True, **heads)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("decode", [True, False])
def test_any_multiple_of_8_is_a_head_dim(rng, device, head_dim, decode):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=head_dim)
    lens = [1, 40, 129]
    batch = Batch(rng, lens, qo_lens=None if decode else [1, 7, 33], dtype="float16", **heads)
    check(batch, device, decode=decode, causal=not decode, **heads)


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 6, 7, 8, 12, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("decode", [True, False])
def test_any_group_size(rng, device, group_size, decode):
    heads = dict(num_qo_heads=3 * group_size, num_kv_heads=3, head_dim=64)
    batch = Batch(rng, [5, 77, 0, 130], qo_lens=None if decode else [2, 30, 0, 5], **heads)
    check(batch, device, decode=decode, causal=not decode, **heads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_left", [-1, 0, 5, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_masks(rng, device, causal, window_left, dtype):
    skip_unless_supported(device, dtype)
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    # Fewer keys than queries (rows that see nothing), none at all, a long past, a whole prompt.
    batch = Batch(rng, [3, 0, 150, 90, 17], qo_lens=[9, 4, 2, 90, 0], dtype=dtype, **heads)
    check(batch, device, causal=causal, window_left=window_left, **heads)


def test_window_in_decode(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [1, 0, 30, 31, 200], **heads)
    check(batch, device, decode=True, window_left=29, **heads)


def test_head_dims_of_k_and_v_may_differ(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=192)
    for decode in (True, False):
        batch = Batch(
            rng, [1, 50, 200], qo_lens=None if decode else [1, 20, 3], head_dim_vo=128, **heads
        )
        check(batch, device, decode=decode, causal=not decode, **heads)


@pytest.mark.parametrize(
    "q_dtype,kv_dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_cache_of_another_dtype(rng, device, q_dtype, kv_dtype):
    skip_unless_supported(device, q_dtype, kv_dtype)
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [1, 50, 200], dtype=q_dtype, kv_dtype=kv_dtype, **heads)
    check(batch, device, decode=True, **heads)


@pytest.mark.parametrize("lse_base", ["2", "e"])
@pytest.mark.parametrize("sm_scale", [None, 0.25, 1.7])
def test_scale_and_lse_base(rng, device, lse_base, sm_scale):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [20, 300], dtype="float16", **heads)
    check(batch, device, decode=True, lse_base=lse_base, sm_scale=sm_scale, **heads)


def test_large_logits_do_not_overflow(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [33, 500], dtype="float16", **heads)
    batch.q = (batch.q * 30).astype(np.float16)
    check(batch, device, decode=True, sm_scale=1.0, **heads)


def test_k_and_v_apart_with_their_own_strides(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [40, 100], dtype="float16", packed=False, **heads)
    pages, page, kv_heads, dim = batch.k.shape
    wide = np.full((pages, page + 3, kv_heads + 2, dim + 8), np.nan, np.float16)
    wide[:, :page, :kv_heads, :dim] = batch.k
    apart = place(wide, "float16", device)[:, :page, :kv_heads, :dim]
    v_last = np.ascontiguousarray(batch.v.transpose(2, 0, 1, 3))
    v = place(v_last, "float16", device)
    v = v.transpose(1, 2, 0, 3) if device == "cpu" else None
    batch.kv_cache = (apart, v if device == "cpu" else place(batch.v, "float16", device))
    plan = BatchDecode(
        page_size=16, max_batch=2, max_pages=20, dtype="float16", device=device, **heads
    )
    plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    out = plan.run(place(batch.q, "float16", device), batch.kv_cache)
    assert_close(value(out, "float16"), batch.expected()[0], "float16")


def test_q_and_out_may_be_strided(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [40, 100, 7], dtype="float16", **heads)
    fused = np.full((3, 8, 64), np.nan, np.float16)
    fused[:, 2:6] = batch.q
    q = place(fused, "float16", device)[:, 2:6]
    wide = place(np.full((3, 4, 128), 7.0, np.float16), "float16", device)
    plan = BatchDecode(
        page_size=16, max_batch=3, max_pages=20, dtype="float16", device=device, **heads
    )
    plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    out = plan.run(q, place(batch.kv_cache, "float16", device), out=wide[:, :, 64:])
    assert out.shape == (3, 4, 64)
    after = value(wide, "float16")
    assert_close(after[:, :, 64:], batch.expected()[0], "float16")
    assert (after[:, :, :64] == 7.0).all()


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_block_table_equals_csr(rng, device, index_dtype):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, RAGGED_LENGTHS, dtype="float16", **heads)
    table = batch.block_table(20, padding=-7).astype(index_dtype)
    plan = BatchDecode(
        page_size=16, max_batch=8, max_pages=table.size, dtype="float16", device=device, **heads
    )
    plan.plan(block_table=table, seq_lens=np.array(batch.kv_lens, index_dtype))
    q, cache = place(batch.q, "float16", device), place(batch.kv_cache, "float16", device)
    from_table = value(plan.run(q, cache), "float16")
    plan.plan(
        batch.indptr.astype(index_dtype),
        batch.indices.astype(index_dtype),
        batch.last_page_len.astype(index_dtype),
    )
    assert np.array_equal(from_table, value(plan.run(q, cache), "float16"))
    assert_close(from_table, batch.expected()[0], "float16")


def test_index_tensors_on_the_device(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, RAGGED_LENGTHS, dtype="float16", **heads)
    plan = BatchDecode(
        page_size=16, max_batch=8, max_pages=40, dtype="float16", device=device, **heads
    )
    for index_dtype in ("int32", "int64"):
        plan.plan(
            *(
                raddle.tensor(x.astype(index_dtype), device=device)
                for x in (batch.indptr, batch.indices, batch.last_page_len)
            )
        )
        out = plan.run(place(batch.q, "float16", device), place(batch.kv_cache, "float16", device))
        assert_close(value(out, "float16"), batch.expected()[0], "float16")


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_prefill(rng, device, causal):
    qo_lens, kv_lens = [5, 0, 40, 1], [9, 3, 40, 0]
    q = to_bits(rng.standard_normal((sum(qo_lens), 6, 64)), "bfloat16")
    k = to_bits(rng.standard_normal((sum(kv_lens) + 2, 2, 64)), "bfloat16")
    v = to_bits(rng.standard_normal((sum(kv_lens) + 2, 2, 64)), "bfloat16")
    qo_indptr, kv_indptr = (np.concatenate([[0], np.cumsum(x)]) for x in (qo_lens, kv_lens))
    for layout in ("NHD", "HND"):
        plan = BatchRaggedPrefill(
            num_qo_heads=6,
            num_kv_heads=2,
            head_dim=64,
            max_batch=4,
            max_qo_tokens=60,
            max_kv_tokens=60,
            causal=causal,
            kv_layout=layout,
            device=device,
        )
        plan.plan(qo_indptr, kv_indptr)
        ks, vs = (
            x if layout == "NHD" else np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v)
        )
        args = (place(x, "bfloat16", device) for x in (q, ks, vs))
        out, lse = plan.run(*args, return_lse=True)
        for r in range(4):
            rows = slice(qo_indptr[r], qo_indptr[r + 1])
            keys = slice(kv_indptr[r], kv_indptr[r + 1])
            want = attend(
                *(from_bits(x, "bfloat16") for x in (q[rows], k[keys], v[keys])), causal=causal
            )
            assert_close(value(out, "bfloat16")[rows], want[0], "bfloat16")
            assert_close(value(lse, "float32")[rows], want[1], "float16")


def test_one_long_request_is_split_and_right(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=1, head_dim=64)
    batch = Batch(rng, [3000, 10], dtype="float32" if device == "cpu" else "float16", **heads)
    plan = check(batch, device, decode=True, **heads)
    if plan.schedule().config["num_workers"] > 1:
        assert len(plan.schedule().merges) >= 1


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), "float16"])
def test_schedule_counts_bytes_however_the_dtype_is_spelled(dtype):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, head_dim_vo=32)
    plan = BatchDecode(page_size=16, max_batch=1, max_pages=1, dtype=dtype, **heads)
    plan.plan(np.array([0, 1]), np.array([0]), np.array([9]))
    assert plan.schedule().worker_bytes.sum() == 9 * 2 * (64 + 32) * np.dtype(dtype).itemsize


def test_runs_are_bitwise_repeatable(rng, device):
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [700, 3, 90, 1200], **heads)
    first = run_batch(batch, device, decode=True, **heads)
    for _ in range(3):
        again = run_batch(batch, device, decode=True, **heads)
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


@pytest.mark.parametrize("qo_len", [1, 5])
def test_fixed_chunk_does_not_depend_on_the_batch(rng, device, qo_len):
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)
    lens = [700, 64, 90, 1500, 65]
    batch = Batch(rng, lens, qo_lens=[qo_len] * 5, **heads)
    # The promise is one plan's: what its maxima are decides which kernel runs.
    limits = dict(max_batch=5, max_pages=len(batch.indices), max_qo_tokens=5 * qo_len)
    options = dict(fixed_chunk=64, causal=True, limits=limits, **heads)
    together, _, _ = run_batch(batch, device, **options)
    assert_close(together, batch.expected(causal=True)[0], "bfloat16")
    for r in range(len(lens)):
        alone = Batch.__new__(Batch)
        alone.__dict__.update(batch.__dict__)
        alone.kv_lens, alone.qo_lens = [lens[r]], [qo_len]
        alone.indices = batch.indices[batch.indptr[r] : batch.indptr[r + 1]]
        alone.indptr = np.array([0, len(alone.indices)], np.int32)
        alone.last_page_len = batch.last_page_len[r : r + 1]
        alone.qo_indptr = np.array([0, qo_len], np.int32)
        alone.q = batch.q[r * qo_len : (r + 1) * qo_len]
        for max_ctas in (0, 1):
            single, _, _ = run_batch(alone, device, max_ctas=max_ctas, **options)
            assert np.array_equal(single, together[r * qo_len : (r + 1) * qo_len])


def test_permuting_requests_permutes_results(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [10, 200, 33], dtype="float16", **heads)
    straight, _, _ = run_batch(batch, device, decode=True, **heads)
    order = [2, 0, 1]
    pieces = [batch.indices[batch.indptr[r] : batch.indptr[r + 1]] for r in order]
    batch.indices = np.concatenate(pieces)
    batch.indptr = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int32)
    batch.last_page_len, batch.q = batch.last_page_len[order], batch.q[order]
    permuted, _, _ = run_batch(batch, device, decode=True, **heads)
    np.testing.assert_allclose(permuted, straight[order], rtol=2e-3, atol=2e-3)


def test_empty_batches(device):
    plan = BatchDecode(
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=64,
        page_size=16,
        dtype="float16",
        max_batch=4,
        max_pages=9,
        device=device,
    )
    cache = place(np.full((3, 2, 16, 2, 64), np.nan, np.float16), "float16", device)
    plan.plan(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    out, lse = plan.run(
        place(np.zeros((0, 4, 64), np.float16), "float16", device), cache, return_lse=True
    )
    assert tuple(out.shape) == (0, 4, 64) and tuple(lse.shape) == (0, 4)
    plan.plan(np.zeros(4, np.int32), np.zeros(0, np.int32), np.zeros(3, np.int32))
    q = place(np.ones((3, 4, 64), np.float16), "float16", device)
    out, lse = plan.run(q, cache, return_lse=True)
    assert (value(out, "float16") == 0).all() and (value(lse, "float32") == -np.inf).all()


def test_plan_is_kept_when_an_update_fails(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [20, 60], dtype="float16", **heads)
    plan = BatchDecode(
        page_size=16, max_batch=2, max_pages=8, dtype="float16", device=device, **heads
    )
    plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    with pytest.raises(raddle.errors.ArgumentError):
        plan.plan(batch.indptr, batch.indices, np.array([1, 17], np.int32))
    with pytest.raises(raddle.errors.CapacityError, match="9.*8"):
        plan.plan(np.array([0, 9], np.int32), np.arange(9, dtype=np.int32), np.array([1], np.int32))
    out = plan.run(place(batch.q, "float16", device), place(batch.kv_cache, "float16", device))
    assert_close(value(out, "float16"), batch.expected()[0], "float16")


def test_workspace_is_exact_and_may_be_shared(rng, device):
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [2000, 60], dtype="float16", **heads)
    spec = dict(page_size=16, max_batch=2, max_pages=200, dtype="float16", device=device, **heads)
    first = BatchDecode(**spec)
    size = first.workspace_size
    scratch = raddle.empty((size,), dtype="uint8", device=device)
    first.bind_workspace(scratch)
    second = BatchDecode(workspace=scratch, **spec)
    with pytest.raises(raddle.errors.CapacityError, match=f"{size} bytes needed, {size - 1} given"):
        BatchDecode(workspace=scratch[: size - 1], **spec)
    for plan in (first, second):
        plan.plan(batch.indptr, batch.indices, batch.last_page_len)
        out = plan.run(place(batch.q, "float16", device), place(batch.kv_cache, "float16", device))
        assert_close(value(out, "float16"), batch.expected()[0], "float16")
