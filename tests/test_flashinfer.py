"""raddle.flashinfer computes what FlashInfer's documentation says: decode, prefill, page, cascade.

On torch tensors, against float64.

Needs: torch; a GPU for device cuda.
"""

import functools
import warnings

import numpy as np
import pytest

from tests.attention_cases import Batch, assert_close, from_bits, to_bits
from tests.reference.attention import Variant, alibi_slopes, attend, merge

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")

if torch is not None:
    from raddle import flashinfer
    from raddle.flashinfer import _plans
    from raddle.flashinfer.utils import get_alibi_slopes

HEADS = dict(num_qo_heads=6, num_kv_heads=2, head_dim=64)
LENGTHS = (40, 0, 1, 300, 16)


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


def to_torch(bits, dtype, device):
    """The torch tensor of what to_bits made."""
    if isinstance(bits, tuple):
        return tuple(to_torch(one, dtype, device) for one in bits)
    if dtype == "bfloat16" or dtype.startswith("float8"):
        bits = bits.view(np.int16) if dtype == "bfloat16" else bits
        return torch.from_numpy(bits).view(getattr(torch, dtype)).to(device)
    return torch.from_numpy(bits).to(device)


def value(x):
    return x.detach().double().cpu().numpy()


def tables(batch, device="cpu"):
    return tuple(
        torch.from_numpy(x).to(device) for x in (batch.indptr, batch.indices, batch.last_page_len)
    )


def workspace(device, size=1 << 20):
    return torch.empty(size, dtype=torch.uint8, device=device)


class Problem:
    """A batch as torch tensors, and a wrapper of either kind that is planned for it."""

    def __init__(self, device, lengths=LENGTHS, seed=0, table_device="cpu", **shape):
        shape = {**HEADS, **shape}
        self.batch = Batch(np.random.default_rng(seed), lengths, **shape)
        batch = self.batch
        self.device, self.layout = device, batch.layout
        self.q = to_torch(batch.q, batch.dtype, device)
        self.cache = to_torch(batch.kv_cache, batch.kv_dtype, device)
        self.tables = tables(batch, table_device)
        self.qo_indptr = torch.from_numpy(batch.qo_indptr).to(table_device)
        self.shape = [*(shape[name] for name in HEADS), batch.page_size]
        self.dtypes = dict(q_data_type=batch.dtype, kv_data_type=getattr(torch, batch.kv_dtype))

    def decode(self, *, use_tensor_cores=False, **options):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace(self.device), self.layout, use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(*self.tables, *self.shape, **self.dtypes, **options)
        return wrapper

    def prefill(self, **options):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace(self.device), self.layout
        )
        wrapper.plan(self.qo_indptr, *self.tables, *self.shape, **self.dtypes, **options)
        return wrapper

    def check(self, result, **options):
        want_out, want_lse = self.batch.expected(**options)
        out, lse = result
        assert out.dtype == self.q.dtype and lse.dtype == torch.float32
        assert_close(value(out), want_out, self.batch.dtype)
        assert_close(value(lse), want_lse, "float16")


# -- batch decode -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_follows_the_page_table(device, layout, dtype, page_size):
    problem = Problem(device, layout=layout, dtype=dtype, page_size=page_size)
    out, lse = problem.decode().run(problem.q, problem.cache, return_lse=True)
    problem.check((out, lse))
    empty = LENGTHS.index(0)
    assert torch.all(out[empty] == 0) and torch.all(lse[empty] == -torch.inf)


@pytest.mark.parametrize("table_device", ["cpu", "same"])
def test_decode_takes_tables_from_the_host_and_the_device(device, table_device):
    problem = Problem(device, table_device=device if table_device == "same" else "cpu")
    problem.check(problem.decode().run_return_lse(problem.q, problem.cache))


def test_int64_tables_are_not_misread(device):
    problem = Problem(device)
    problem.tables = tuple(one.to(torch.int64) for one in problem.tables)
    problem.check(problem.decode().run_return_lse(problem.q, problem.cache))


