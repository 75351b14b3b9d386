"""plan(on_device=True): schedules made by a kernel, from lengths that only the GPU has.

Needs: numpy; a C compiler for the stub driver (refusals); a GPU for device cuda, and torch for its
graphs. tests/c/test_attention_device_plan.c holds the schedules themselves to their definition.
"""

import numpy as np
import pytest
import raddle
from raddle import errors
from raddle.attention import BatchDecode, BatchPrefill

from tests.attention_cases import Batch, assert_close, place, value
from tests.stub_driver import build_stubs, check_script

HEADS, KV_HEADS, DIM = 8, 2, 64
SPEC = dict(num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype="float16")
MAX_BATCH, MAX_PAGES, PAGE_SIZE = 64, 40_000, 16
CACHE_PAGES = 1024


def make_plan(device, qo_len=1, **changes):
    spec = SPEC | dict(page_size=PAGE_SIZE, max_batch=MAX_BATCH, max_pages=MAX_PAGES)
    spec |= dict(device=device) | changes
    if qo_len == 1:
        return BatchDecode(**spec)
    return BatchPrefill(**spec, max_qo_tokens=MAX_BATCH * qo_len, causal=True)


def make_batch(rng, kv_lens, qo_len=1, page_size=PAGE_SIZE):
    return Batch(
        rng,
        kv_lens,
        qo_lens=[qo_len] * len(kv_lens),
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=page_size,
        dtype="float16",
    )


def put(array, device):
    return np.asarray(array) if device == "cpu" else raddle.tensor(array, device=device)


def update(plan, batch, device, as_table=False, **options):
    """Plans from tensors where the plan is."""
    first = (batch.qo_indptr,) if isinstance(plan, BatchPrefill) else ()
    if as_table:
        table = batch.block_table(max(np.diff(batch.indptr), default=0) + 2, padding=2**31 - 1)
        lengths = np.array(batch.kv_lens, np.int32)
        options |= dict(block_table=put(table, device), seq_lens=put(lengths, device))
        return plan.plan(*first, on_device=True, **options)
    table = (batch.indptr, batch.indices, batch.last_page_len)
    return plan.plan(*first, *(put(part, device) for part in table), on_device=True, **options)


def run(plan, batch, device, **options):
    q, cache = (place(x, "float16", device) for x in (batch.q, batch.kv_cache))
    out, lse = plan.run(q, cache, return_lse=True, **options)
    return value(out, "float16"), value(lse, "float32")


def check_result(got, batch, **options):
    for part, want in zip(got, batch.expected(sm_scale=DIM**-0.5, **options), strict=True):
        assert_close(part, want, "float16")


