"""raddle.flashinfer's prefill, page, cascade and bit-packing calls do what FlashInfer documents.

On torch tensors, against float64. Needs: torch; a GPU for device cuda.
"""

import numpy as np
import pytest
from raddle import flashinfer
from raddle.flashinfer import _plans
from raddle.flashinfer.utils import get_alibi_slopes

from tests.attention_cases import assert_close, from_bits, to_bits
from tests.flashinfer_cases import VARIANTS, Problem, to_torch, value, workspace
from tests.reference.attention import alibi_slopes, attend, merge

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


# -- batch prefill ------------------------------------------------------------------------------

PREFILL = dict(lengths=(40, 0, 5, 300), qo_lens=(7, 0, 5, 20))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
def test_paged_prefill(device, layout, causal):
    problem = Problem(device, **PREFILL, layout=layout)
    wrapper = problem.prefill(causal=causal)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True), causal=causal)
    with pytest.raises(ValueError, match="q: 31 rows"):
        wrapper.run(problem.q[:-1], problem.cache)


def test_paged_prefill_of_one_row_each(device):
    problem = Problem(device)
    problem.check(problem.prefill(causal=True).run_return_lse(problem.q, problem.cache))


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_prefill_variants(device, name):
    given, expected = VARIANTS[name]
    problem = Problem(device, **PREFILL)
    wrapper = problem.prefill(causal=True, **given)
    problem.check(wrapper.run_return_lse(problem.q, problem.cache), causal=True, **expected)


def test_forward_of_the_old_prefill_api(device):
    problem = Problem(device, **PREFILL, dtype="float16")
    wrapper = problem.prefill()
    result = wrapper.forward_return_lse(problem.q, problem.cache, causal=True, sm_scale=0.3)
    problem.check(result, causal=True, sm_scale=0.3)
    out = wrapper.forward(problem.q, problem.cache)
    assert_close(value(out), problem.batch.expected()[0], "float16")


def test_lse_base_and_layout(device):
    problem = Problem(device, **PREFILL)
    wrapper = problem.prefill(causal=True)
    _, plain = wrapper.run(problem.q, problem.cache, return_lse=True)
    _, natural = wrapper.run(problem.q, problem.cache, return_lse=True, lse_base="ln")
    torch.testing.assert_close(natural, plain * np.log(2))
    _, turned = wrapper.run(problem.q, problem.cache, return_lse=True, lse_layout="HN")
    assert torch.equal(turned, plain.T) and turned.is_contiguous()
    given = torch.empty(plain.T.shape, device=device)
    _, result = wrapper.run(problem.q, problem.cache, lse=given, return_lse=True, lse_layout="HN")
    assert result is given and torch.equal(given, plain.T)
    with pytest.raises(ValueError, match="lse_base"):
        wrapper.run(problem.q, problem.cache, return_lse=True, lse_base="10")


def test_graph_prefill_fixes_the_query_rows(device):
    problem = Problem(device, **PREFILL)
    buffers = [torch.empty(n, dtype=torch.int32, device=device) for n in (5, 5, 60, 4)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        workspace(device), "NHD", True, *buffers
    )
    arguments = (*problem.tables, *problem.shape)
    wrapper.plan(problem.qo_indptr, *arguments, causal=True, **problem.dtypes)
    problem.check(wrapper.run_return_lse(problem.q, problem.cache), causal=True)
    assert torch.equal(buffers[0].cpu(), problem.qo_indptr)
    with pytest.raises(ValueError, match="33 query rows"):
        more = problem.qo_indptr + (problem.qo_indptr == problem.qo_indptr[-1])
        wrapper.plan(more, *arguments, causal=True, **problem.dtypes)
    with pytest.raises(ValueError, match="batch is 3"):
        wrapper.plan(problem.qo_indptr[:-1], *arguments, **problem.dtypes)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim_vo", [None, 32])
def test_ragged_prefill(device, layout, head_dim_vo):
    rng = np.random.default_rng(5)
    qo_lens, kv_lens = (7, 1, 0, 20), (40, 1, 0, 300)
    dim_vo = head_dim_vo or 64
    q, k, v = (
        to_bits(rng.standard_normal(shape), "bfloat16")
        for shape in ((28, 6, 64), (341, 2, 64), (341, 2, dim_vo))
    )
    qo, kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (qo_lens, kv_lens))
    parts = [
        attend(
            *(from_bits(x[a:b], "bfloat16") for x, a, b in
              ((q, qo[i], qo[i + 1]), (k, kv[i], kv[i + 1]), (v, kv[i], kv[i + 1]))),
            causal=True,
            window_left=30,
            sm_scale=0.2,
        )
        for i in range(len(qo_lens))
    ]  # fmt: skip
    want_out, want_lse = (np.concatenate(x) for x in zip(*parts, strict=True))
    if layout == "HND":
        k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device), layout)
    offsets = (torch.from_numpy(qo), torch.from_numpy(kv))
    # window_left and the cap come before sm_scale here
    wrapper.plan(
        *offsets, 6, 2, 64, head_dim_vo, None, None, True, "NONE", False, 30, None, 0.2,
        q_data_type="bfloat16",
    )  # fmt: skip
    out, lse = wrapper.run(*(to_torch(x, "bfloat16", device) for x in (q, k, v)), return_lse=True)
    assert_close(value(out), want_out, "bfloat16")
    assert_close(value(lse), want_lse, "float16")


