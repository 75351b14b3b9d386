"""What a call cannot know yet: GPU work that fails behind it, and RADDLE_CHECK's bad indices.

Needs: a C compiler for the stub driver; a GPU for the tests that are marked so.
"""

import pytest

from tests.stub_driver import PANEL, build_stubs, check_script


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("stubs"))


PRELUDE = """
import gc
import numpy as np
import raddle
from raddle import attention, errors

def caught(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")

def make_plan(device):
    return attention.BatchDecode(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16,
                                 max_batch=8, max_pages=64, dtype="float16", device=device)

class Work:
    def __init__(self, device):
        self.plan_object = make_plan(device)
        self.q = raddle.zeros((2, 4, 64), "float16", device)
        self.cache = raddle.zeros((8, 2, 16, 2, 64), "float16", device)
        self.out = raddle.zeros((2, 4, 64), "float16", device)
    def plan(self):
        self.plan_object.plan(np.array([0, 2, 3]), np.array([3, 1, 2]), np.array([16, 5]))
    def run(self):
        self.plan_object.run(self.q, self.cache, out=self.out)
"""


def run_stub(stubs, tmp_path, script, **environment):
    check_script(PANEL + PRELUDE + script, stubs, RADDLE_CACHE_DIR=str(tmp_path), **environment)


# -- asynchronous errors ------------------------------------------------------------------------


def test_work_that_fails_behind_its_call(stubs, tmp_path):
    script = """
for device in ("cuda", "cuda:1", "cpu"):  # what stays for the life of the process
    one = Work(device)
    one.plan()
    one.run()
del one
gc.collect()
blocks = raddle._core.alloc_live()
work, late, other, on_cpu = Work("cuda"), Work("cuda"), Work("cuda:1"), Work("cpu")
for one in (work, late, other, on_cpu):
    one.plan()
with raddle.Graph(device="cuda") as graph:
    late.run()
panel.fail_work = 700
work.run()  # queued; nobody knows yet
words = caught(errors.CudaError, work.plan)
for part in ("CUDA_ERROR_ILLEGAL_ADDRESS (700", "asynchronous", "restart the process",
             "this attention plan on cuda:0 (batches planned: 1) is dead"):
    assert part in words, words
for call in (work.plan, work.run, work.plan_object.schedule):
    words = caught(errors.StateError, call)
    assert "this attention plan is dead" in words and "restart" in words, words
assert "asynchronous" in caught(errors.CudaError, graph.launch)
assert graph.state == "failed"
assert "this graph is dead" in caught(errors.StateError, graph.launch)
assert "is dead" in caught(errors.CudaError, late.run)
assert "asynchronous" in caught(errors.CudaError, lambda: work.out.to("cpu"))
assert "asynchronous" in caught(errors.CudaError, lambda: make_plan("cuda"))
assert "asynchronous" in caught(errors.CudaError, lambda: raddle.zeros(3, "float16", "cuda"))
for one in (other, on_cpu):
    one.plan()
    one.run()
    assert one.out.to("cpu").shape == (2, 4, 64)
del work, late, one, other, on_cpu, call, graph
gc.collect()
assert raddle._core.alloc_live() == blocks
"""
    run_stub(stubs, tmp_path, script)


def test_errors_of_the_call_itself(stubs, tmp_path):
    """A plan outlives them; a batch that was sent in part cannot be run."""
    script = """
work = Work("cuda")
work.plan()
for call, function in ((work.run, b"cuLaunchKernelEx"), (work.plan, b"cuEventSynchronize")):
    fail_call(function, 701)
    words = caught(errors.CudaError, call)
    assert "(701" in words and "asynchronous" not in words and "dead" not in words, words
    work.run()
with raddle.Graph(device="cuda") as graph:
    work.run()
fail_call(b"cuGraphLaunch", 1)
assert "asynchronous" not in caught(errors.CudaError, graph.launch)
assert graph.state == "ready"
graph.launch()
fail_call(b"cuMemcpyHtoDAsync_v2", 1)
caught(errors.CudaError, work.plan)
assert "call plan() first" in caught(errors.StateError, work.run)
assert "call plan() first" in caught(errors.StateError, graph.launch)
work.plan()
work.run()
graph.launch()
"""
    run_stub(stubs, tmp_path, script)
