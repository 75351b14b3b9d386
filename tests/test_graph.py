"""raddle.Graph and raddle.Workspace: capture, launch, re-planning, and what they keep alive.

Needs: a C compiler for the stub driver (the CPU part); a GPU, and torch for one test (the rest).
"""

import gc
import weakref

import numpy as np
import pytest
import raddle
from raddle import attention, errors

from tests.stub_driver import build_stubs, check_script


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("stubs"))


# -- without a driver ---------------------------------------------------------------------------


def test_cpu_graphs_are_refused():
    graph = raddle.Graph(device="cpu")
    with pytest.raises(errors.UnsupportedError, match="on the CPU work is done"):
        with graph:
            pass
    assert graph.state == "new"
    with pytest.raises(errors.StateError, match="nothing was captured yet"):
        graph.launch()
    with pytest.raises(errors.DeviceError, match="device: expected"):
        raddle.Graph(device="tpu")
    with pytest.raises(errors.ArgumentError, match="stream"):
        raddle.Graph(device="cpu", stream="fast")
    assert repr(graph) == "<raddle.Graph new>"


def decode_plan(**changes):
    spec = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=8)
    spec |= dict(max_pages=64, dtype="float16") | changes
    return attention.BatchDecode(**spec)


def test_workspace_of_a_tensor_and_of_raddle():
    memory = np.zeros(1000, np.uint8)
    workspace = raddle.Workspace(memory)
    assert (workspace.size, workspace.device) == (1000, "cpu")
    assert raddle.Workspace(size=4096).size == 4096
    with pytest.raises(errors.ArgumentError, match="a tensor, or size="):
        raddle.Workspace()
    with pytest.raises(errors.ArgumentError, match="brings its own size"):
        raddle.Workspace(memory, size=10)
    with pytest.raises(errors.ArgumentError, match="brings its own size"):
        raddle.Workspace(memory, device="cpu")
    with pytest.raises(errors.ArgumentError, match="size: expected 0 or more bytes, got -1"):
        raddle.Workspace(size=-1)
    with pytest.raises(errors.ShapeError, match="contiguous"):
        raddle.Workspace(memory[::2])
    memory.flags.writeable = False
    with pytest.raises(errors.RaddleError, match="workspace"):
        raddle.Workspace(memory)


def test_plans_share_a_workspace_that_outlives_its_name():
    plans = [decode_plan(), decode_plan(max_batch=3)]
    size = max(plan.workspace_size for plan in plans)
    memory = np.zeros(size, np.uint8)
    alive = weakref.ref(memory)
    workspace = raddle.Workspace(memory)
    for plan in plans:
        plan.bind_workspace(workspace)
    del memory, workspace
    gc.collect()
    assert alive() is not None
    with pytest.raises(errors.CapacityError, match=rf"{plans[0].workspace_size} bytes needed, 8 "):
        plans[0].bind_workspace(raddle.Workspace(size=8))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 4, 64)).astype(np.float16)
    cache = rng.standard_normal((64, 2, 16, 2, 64)).astype(np.float16)
    for plan in plans:
        plan.plan(np.array([0, 30, 40]), np.arange(40), np.array([3, 16]))
    first, second = (plan.run(q, cache) for plan in plans)
    assert np.array_equal(first, second)
    del plans, plan
    gc.collect()
    assert alive() is None


# -- with the stub driver -----------------------------------------------------------------------

PRELUDE = """
import gc, weakref
import numpy as np
import raddle
from raddle import attention, errors, ops

def expect(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}: {words}")

def make_plan(**changes):
    spec = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=8,
                max_pages=64, dtype="float16", device="cuda")
    return attention.BatchDecode(**(spec | changes))

def table(*lengths):
    pages = [-(-length // 16) for length in lengths]
    last = [length - 16 * (count - 1) for length, count in zip(lengths, pages)]
    return np.cumsum([0, *pages]), np.arange(sum(pages)), np.array(last)

plan = make_plan()
q = raddle.zeros((3, 4, 64), "float16", "cuda")
cache = raddle.zeros((64, 2, 16, 2, 64), "float16", "cuda")
out = raddle.zeros((3, 4, 64), "float16", "cuda")
"""


def run_stub(stubs, tmp_path, script):
    check_script(PRELUDE + script, stubs, RADDLE_CACHE_DIR=str(tmp_path))