# -- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_append(device, layout, page_size):
    rng = np.random.default_rng(6)
    lengths, appended = np.array([9, 3, 0, 6]), np.array([4, 3, 0, 1])
    pages = -(-lengths // page_size)
    indptr, append_indptr = (
        torch.from_numpy(np.concatenate([[0], np.cumsum(x)]).astype(np.int32)).to(device)
        for x in (pages, appended)
    )
    ids = torch.from_numpy(rng.permutation(pages.sum() + 2)[: pages.sum()].astype(np.int32))
    last = torch.from_numpy(np.where(pages > 0, lengths - (pages - 1) * page_size, 0)).to(
        device, torch.int32
    )
    seq_lens = flashinfer.get_seq_lens(indptr, last, page_size)
    assert seq_lens.tolist() == lengths.tolist()
    nnz = int(appended.sum()) + 3  # three rows of padding, as under a graph
    batch_indices, positions = flashinfer.get_batch_indices_positions(append_indptr, seq_lens, nnz)
    assert batch_indices.dtype == positions.dtype == torch.int32
    assert batch_indices.tolist() == [0] * 4 + [1] * 3 + [3] + [-1] * 3
    assert positions.tolist() == [5, 6, 7, 8, 0, 1, 2, 5, 0, 0, 0]

    k, v = (torch.from_numpy(rng.standard_normal((nnz, 2, 8)).astype(np.float16)) for _ in "kv")
    shape = (page_size, 2) if layout == "NHD" else (2, page_size)
    cache = torch.full((len(ids) + 2, 2, *shape, 8), torch.nan, dtype=torch.float16, device=device)
    flashinfer.append_paged_kv_cache(
        k.to(device), v.to(device), batch_indices, positions, cache, ids.to(device), indptr, last,
        layout,
    )  # fmt: skip
    cache = cache.cpu() if layout == "NHD" else cache.cpu().transpose(2, 3)
    expected = torch.full_like(cache, torch.nan)
    for row in range(int(appended.sum())):
        request, position = int(batch_indices[row]), int(positions[row])
        page = ids[int(indptr[request]) + position // page_size]
        expected[page, 0, position % page_size] = k[row]
        expected[page, 1, position % page_size] = v[row]
    torch.testing.assert_close(cache, expected, equal_nan=True, rtol=0, atol=0)


# -- merging ------------------------------------------------------------------------------------


def states(rng, shape, device, dtype="float16"):
    """v, s as torch tensors and in float64; some states are empty (0 and -inf)."""
    s = (rng.standard_normal(shape) * 3).astype(np.float32)
    s[rng.random(shape) < 0.2] = -np.inf
    s[0] = -np.inf
    v = to_bits(np.where(np.isinf(s)[..., None], 0, rng.standard_normal((*shape, 64))), dtype)
    return to_torch(v, dtype, device), torch.from_numpy(s).to(device), from_bits(v, dtype), s


def test_merge_state(device):
    rng = np.random.default_rng(7)
    va, sa, va64, sa64 = states(rng, (30, 6), device)
    vb, sb, vb64, sb64 = states(rng, (30, 6), device)
    want = merge(np.stack([va64, vb64]), np.stack([sa64, sb64]))
    v, s = flashinfer.merge_state(va, sa, vb, sb)
    assert_close(value(v), want[0], "float16")
    assert_close(value(s), want[1], "float32")
    mask = torch.arange(30, device=device) % 3 > 0
    kept_v, kept_s = va.clone(), sa.clone()
    flashinfer.merge_state_in_place(va, sa, vb, sb, mask)
    assert torch.equal(va, torch.where(mask[:, None, None], v, kept_v))
    assert torch.equal(sa, torch.where(mask[:, None], s, kept_s))


def test_merge_in_place_updates_a_sum_of_another_dtype(device):
    rng = np.random.default_rng(8)
    v, s, v64, s64 = states(rng, (5, 6), device)
    other_v, other_s, other_v64, other_s64 = states(rng, (5, 6), device)
    s = s.half()
    want = merge(np.stack([v64, other_v64]), np.stack([value(s), other_s64]))
    flashinfer.merge_state_in_place(v, s, other_v, other_s)
    assert_close(value(v), want[0], "float16")
    assert_close(value(s), want[1], "float16")


@pytest.mark.parametrize("num_states", [1, 2, 7])
def test_merge_states(device, num_states):
    v, s, v64, s64 = states(np.random.default_rng(9), (12, num_states, 6), device)
    want = merge(np.moveaxis(v64, 1, 0), np.moveaxis(s64, 1, 0))
    out, lse = flashinfer.merge_states(v, s)
    assert_close(value(out), want[0], "float16")
    assert_close(value(lse), want[1], "float32")


def test_merge_states_of_various_lengths(device):
    lengths = [3, 0, 1, 12, 5]
    v, s, v64, s64 = states(np.random.default_rng(10), (sum(lengths), 6), device)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    out, lse = flashinfer.triton.cascade.variable_length_merge_states(
        v, s, torch.from_numpy(indptr).to(device)
    )
    for row, (a, b) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
        if a == b:
            assert torch.all(out[row] == 0) and torch.all(lse[row] == -torch.inf)
            continue
        want = merge(v64[a:b], s64[a:b])
        assert_close(value(out[row]), want[0], "float16")
        assert_close(value(lse[row]), want[1], "float32")


def shared_prefix(device, page_size, qo_lens, dtype="float16"):
    """Requests with a common prefix of 32 tokens: a batch, and the same pages as two levels."""
    lengths = (50, 33, 100)
    problem = Problem(device, lengths, qo_lens=qo_lens, page_size=page_size, dtype=dtype)
    batch, shared = problem.batch, 32 // page_size
    first = batch.indices[:shared]
    for r in range(len(lengths)):
        batch.indices[batch.indptr[r] : batch.indptr[r] + shared] = first
    own = np.concatenate(
        [
            batch.indices[a + shared : b]
            for a, b in zip(batch.indptr[:-1], batch.indptr[1:], strict=True)
        ]
    )
    own_indptr = batch.indptr - shared * np.arange(4, dtype=np.int32)
    top = [np.array([0, shared], np.int32), first, np.array([page_size], np.int32)]
    bottom = [own_indptr, own, batch.last_page_len]
    return problem, [[torch.from_numpy(np.ascontiguousarray(x)) for x in t] for t in (top, bottom)]


@pytest.mark.parametrize("qo_lens", [(1, 1, 1), (4, 1, 17)])
@pytest.mark.parametrize("page_size", [1, 16])
def test_cascade_equals_attention_over_whole_tables(device, page_size, qo_lens):
    problem, levels = shared_prefix(device, page_size, qo_lens)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace(device), "NHD")
    whole = torch.tensor([0, len(problem.q)], dtype=torch.int32)
    wrapper.plan(
        [whole, problem.qo_indptr],
        *([level[i] for level in levels] for i in range(3)),
        *problem.shape,
        causal=True,
    )
    want, _ = problem.batch.expected(causal=True)
    assert_close(value(wrapper.run(problem.q, problem.cache)), want, "float16")
    assert_close(value(wrapper.forward(problem.q, problem.cache)), want, "float16")


@pytest.mark.parametrize("qo_lens", [(1, 1, 1), (4, 1, 17)])
def test_shared_prefix_wrappers(device, qo_lens):
    problem, (top, bottom) = shared_prefix(device, 16, qo_lens)
    pages = problem.cache[top[1].long().to(device)].transpose(0, 1)
    k, v = pages.reshape(2, 32, *pages.shape[3:])
    want, _ = problem.batch.expected(causal=True)
    if max(qo_lens) == 1:
        wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(device))
        wrapper.begin_forward(*bottom, *problem.shape)
        out = wrapper.forward(problem.q, k, v, problem.cache)
    else:
        wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(device))
        wrapper.begin_forward(problem.qo_indptr, *bottom, *problem.shape)
        out = wrapper.forward(problem.q, k, v, problem.cache, causal=True)
    assert_close(value(out), want, "float16")


