"""raddle under torch: tensors in and out, Parameters, streams, torch.cuda.graph.

Needs: torch; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.attention import BatchDecode, BatchPrefill, append_slots, merge_state

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)


def make(device, dtype="bfloat16", lens=(40, 7, 300), max_batch=None, seed=0):
    """A decode plan over lens, its query and its cache, and what torch makes of them in float32."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-n // 16) for n in lens]
    order = torch.randperm(sum(pages), generator=generator).to(torch.int32)
    indptr = torch.tensor(np.concatenate([[0], np.cumsum(pages)]), dtype=torch.int32)
    last = torch.tensor([n - (p - 1) * 16 for n, p in zip(lens, pages)], dtype=torch.int32)
    plan = BatchDecode(
        page_size=16,
        dtype=dtype,
        max_batch=max_batch or len(lens),
        max_pages=len(order),
        device=device,
        **HEADS,
    )
    plan.plan(indptr, order, last)
    kind = getattr(torch, dtype)
    q = torch.randn(len(lens), 8, 64, generator=generator).to(kind).to(device)
    cache = torch.randn(len(order), 2, 16, 2, 64, generator=generator).to(kind).to(device)
    return plan, q, cache, (indptr, order, last)


def expected(q, cache, table):
    indptr, order, last = (x.tolist() for x in table)
    rows = []
    for r in range(len(last)):
        pages = order[indptr[r] : indptr[r + 1]]
        length = (len(pages) - 1) * 16 + last[r]
        k, v = (
            torch.cat([cache[p, side] for p in pages])[:length].float().transpose(0, 1)
            for side in (0, 1)
        )
        row = torch.nn.functional.scaled_dot_product_attention(
            q[r].float()[:, None], k.repeat_interleave(4, 0), v.repeat_interleave(4, 0)
        )
        rows.append(row[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_in_torch_out(device, dtype):
    plan, q, cache, table = make(device, dtype)
    out, lse = plan.run(q, cache, return_lse=True)
    assert type(out) is torch.Tensor and out.dtype == q.dtype and out.device == q.device
    assert lse.dtype == torch.float32 and lse.shape == (3, 8)
    torch.testing.assert_close(out.float(), expected(q, cache, table), rtol=2e-2, atol=2e-2)


def test_result_goes_where_out_says(device):
    plan, q, cache, table = make(device)
    out = torch.full_like(q, float("nan"))
    assert plan.run(q, cache, out=out) is out
    torch.testing.assert_close(out.float(), expected(q, cache, table), rtol=2e-2, atol=2e-2)


def test_parameters_are_inputs_like_any_other(device):
    plan, q, cache, _ = make(device)
    plain = plan.run(q, cache)
    assert torch.equal(plan.run(torch.nn.Parameter(q), torch.nn.Parameter(cache)), plain)
    weight = torch.nn.Parameter(torch.ones(64, device=device))
    x = torch.randn(5, 64, device=device)
    want = torch.nn.functional.rms_norm(x, (64,), weight.detach(), 1e-6)
    torch.testing.assert_close(ops.rmsnorm(x, weight), want)


def test_views_are_read_in_place(device):
    plan, q, cache, table = make(device)
    fused = torch.full((3, 12, 64), float("nan"), dtype=q.dtype, device=device)
    fused[:, 3:11] = q
    wide = torch.full((*cache.shape[:4], 80), float("nan"), dtype=q.dtype, device=device)
    wide[..., 8:72] = cache
    out = plan.run(fused[:, 3:11], wide[..., 8:72])
    torch.testing.assert_close(out.float(), expected(q, cache, table), rtol=2e-2, atol=2e-2)


def test_append_then_prefill_equals_sdpa(device):
    torch.manual_seed(0)
    tokens = 50
    q = torch.randn(tokens, 8, 64, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(tokens, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    cache = torch.full((6, 2, 16, 2, 64), float("nan"), dtype=torch.bfloat16, device=device)
    pages = torch.tensor([5, 0, 3, 2], dtype=torch.int32)
    slots = pages.repeat_interleave(16)[:tokens].long() * 16 + torch.arange(tokens) % 16
    append_slots(k, v, slots.to(device), cache)
    plan = BatchPrefill(
        page_size=16,
        causal=True,
        max_batch=1,
        max_pages=4,
        max_qo_tokens=64,
        device=device,
        **HEADS,
    )
    plan.plan(*(torch.tensor(x) for x in ([0, tokens], [0, 4])), pages, torch.tensor([2]))
    got = plan.run(q, cache)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.float().transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


def test_merge_state_joins_halves(device):
    plan, q, cache, table = make(device, "float16", lens=(64,))
    half, q_half, _, _ = make(device, "float16", lens=(32,))
    indptr, order, _ = table
    parts = []
    for pages in (order[:2], order[2:]):
        half.plan(torch.tensor([0, 2]), pages, torch.tensor([16]))
        parts += half.run(q, cache, return_lse=True)
    v, s = merge_state(*parts)
    want, want_s = plan.run(q, cache, return_lse=True)
    torch.testing.assert_close(v, want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(s, want_s, rtol=1e-3, atol=1e-3)


def test_raddle_tensors_and_torch_share_memory(device):
    mine = raddle.zeros((3, 4), device=device)
    theirs = torch.from_dlpack(mine)
    theirs += 2
    assert mine.to("cpu").numpy().sum() == 24
    back = raddle.from_dlpack(theirs)
    assert back.data_ptr == mine.data_ptr


def test_runs_on_the_current_stream(device):
    if device == "cpu":
        pytest.skip("the CPU has no streams")
    plan, q, cache, table = make(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = q * 1.0
        out = plan.run(late, cache)
    stream.synchronize()
    torch.testing.assert_close(out.float(), expected(q, cache, table), rtol=2e-2, atol=2e-2)


def test_inside_torch_cuda_graph(device):
    """Captured once at the maxima, planned again between replays: bit for bit what eager gives."""
    if device == "cpu":
        pytest.skip("the CPU has no graphs")
    lens = (400, 77, 1000, 16)
    plan, q, cache, _ = make(device, lens=lens)
    eager, _, _, _ = make(device, lens=lens)
    out = torch.empty_like(q)
    plan.run(q, cache, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, cache, out=out)
    rng = np.random.default_rng(0)
    for _ in range(50):
        lens = rng.integers(1, 1 + np.array([400, 77, 1000, 16]))
        pages = -(-lens // 16)
        table = (
            torch.tensor(np.concatenate([[0], np.cumsum(pages)]), dtype=torch.int32),
            torch.tensor(rng.permutation(cache.shape[0])[: pages.sum()], dtype=torch.int32),
            torch.tensor(lens - (pages - 1) * 16, dtype=torch.int32),
        )
        plan.plan(*table)
        eager.plan(*table)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager.run(q, cache))


def test_capture_refuses_a_plan(device):
    if device == "cpu":
        pytest.skip("the CPU has no graphs")
    plan, q, cache, table = make(device)
    out = torch.empty_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, cache, out=out)
        with pytest.raises(raddle.errors.StateError, match="captured"):
            plan.plan(*table, stream=torch.cuda.current_stream())
    graph.replay()
    torch.testing.assert_close(out.float(), expected(q, cache, table), rtol=2e-2, atol=2e-2)
