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


def run_stub(stubs, tmp_path, script):
    environment = dict(RADDLE_CACHE_DIR=str(tmp_path), RADDLE_CHECK="0")
    check_script(PANEL + PRELUDE + script, stubs, **environment)


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


WILD_CACHE = """
import ctypes

class DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
                ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p)]

class Wild:  # a producer whose memory no GPU has mapped
    shape = (ctypes.c_int64 * 5)(8, 2, 16, 2, 64)
    managed = DLTensor(1 << 16, (2, 0), 5, 2, 16, 1, ctypes.addressof(shape))
    def __dlpack_device__(self):
        return (2, 0)
    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)
"""


@pytest.mark.gpu
def test_a_kernel_that_reads_wild_memory():
    """What the driver really answers, and that a process with a lost context ends in peace."""
    script = """
work, on_cpu = Work("cuda"), Work("cpu")
for one in (work, on_cpu):
    one.plan()
    one.run()
with raddle.Graph(device="cuda") as graph:
    work.run()
work.plan_object.run(work.q, Wild(), out=work.out)  # queued; nobody knows yet
assert "asynchronous" in caught(errors.CudaError, lambda: work.out.to("cpu"))
words = caught(errors.CudaError, work.plan)
assert "(700" in words and "attention plan on cuda:0 (batches planned: 1) is dead" in words, words
for call in (work.plan, work.run, graph.launch):
    assert "this attention plan is dead" in caught(errors.StateError, call)
assert "asynchronous" in caught(errors.CudaError, lambda: make_plan("cuda"))
on_cpu.plan()
on_cpu.run()
del work, graph, call, one
gc.collect()
print("still here")
"""
    assert check_script(PRELUDE + WILD_CACHE + script, RADDLE_CHECK="0") == "still here\n"


# -- RADDLE_CHECK -------------------------------------------------------------------------------


@pytest.mark.gpu
def test_page_ids_that_only_the_gpu_saw():
    """RADDLE_CHECK=1: skipped pages are reported by the next call; without it they are skipped."""
    script = """
import os
import numpy as np
import raddle
from raddle import attention, errors
spec = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=8, max_pages=64)
plan = attention.BatchDecode(**spec, dtype="float16", device="cuda")
q = raddle.zeros((2, 4, 64), "float16", "cuda")
cache = raddle.zeros((8, 2, 16, 2, 64), "float16", "cuda")
pages = np.array([3, 1, 2147480000, 2], np.int32)
table = (np.array([0, 2, 4]), raddle.tensor(pages, device="cuda"), np.array([16, 16]))
plan.plan(*table)
out = plan.run(q, cache)
assert not np.isnan(out.to("cpu").numpy()).any()
reported = []
try:
    plan.run(q, cache)
except errors.ArgumentError as error:
    reported.append(str(error))
assert bool(reported) == (os.environ["RADDLE_CHECK"] == "1"), reported
assert all("page id 2147480000 at position 2" in words for words in reported), reported
"""
    for setting in ("0", "1"):
        check_script(script, RADDLE_CHECK=setting)


@pytest.mark.gpu
def test_append_indices_that_only_the_gpu_saw():
    """Rows that lead nowhere are skipped, their neighbours written; RADDLE_CHECK=1: reported."""
    script = """
import os

heads, dim, page_size, pages = 2, 64, 4, 6
new = np.arange(4 * heads * dim, dtype=np.float16).reshape(4, heads, dim) + 1
table = dict(batch_indices=[0, 1, -1, 1], positions=[5, 2, 99, 7], kv_indices=[4, 0, 2, 5],
             kv_indptr=[0, 2, 4])
slots = [4 * 0 + 1, 4 * 2 + 2, -1, 4 * 5 + 3]  # of those

def put(numbers, dtype):
    return raddle.tensor(np.array(numbers, dtype), device="cuda")

def append(dtype, slot_mapping=None, **indices):
    cache = raddle.zeros((pages, 2, page_size, heads, dim), "float16", "cuda")
    k, v = (raddle.tensor(x, device="cuda") for x in (new, -new))
    if slot_mapping is not None:
        attention.append_slots(k, v, put(slot_mapping, dtype), cache)
    else:
        names = ("batch_indices", "positions", "kv_indices", "kv_indptr")
        rows, places, ids, indptr = (put(indices[name], dtype) for name in names)
        attention.append_paged_kv_cache(k, v, rows, places, cache, ids, indptr)
    return cache

def check_written(cache, skipped):
    want = np.zeros((pages, 2, page_size, heads, dim), np.float16)
    for i, slot in enumerate(slots):
        if i not in skipped and slot >= 0:
            want[slot // page_size, :, slot % page_size] = new[i], -new[i]
    assert np.array_equal(cache.to("cpu").numpy(), want), skipped

def changed(name, place, value):
    numbers = list(table[name])
    numbers[place] = value
    return table | {name: numbers}

large = {"int32": 2**31 - 1, "int64": 2**62}
plan = attention.BatchDecode(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16,
                             max_batch=8, max_pages=64, dtype="float16", device="cuda")
q = raddle.zeros((2, 4, 64), "float16", "cuda")
cache = raddle.zeros((8, 2, 16, 2, 64), "float16", "cuda")
plan.plan(np.array([0, 2, 4]), np.arange(4), np.array([16, 16]))
for dtype, huge in large.items():
    cases = [  # indices, rows that they skip, words of the report
        (dict(slot_mapping=[1, 24, -1, 23]), {1}, "slot 24 at row 1, out of range for a cache of"),
        (dict(slot_mapping=[1, 10, -2, 23]), set(), "slot -2 at row 2"),
        (dict(slot_mapping=[huge, 10, -1, 23]), {0}, f"slot {huge} at row 0"),
        (changed("batch_indices", 3, 2), {3}, "request 2 at row 3, out of range for 2 requests"),
        (changed("batch_indices", 0, huge), {0}, f"request {huge} at row 0"),
        (changed("positions", 1, 8), {1}, "position 8 at row 1, but the pages of its"),
        (changed("positions", 1, -1), {1}, "position -1 at row 1"),
        (changed("positions", 0, huge), {0}, f"position {huge} at row 0"),
        (changed("kv_indptr", 2, 5), {1, 3}, "begins at 2 at row"),
        (changed("kv_indptr", 0, -1), {0}, "begins at -1 at row 0, and ends at 2"),
        (changed("kv_indptr", 2, 1), {1, 3}, "and ends at 1"),
        (changed("kv_indices", 1, 6), {0}, "page id 6 at row 0, out of range for a cache of 6"),
        (changed("kv_indices", 3, -1), {3}, "page id -1 at row 3"),
        (changed("kv_indices", 2, huge), {1}, f"page id {huge} at row 1"),
    ]
    check_written(append(dtype, **table), set())
    for n, (indices, skipped, words) in enumerate(cases):
        check_written(append(dtype, **indices), skipped)
        run = lambda: plan.run(q, cache)
        report = [run, lambda: append(dtype, **table), lambda: append(dtype, slots)][n % 3]
        if os.environ["RADDLE_CHECK"] == "1":
            assert words in caught(errors.ArgumentError, report), words
        report()
        run()
"""
    for setting in ("0", "1"):
        check_script(PRELUDE + script, RADDLE_CHECK=setting)