# -- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bitorder", ["big", "little"])
def test_packbits(device, bitorder):
    rng = np.random.default_rng(11)
    for n in (0, 1, 8, 9, 1000):
        x = rng.random(n) < 0.5
        packed = flashinfer.packbits(torch.from_numpy(x).to(device), bitorder)
        assert packed.dtype == torch.uint8
        assert np.array_equal(packed.cpu(), np.packbits(x, bitorder=bitorder))
    x, lengths = rng.random(60) < 0.5, [0, 3, 8, 17, 32]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    packed, new_indptr = flashinfer.segment_packbits(
        torch.from_numpy(x).to(device), torch.from_numpy(indptr).to(device), bitorder
    )
    assert new_indptr.dtype == torch.int32 and new_indptr.tolist() == [0, 0, 1, 2, 5, 9]
    parts = [
        np.packbits(x[a:b], bitorder=bitorder) for a, b in zip(indptr[:-1], indptr[1:], strict=True)
    ]
    assert np.array_equal(packed.cpu(), np.concatenate(parts))
    with pytest.raises(ValueError, match="bitorder"):
        flashinfer.packbits(packed, "middle")


def test_alibi_slopes():
    for heads in (1, 4, 6, 12, 32):
        np.testing.assert_allclose(get_alibi_slopes(heads), alibi_slopes(heads), rtol=1e-6)