VARIANTS = {
    "window": (dict(window_left=20), dict(window_left=20)),
    "cap": (dict(logits_soft_cap=3.0), dict(variant=Variant(soft_cap=3.0))),
    "scale": (dict(sm_scale=0.3), dict(sm_scale=0.3)),
    "alibi": (dict(pos_encoding_mode="ALIBI"), dict(variant=Variant(alibi=True))),
    "rope": (
        dict(pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=5e3),
        dict(variant=Variant(rope=(5e3, 2.0))),
    ),
    "rope defaults": (
        dict(pos_encoding_mode="ROPE_LLAMA"),
        dict(variant=Variant(rope=(1e4, 1.0))),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_variants(device, name):
    given, expected = VARIANTS[name]
    problem = Problem(device)
    wrapper = problem.decode(**given)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True), **expected)


def test_decode_scales_multiply_logits_and_results(device):
    problem = Problem(device)
    result = problem.decode().run(
        problem.q, problem.cache, return_lse=True, q_scale=0.5, k_scale=0.75, v_scale=1.5
    )
    problem.check(result, variant=Variant(k_scale=0.375, v_scale=1.5))


def test_decode_scales_per_kv_head(device):
    problem = Problem(device)
    scales = torch.tensor([0.5, 1.25], device=device)
    result = problem.decode().run(
        problem.q, problem.cache, return_lse=True, q_scale=0.5, k_scale=scales, v_scale=scales
    )
    problem.check(
        result, variant=Variant(k_scale=np.array([0.25, 0.625]), v_scale=np.array([0.5, 1.25]))
    )


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_decode_reads_fp8(device, kv_dtype):
    problem = Problem(device, kv_dtype=kv_dtype, dtype="float16")
    result = problem.decode().run(problem.q, problem.cache, return_lse=True, k_scale=0.5)
    problem.check(result, variant=Variant(k_scale=0.5))


def test_data_type_names_the_cache_alone(device):
    problem = Problem(device, kv_dtype="float8_e4m3fn", dtype="float16")
    problem.dtypes = dict(data_type=torch.float8_e4m3fn)
    problem.check(problem.decode().run_return_lse(problem.q, problem.cache))


def test_sinks_work_without_a_plan_that_knows(device):
    problem = Problem(device)
    sinks = torch.linspace(-2, 3, HEADS["num_qo_heads"], device=device)
    wrapper = problem.decode()
    plain = wrapper.run(problem.q, problem.cache)
    expected = dict(variant=Variant(sinks=value(sinks)))
    result = wrapper.run(problem.q, problem.cache, sinks=sinks, return_lse=True)
    problem.check(result, **expected)
    assert torch.equal(wrapper.run(problem.q, problem.cache), plain)
    wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
    result = wrapper.run(problem.q, problem.cache, sinks=sinks, return_lse=True)
    problem.check(result, **expected)


def test_several_query_tokens_are_causal(device):
    lengths = (40, 3, 300)
    problem = Problem(device, lengths, qo_lens=(3, 3, 3))
    wrapper = problem.decode(q_len_per_req=3, use_tensor_cores=True)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True), causal=True)
    with pytest.raises(ValueError, match="q: 6 rows"):
        wrapper.run(problem.q[:6], problem.cache)


def test_results_go_where_out_and_lse_say(device):
    problem = Problem(device)
    wrapper = problem.decode()
    out = torch.full_like(problem.q, torch.nan)
    lse = torch.full(problem.q.shape[:2], torch.nan, device=device)
    result = wrapper.run(problem.q, problem.cache, out=out, lse=lse, return_lse=True)
    assert result[0] is out and result[1] is lse
    problem.check(result)
    with pytest.raises(ValueError, match="Invalid shape of out"):
        wrapper.run(problem.q, problem.cache, out=out[:2])
    with pytest.raises(ValueError, match="Invalid dtype of out"):
        wrapper.run(problem.q, problem.cache, out=out.float())
    with pytest.raises(ValueError, match="Invalid dtype of lse"):
        wrapper.run(problem.q, problem.cache, lse=lse.half(), return_lse=True)