def test_states_and_refusals(stubs, tmp_path):
    script = """
graph = raddle.Graph(device="cuda")
expect(errors.StateError, "call plan() first", lambda: plan.run(q, cache, out=out))
plan.plan(*table(20, 5, 16))
with graph as same:
    assert same is graph and graph.state == "capturing" and graph.stream != 0
    plan.run(q, cache, out=out)
    expect(errors.StateError, "captured", lambda: plan.plan(*table(20, 5, 16)))
    expect(errors.StateError, "allocating", lambda: raddle.empty(10, "float16", "cuda"))
    expect(errors.StateError, "not possible while", lambda: make_plan(head_dim=128))
    expect(errors.StateError, "captures a graph already", raddle.Graph(device="cuda")._graph.begin)
    expect(errors.StateError, "still being captured", graph.launch)
assert graph.state == "ready"
graph.launch()
graph.launch(stream=graph.stream)
plan.plan(*table(1, 1, 1))
graph.launch()
expect(errors.StateError, "captured before", graph._graph.begin)
expect(errors.StateError, "does not capture it", graph._graph.end)
expect(errors.ArgumentError, "stream", lambda: graph.launch("fast"))

expect(errors.CapacityError, "64", lambda: plan.plan(*table(2000, 5, 16)))
expect(errors.StateError, "stale", graph.launch)
assert graph.state == "stale"

broken = raddle.Graph(device="cuda")
try:
    with broken:
        raise KeyError("in the block")
except KeyError:
    pass
assert broken.state == "failed"
expect(errors.StateError, "capture a new one", broken.launch)
with raddle.Graph(device="cuda") as empty:
    pass
empty.launch()
expect(errors.ArgumentError, "legacy default stream", raddle.Graph(stream=1)._graph.begin)
on_legacy = raddle.Graph(stream=0)
with on_legacy:
    plan.run(q, cache, out=out)
on_legacy.launch()
expect(errors.DeviceError, "cuda:7", raddle.Graph(device="cuda:7")._graph.begin)
"""
    run_stub(stubs, tmp_path, script)


def test_a_graph_keeps_what_it_reads(stubs, tmp_path):
    script = """
class Holder:  # a producer of its own, so that its life can be watched
    def __init__(self, tensor):
        self.tensor = tensor
    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)
    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

watched = {name: Holder(tensor) for name, tensor in dict(q=q, cache=cache, out=out).items()}
alive = {name: weakref.ref(holder) for name, holder in watched.items()}
plan.plan(*table(20, 5, 16))
plan.run(watched["q"], watched["cache"], out=watched["out"])  # eager: nothing is kept
del watched["q"]
gc.collect()
assert alive["q"]() is None
watched["q"] = Holder(q)
alive["q"] = weakref.ref(watched["q"])
graph = raddle.Graph(device="cuda")
with graph:
    plan.run(watched["q"], watched["cache"], out=watched["out"])
watched.clear()
del plan
gc.collect()
assert all(reference() is not None for reference in alive.values())
graph.launch()
blocks = raddle._core.alloc_live()
del graph
gc.collect()
assert all(reference() is None for reference in alive.values())
assert raddle._core.alloc_live() < blocks  # the plan went with it

cycle = raddle.Graph(device="cuda")
cycle.itself = cycle
with cycle:
    pass
gone = weakref.ref(cycle)
del cycle
gc.collect()
assert gone() is None
"""
    run_stub(stubs, tmp_path, script)


def test_two_threads(stubs, tmp_path):
    script = """
import threading
plan.plan(*table(20, 5, 16))
graph = raddle.Graph(device="cuda")
seen = []

def elsewhere():
    try:
        graph._graph.end()
    except errors.StateError as error:
        seen.append(str(error))
    seen.append(raddle.empty(10, "float16", "cuda").device)  # not this thread's capture

with graph:
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    plan.run(q, cache, out=out)
assert "this thread does not capture it" in seen[0] and seen[1] == "cuda:0", seen
graph.launch()
"""
    run_stub(stubs, tmp_path, script)


def test_fork(stubs, tmp_path):
    script = """
import os
plan.plan(*table(20, 5, 16))
child = os.fork()
if child == 0:
    expect(errors.DeviceError, "forked", lambda: plan.run(q, cache, out=out))
    expect(errors.DeviceError, "spawn", lambda: raddle.empty(3, "float16", "cuda"))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0
"""
    run_stub(stubs, tmp_path, script)


# -- with a GPU ---------------------------------------------------------------------------------

REPLAYS = 10_000
REPLAYS_BETWEEN_COMPARISONS = 100


