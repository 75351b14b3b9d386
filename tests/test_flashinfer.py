"""raddle.flashinfer decodes as FlashInfer's documentation says.

On torch tensors, against float64. Needs: torch; a GPU for device cuda.
"""

import functools
import warnings

import numpy as np
import pytest
from raddle import flashinfer
from raddle.flashinfer import _plans

from tests.attention_cases import assert_close, from_bits, to_bits
from tests.flashinfer_cases import HEADS, LENGTHS, VARIANTS, Problem, to_torch, value, workspace
from tests.reference.attention import Variant, attend

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


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