def test_result_dtype(device):
    problem = Problem(device)
    wrapper = problem.decode(o_data_type=torch.float32)
    out = wrapper.run(problem.q, problem.cache)
    assert out.dtype == torch.float32
    assert_close(value(out), problem.batch.expected()[0], "bfloat16")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("packed", [True, False])
def test_one_token_pages_may_leave_their_dimension_out(device, layout, packed):
    problem = Problem(device, layout=layout, page_size=1, packed=packed)
    axis = -3 if layout == "NHD" else -2
    short = (
        problem.cache.squeeze(axis) if packed else tuple(one.squeeze(axis) for one in problem.cache)
    )
    problem.check(problem.decode().run(problem.q, short, return_lse=True))


def test_v_may_have_strides_of_its_own(device):
    problem = Problem(device, packed=False)
    k, v = problem.cache
    padded = torch.full((*v.shape[:-1], 2, v.shape[-1]), torch.nan, dtype=v.dtype, device=device)
    padded[..., 1, :] = v
    result = problem.decode().run(problem.q, (k, padded[..., 1, :]), return_lse=True)
    problem.check(result)


def test_replanning_with_other_sizes(device):
    """One wrapper, batches that grow past what it was planned for, and shrink."""
    wrapper = None
    for seed, lengths in enumerate([(5, 3), (40,) * 11, (2000, 17000), (1,)]):
        problem = Problem(device, lengths, seed=seed)
        if wrapper is None:
            wrapper = problem.decode()
        else:
            wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
        problem.check(wrapper.run(problem.q, problem.cache, return_lse=True))


def test_a_failed_plan_leaves_the_batch_before(device):
    problem = Problem(device)
    wrapper = problem.decode()
    bad = problem.tables[0].clone()
    bad[1] = -5
    with pytest.raises(ValueError, match="indptr"):
        wrapper.plan(bad, *problem.tables[1:], *problem.shape, **problem.dtypes)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True))


def test_last_page_len_of_requests_without_pages_is_not_looked_at(device):
    problem = Problem(device)
    last = problem.tables[2].clone()
    last[LENGTHS.index(0)] = problem.batch.page_size
    problem.tables = (*problem.tables[:2], last)
    problem.check(problem.decode().run(problem.q, problem.cache, return_lse=True))


@pytest.mark.parametrize("options", [dict(fixed_split_size=4), dict(disable_split_kv=True)])
def test_fixed_splits_do_not_depend_on_the_batch(device, options):
    problem = Problem(device, (700, 300, 1500))
    wrapper = problem.decode(use_tensor_cores=True, **options)
    together = wrapper.run(problem.q, problem.cache, return_lse=True)
    problem.check(together)
    indptr, indices, last = problem.tables
    wrapper.plan(indptr[:3], indices, last[:2], *problem.shape, **problem.dtypes, **options)
    alone = wrapper.run(problem.q[:2], problem.cache, return_lse=True)
    assert torch.equal(alone[0], together[0][:2]) and torch.equal(alone[1], together[1][:2])


def test_workspace_of_the_stated_size_is_enough(device):
    problem = Problem(device, (3000, 17, 900))
    wrapper = problem.decode()
    arguments = (*problem.tables, *problem.shape)
    size, int_size = wrapper.workspace_size(*arguments, **problem.dtypes)
    wrapper.reset_workspace_buffer(workspace(device, size), workspace(device, int_size))
    wrapper.plan(*arguments, **problem.dtypes)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True))


def test_small_workspaces_are_not_written_past(device):
    """A buffer that is too small is left alone: the plan makes its own scratch."""
    problem = Problem(device, (3000, 17, 900))
    guarded = torch.full((4096,), 7, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(guarded[:256], "NHD")
    wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True))
    assert torch.all(guarded == 7)


# -- old names, positions, buffers --------------------------------------------------------------