def random_table(rng, max_batch, max_pages, page_size):
    batch = int(rng.integers(1, max_batch + 1))
    lengths = rng.integers(0, max_pages * page_size // max_batch, batch)
    pages = -(-lengths // page_size)
    indptr = np.concatenate([[0], pages.cumsum()]).astype(np.int32)
    indices = rng.permutation(max_pages)[: indptr[-1]].astype(np.int32)
    last_page_len = np.where(lengths > 0, lengths - (pages - 1) * page_size, 0).astype(np.int32)
    return batch, (indptr, indices, last_page_len)


@pytest.mark.gpu
def test_replays_equal_eager_runs_bit_for_bit():
    """Every one of them; the graph is captured for a full batch, later ones are smaller."""
    rng = np.random.default_rng(1)
    max_batch, max_pages, page_size, heads, kv_heads, dim = 16, 256, 16, 8, 2, 128
    make = dict(num_qo_heads=heads, num_kv_heads=kv_heads, head_dim=dim, page_size=page_size)
    make |= dict(max_batch=max_batch, max_pages=max_pages, dtype="float16", device="cuda")
    captured, eager = attention.BatchDecode(**make), attention.BatchDecode(**make)
    q = raddle.tensor(
        rng.standard_normal((max_batch, heads, dim)).astype(np.float16), device="cuda"
    )
    shape = (max_pages, 2, page_size, kv_heads, dim)
    cache = raddle.tensor(rng.standard_normal(shape).astype(np.float16), device="cuda")
    out = raddle.zeros((max_batch, heads, dim), "float16", "cuda")
    shape = (REPLAYS_BETWEEN_COMPARISONS, max_batch, heads, dim)
    replayed, expected = (raddle.zeros(shape, "float16", "cuda") for _ in range(2))
    full = np.arange(max_batch + 1, dtype=np.int32)
    captured.plan(full, full[:-1], np.full(max_batch, page_size, np.int32))
    with raddle.Graph(device="cuda") as graph:
        captured.run(q, cache, out=out)
    for first in range(0, REPLAYS, REPLAYS_BETWEEN_COMPARISONS):
        batches = []
        for i in range(REPLAYS_BETWEEN_COMPARISONS):  # nothing waits: plans overlap with replays
            batch, table = random_table(rng, max_batch, max_pages, page_size)
            captured.plan(*table)
            graph.launch()
            replayed[i].copy_(out)
            eager.plan(*table)
            eager.run(q[:batch], cache, out=expected[i, :batch])
            batches.append(batch)
        got, want = (t.to("cpu").numpy().view(np.uint16) for t in (replayed, expected))
        for i, batch in enumerate(batches):
            assert np.array_equal(got[i, :batch], want[i, :batch]), first + i
    assert graph.state == "ready"


@pytest.mark.gpu
def test_inside_torch_cuda_graph():
    torch = pytest.importorskip("torch", reason="needs torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA build of torch")
    rng = np.random.default_rng(2)
    plan = decode_plan(device="cuda")
    q = torch.randn(8, 4, 64, dtype=torch.float16, device="cuda")
    cache = torch.randn(64, 2, 16, 2, 64, dtype=torch.float16, device="cuda")
    out = torch.empty_like(q)
    full = np.arange(9, dtype=np.int32)
    plan.plan(full, full[:-1], np.full(8, 16, np.int32))
    plan.run(q, cache, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, cache, out=out)
    for _ in range(50):
        batch, table = random_table(rng, 8, 64, 16)
        plan.plan(*table)
        graph.replay()
        want = plan.run(q[:batch], cache)
        torch.cuda.synchronize()
        assert torch.equal(out[:batch], want)


@pytest.mark.gpu
def test_linear_layers_in_a_graph():
    from raddle import ops

    rng = np.random.default_rng(3)
    weight = rng.standard_normal((96, 64)).astype(np.float32)
    layer = ops.Linear(raddle.tensor(weight, device="cuda"))
    x = raddle.tensor(rng.standard_normal((5, 64)).astype(np.float32), device="cuda")
    out = raddle.zeros((5, 96), "float32", "cuda")
    with raddle.Graph(device="cuda") as graph:
        layer(x, out=out)
    del layer  # the graph keeps it
    gc.collect()
    x.copy_(raddle.tensor(2 * np.ones((5, 64), np.float32), device="cuda"))
    graph.launch()
    want = 2 * weight.astype(np.float64).sum(axis=1)
    assert np.allclose(out.to("cpu").numpy(), want, rtol=1e-4, atol=1e-4)