LENGTHS = {
    "one": [1],
    "one long": [6000],
    "equal": [300] * 16,
    "mixed": [1, 0, 17, 255, 4000, 33, 0, 16, 900, 2],
    "one long and many short": [9000, *[40] * 63],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("as_table", [False, True], ids=["indptr", "block_table"])
@pytest.mark.parametrize("qo_len", [1, 4])
@pytest.mark.parametrize("kind", LENGTHS)
def test_results(device, kind, qo_len, as_table):
    batch = make_batch(np.random.default_rng(5), LENGTHS[kind], qo_len)
    plan = make_plan(device, qo_len)
    update(plan, batch, device, as_table)
    got = run(plan, batch, device)
    check_result(got, batch, causal=qo_len > 1)
    schedule = plan.schedule()
    assert schedule.requests["kv_len"].tolist() == LENGTHS[kind]
    assert schedule.requests["qo_begin"].tolist() == [qo_len * r for r in range(len(batch.kv_lens))]
    sent = schedule.segments["kv_end"] - schedule.segments["kv_begin"]
    assert int(sent.sum()) > 0 or not any(LENGTHS[kind])
    plan.plan(
        *([batch.qo_indptr] if qo_len > 1 else []),
        batch.indptr,
        batch.indices,
        batch.last_page_len,
    )
    check_result(run(plan, batch, device), batch, causal=qo_len > 1)


def test_no_requests(device):
    plan = make_plan(device)
    batch = make_batch(np.random.default_rng(4), [3])
    update(plan, batch, device)
    plan.plan(*(put(np.zeros(n, np.int32), device) for n in (1, 0, 0)), on_device=True)
    assert len(plan.schedule().requests) == len(plan.schedule().segments) == 0
    q, cache = (place(x, "float16", device) for x in (batch.q, batch.kv_cache))
    assert plan.run(q[:0], cache).shape == (0, HEADS, DIM)


@pytest.mark.parametrize("page_size", [1, 3, 128])
def test_page_sizes_and_window(device, page_size):
    batch = make_batch(np.random.default_rng(6), [700, 0, 90, 5], page_size=page_size)
    plan = make_plan(device, page_size=page_size, window_left=100)
    update(plan, batch, device)
    check_result(run(plan, batch, device), batch, window_left=100)


def test_both_kinds_of_plan_take_turns(device):
    rng = np.random.default_rng(7)
    plan = make_plan(device)
    for i in range(6):
        batch = make_batch(rng, rng.integers(0, 500, int(rng.integers(1, 20))))
        if i % 2 == 0:
            update(plan, batch, device)
        else:
            plan.plan(batch.indptr, batch.indices, batch.last_page_len)
        check_result(run(plan, batch, device), batch)


@pytest.mark.gpu
def test_lengths_that_lie_stay_inside():
    """What the GPU finds is clamped: rows come out finite or empty, and nothing breaks."""
    rng = np.random.default_rng(8)
    plan = make_plan("cuda")
    shape = (CACHE_PAGES, 2, PAGE_SIZE, KV_HEADS, DIM)
    cache = raddle.tensor(rng.standard_normal(shape).astype(np.float16), device="cuda")
    q = raddle.tensor(rng.standard_normal((8, HEADS, DIM)).astype(np.float16), device="cuda")
    guard = raddle.zeros((10, HEADS, DIM), "float16", "cuda")
    for _ in range(200):
        wild = rng.integers(-(2**31), 2**31, 8 + 9 + 50).astype(np.int32)
        tame = rng.integers(0, 60, wild.size).astype(np.int32)
        mixed = np.where(rng.random(wild.size) < 0.5, wild, tame)
        indptr, last, indices = (
            raddle.tensor(part, device="cuda") for part in np.split(mixed, [9, 17])
        )
        plan.plan(indptr, indices, last, on_device=True)
        plan.run(q, cache, out=guard[1:9])
        got = guard.to("cpu").numpy()
        assert np.isfinite(got).all() and not got[0].any() and not got[9].any()
    table = raddle.tensor(np.full((8, 4), -1, np.int32), device="cuda")
    lengths = raddle.tensor(np.array([2**31 - 1, -1, 64, 65, 0, 1, -(2**31), 9], np.int32))
    plan.plan(block_table=table, seq_lens=lengths.to("cuda"), on_device=True)
    assert plan.schedule().requests["kv_len"].tolist() == [64, 0, 64, 64, 0, 1, 0, 9]
    plan.run(q, cache, out=guard[1:9])


@pytest.mark.gpu
def test_twice_is_the_same_bit_for_bit():
    batch = make_batch(np.random.default_rng(9), [3000, 5, 0, 777, 64, 2048])
    plan = make_plan("cuda")
    results = []
    for _ in range(2):
        update(plan, batch, "cuda")
        results.append((*run(plan, batch, "cuda"), plan.schedule().segments.tobytes()))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]


@pytest.mark.gpu
def test_fixed_chunks_equal_a_host_plan_bit_for_bit():
    batch = make_batch(np.random.default_rng(12), [5000, 70, 0, 1300, 64, 65])
    plan = make_plan("cuda", fixed_chunk=128)
    update(plan, batch, "cuda")
    out, lse = run(plan, batch, "cuda")
    check_result((out, lse), batch)
    plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    again = run(plan, batch, "cuda")
    assert np.array_equal(out, again[0]) and np.array_equal(lse, again[1])


def cuda_torch():
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA build of torch")
    return torch