def test_old_names_do_the_same(device):
    problem = Problem(device, dtype="float16")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    wrapper.begin_forward(*problem.tables, *problem.shape, sm_scale=0.3)
    problem.check(wrapper.run_return_lse(problem.q, problem.cache), sm_scale=0.3)
    # forward() brings the arguments anew, its defaults too
    out = wrapper.forward(problem.q, problem.cache)
    assert_close(value(out), problem.batch.expected()[0], "float16")
    result = wrapper.forward_return_lse(
        problem.q, problem.cache, window_left=10, logits_soft_cap=5.0, k_scale=0.5
    )
    problem.check(result, window_left=10, variant=Variant(soft_cap=5.0, k_scale=0.5))
    assert wrapper.end_forward() is None


def test_arguments_behind_page_size_by_position(device):
    problem = Problem(device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    arguments = (*problem.tables, *problem.shape, "NONE", 20, 3.0, torch.bfloat16)
    with pytest.warns(DeprecationWarning, match="by position"):
        wrapper.plan(*arguments, sm_scale=0.3)
    result = wrapper.run(problem.q, problem.cache, return_lse=True)
    problem.check(result, window_left=20, sm_scale=0.3, variant=Variant(soft_cap=3.0))
    with pytest.raises(TypeError, match="window_left"):
        wrapper.plan(*arguments, window_left=1)
    with pytest.raises(TypeError, match="positional"):
        wrapper.plan(*problem.tables, *problem.shape, *[None] * 17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)


@pytest.mark.parametrize("page_size", [1, 16])
def test_fast_decode_plan(device, page_size):
    problem = Problem(device, page_size=page_size, dtype="float16", table_device=device)
    wrapper = problem.decode()
    wrapper.plan = functools.partial(flashinfer.fast_decode_plan, wrapper)
    for host in (None, problem.tables[0].cpu()):
        wrapper.plan(
            *problem.tables,
            *problem.shape,
            window_left=30,
            data_type=torch.float16,
            global_override_indptr_cpu=host,
        )
        result = wrapper.run(problem.q, problem.cache, return_lse=True)
        problem.check(result, window_left=30)


def test_graph_buffers_are_filled_and_bound_the_batch(device):
    problem = Problem(device)
    buffers = [torch.full((n,), -1, dtype=torch.int32, device=device) for n in (6, 40, 5)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(device), *buffers)
    assert wrapper.is_cuda_graph_enabled
    wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True))
    indptr, indices, last = problem.tables
    assert torch.equal(buffers[0].cpu(), indptr) and torch.equal(buffers[2].cpu(), last)
    assert torch.equal(buffers[1][: len(indices)].cpu(), indices)
    assert torch.all(buffers[1][len(indices) :] == -1)
    with pytest.raises(ValueError, match="batch is 4"):
        wrapper.plan(indptr[:-1], indices, last[:-1], *problem.shape, **problem.dtypes)
    with pytest.raises(ValueError, match="41 page ids"):
        many = torch.zeros(41, dtype=torch.int32)
        wrapper.plan(indptr, many, last, *problem.shape, **problem.dtypes)


def test_graph_wrapper_keeps_its_query_length(device):
    problem = Problem(device, (40, 20), qo_lens=(2, 2))
    buffers = [torch.empty(n, dtype=torch.int32, device=device) for n in (3, 8, 2)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace(device), *buffers, use_tensor_cores=True
    )
    wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes, q_len_per_req=2)
    problem.check(wrapper.run(problem.q, problem.cache, return_lse=True), causal=True)
    with pytest.raises(ValueError, match="q_len_per_req"):
        wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)


@pytest.mark.gpu
def test_a_captured_run_follows_later_plans():
    device = "cuda"
    buffers = [torch.empty(n, dtype=torch.int32, device=device) for n in (4, 600, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace(device, 1 << 26), *buffers
    )
    problem = Problem(device, (1, 1, 1))
    cache = torch.zeros(600, *problem.cache.shape[1:], dtype=problem.cache.dtype, device=device)
    sinks = torch.linspace(-1, 1, HEADS["num_qo_heads"], device=device)
    q = torch.empty_like(problem.q)
    wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
    wrapper.run(q, cache, sinks=sinks, return_lse=True)
    wrapper.run(q, cache, return_lse=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = wrapper.run(q, cache, return_lse=True)
        sunk = wrapper.run(q, cache, return_lse=True, sinks=sinks)
    for seed, lengths in enumerate([(40, 0, 300), (2000, 7, 5000), (1, 16, 17)]):
        problem = Problem(device, lengths, seed=seed)
        q.copy_(problem.q)
        cache[: len(problem.cache)] = problem.cache
        wrapper.plan(*problem.tables, *problem.shape, **problem.dtypes)
        graph.replay()
        problem.check(plain)
        problem.check(sunk, variant=Variant(sinks=value(sinks)))


@pytest.mark.gpu
def test_single_calls_are_captured_after_a_warm_run():
    device, rng = "cuda", np.random.default_rng(3)
    q, k, v = (to_bits(rng.standard_normal(s), "float16") for s in ((6, 64), *[(90, 2, 64)] * 2))
    qt, kt, vt = (to_torch(x, "float16", device) for x in (q, k, v))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        flashinfer.single_decode_with_kv_cache(qt, kt, vt)
    flashinfer.single_decode_with_kv_cache(qt, kt, vt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashinfer.single_decode_with_kv_cache(qt, kt, vt)
    flashinfer.single_decode_with_kv_cache(qt, kt[:7], vt[:7])  # must not reach the graph's plan
    graph.replay()
    want, _ = attend(*(from_bits(x, "float16") for x in (q[None], k, v)))
    assert_close(value(out), want[0], "float16")


# -- single requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_decode(device, layout):
    rng = np.random.default_rng(1)
    for kv_len in (1, 33, 33, 700, 2):
        q, k, v = (
            to_bits(rng.standard_normal(shape), "bfloat16")
            for shape in ((6, 64), (kv_len, 2, 64), (kv_len, 2, 64))
        )
        want_out, want_lse = attend(*(from_bits(x, "bfloat16") for x in (q[None], k, v)))
        if layout == "HND":
            k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))
        q, k, v = (to_torch(x, "bfloat16", device) for x in (q, k, v))
        out, lse = flashinfer.single_decode_with_kv_cache(q, k, v, layout, return_lse=True)
        assert out.shape == q.shape and lse.shape == (6,)
        assert_close(value(out), want_out[0], "bfloat16")
        assert_close(value(lse), want_lse[0], "float16")
        assert torch.equal(flashinfer.single_decode_with_kv_cache(q, k, v, layout), out)


@pytest.mark.parametrize("name", VARIANTS)
def test_single_variants(device, name):
    given, expected = VARIANTS[name]
    rng = np.random.default_rng(2)
    q, k, v = (
        to_bits(rng.standard_normal(shape), "float16")
        for shape in ((7, 6, 64), (90, 2, 64), (90, 2, 64))
    )
    want_out, want_lse = attend(
        *(from_bits(x, "float16") for x in (q, k, v)), causal=True, **expected
    )
    q, k, v = (to_torch(x, "float16", device) for x in (q, k, v))
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True, **given)
    assert_close(value(out), want_out, "float16")
    assert_close(value(lse), want_lse, "float16")
    # The last token of a causal prefill is a decode.
    out, lse = flashinfer.single_decode_with_kv_cache(q[-1], k, v, **given, return_lse=True)
    assert_close(value(out), want_out[-1], "float16")
    assert_close(value(lse), want_lse[-1], "float16")


def test_single_scales(device):
    rng = np.random.default_rng(4)
    q, k, v = (to_bits(rng.standard_normal(s), "float16") for s in ((6, 64), *[(90, 2, 64)] * 2))
    want, _ = attend(
        *(from_bits(x, "float16") for x in (q[None], k, v)),
        variant=Variant(k_scale=0.4, v_scale=2.0),
    )
    q, k, v = (to_torch(x, "float16", device) for x in (q, k, v))
    out = flashinfer.single_decode_with_kv_cache(q, k, v, q_scale=0.5, k_scale=0.8, v_scale=2.0)
    assert_close(value(out), want[0], "float16")


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