@pytest.mark.gpu
@pytest.mark.parametrize("qo_len", [1, 4])
def test_a_captured_plan_follows_its_lengths(qo_len):
    """plan and runs in one graph; each replay reads what the tensors hold by then."""
    torch = cuda_torch()
    rng = np.random.default_rng(10)
    size, width = 12, 40
    num_pages = size * width
    lengths = torch.full((size,), 100, dtype=torch.int32, device="cuda")
    table = torch.zeros(size, width, dtype=torch.int32, device="cuda")
    shape = (num_pages, 2, PAGE_SIZE, KV_HEADS, DIM)
    cache = torch.randn(shape, dtype=torch.float16, device="cuda")
    q = torch.randn(size * qo_len, HEADS, DIM, dtype=torch.float16, device="cuda")
    outs = [torch.empty_like(q) for _ in range(3)]
    plan, eager = make_plan("cuda", qo_len), make_plan("cuda", qo_len)
    rows = [] if qo_len == 1 else [np.arange(size + 1) * qo_len]

    def step():
        plan.plan(*rows, block_table=table, seq_lens=lengths, on_device=True)
        for out in outs:
            plan.run(q, cache, out=out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    with pytest.raises(errors.StateError, match="captured"):
        plan.run(q, cache, out=outs[0])
    for i in range(60):
        high = width * PAGE_SIZE if i % 3 else 20
        new = rng.integers(0, high + 1, size)
        new[rng.integers(0, size)] = width * PAGE_SIZE if i % 4 == 0 else 0
        pages = rng.permutation(num_pages).reshape(size, width)
        lengths.copy_(torch.from_numpy(new.astype(np.int32)))
        table.copy_(torch.from_numpy(pages.astype(np.int32)))
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        eager.plan(*rows, block_table=pages, seq_lens=new)
        want = eager.run(q, cache)
        for out in outs:
            torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
    plan.plan(*rows, block_table=pages, seq_lens=new)
    torch.testing.assert_close(plan.run(q, cache), want, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_captured_run_follows_either_kind_of_plan():
    torch = cuda_torch()
    rng = np.random.default_rng(11)
    plan = make_plan("cuda")
    batch = make_batch(rng, [100] * 9)
    update(plan, batch, "cuda")
    q = torch.randn(9, HEADS, DIM, dtype=torch.float16, device="cuda")
    shape = (CACHE_PAGES, 2, PAGE_SIZE, KV_HEADS, DIM)
    cache = torch.randn(shape, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    plan.run(q, cache, out=out)
    with raddle.Graph(device="cuda") as graph:
        plan.run(q, cache, out=out)
    eager = make_plan("cuda")
    for i in range(20):
        batch = make_batch(rng, rng.integers(0, 900, 9))
        if i % 2:
            update(plan, batch, "cuda")
        else:
            plan.plan(batch.indptr, batch.indices, batch.last_page_len)
        graph.launch()
        eager.plan(batch.indptr, batch.indices, batch.last_page_len)
        torch.cuda.synchronize()
        torch.testing.assert_close(out, eager.run(q, cache), rtol=2e-3, atol=2e-3)


# -- what is refused ----------------------------------------------------------------------------

REFUSALS = """
import numpy as np
import raddle
from raddle import errors
from raddle.attention import BatchDecode, BatchPrefill, BatchRaggedPrefill

def expect(kind, words, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}: {words}")

def put(*numbers, dtype=np.int32):
    return raddle.tensor(np.array(numbers, dtype), device="cuda")

spec = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=4, max_pages=8,
            dtype="float16", device="cuda")
plan = BatchDecode(**spec)
table = dict(indptr=put(0, 2, 3), indices=put(4, 1, 0), last_page_len=put(4, 5), on_device=True)

def refuse(kind, words, **changes):
    expect(kind, words, plan.plan, **(table | changes))

for name, length in (("indptr", 3), ("indices", 3), ("last_page_len", 2)):
    refuse(errors.DTypeError, f"{name}: on_device reads int32, got int64",
           **{name: put(*range(length), dtype=np.int64)})
    refuse(errors.DeviceError, name, **{name: np.zeros(length, np.int32)})
    refuse(errors.ShapeError, f"{name}: on_device reads a contiguous",
           **{name: put(*range(2 * length))[::2]})
refuse(errors.CapacityError, "max_batch", indptr=put(*range(7)), last_page_len=put(*range(6)))
refuse(errors.ShapeError, "last_page_len", last_page_len=put(1, 2, 3))
q, cache = (raddle.zeros(s, "float16", "cuda") for s in ((2, 4, 64), (8, 2, 16, 2, 64)))
expect(errors.StateError, "call plan() first", plan.run, q, cache)
wide = raddle.zeros((2, 5), "int32", "cuda")
lengths = dict(seq_lens=put(1, 2), on_device=True)
expect(errors.CapacityError, "max_pages", plan.plan, block_table=wide, **lengths)
plan.plan(**table)
plan.plan(block_table=raddle.zeros((2, 4), "int32", "cuda"), **lengths)
expect(errors.ShapeError, "q", plan.run, q[:1], cache)
plan.run(q, cache)

prefill = BatchPrefill(**spec, max_qo_tokens=8, max_qo_len=3)
table = dict(zip(("indptr", "indices", "last_page_len"), list(table.values())[:3], strict=True))
for rows, kind, words in (
    (put(0, 2, 4), errors.UnsupportedError, "qo_indptr: on_device needs it on the host"),
    (np.array([0, 1, 4]), errors.UnsupportedError, "as many query rows in every request"),
    (np.array([1, 2, 3]), errors.UnsupportedError, "as many query rows in every request"),
    (np.array([0, 4, 8]), errors.CapacityError, "max_qo_len"),
    (np.array([0, 2]), errors.ShapeError, "qo_indptr"),
    (None, errors.ArgumentError, "qo_indptr"),
):
    expect(kind, words, prefill.plan, rows, **table, on_device=True)
prefill.plan(np.array([0, 3, 6]), **table, on_device=True)
"""


def test_refusals(tmp_path):
    stubs = build_stubs(tmp_path)
    check_script(REFUSALS, stubs, RADDLE_CACHE_DIR=str(tmp_path))
