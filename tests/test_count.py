"""Launch counters: which kernels ran on the GPUs, and how often, inside CUDA graphs too.

Needs: a GPU, for the test that is marked so; a C compiler for the stub driver.
"""

import numpy as np
import pytest
import raddle
from raddle import _core, ops

from tests.stub_driver import build_stubs, check_script


@pytest.fixture
def counting():
    _core.count_launches(True)
    yield
    _core.count_launches(False)


def test_the_cpu_launches_nothing(counting):
    x = np.ones((4, 8), np.float32)
    before = _core.launch_counts()
    ops.rmsnorm(x, np.ones(8, np.float32))
    assert _core.launch_counts() == before


def test_only_what_has_a_truth_value_switches():
    with pytest.raises(ValueError, match="ambiguous"):
        _core.count_launches(np.ones(2))
    with pytest.raises(TypeError):
        _core.count_launches()


def test_without_a_driver():
    script = """
from raddle import _core
_core.count_launches(True)
assert _core.launch_counts() == {}
_core.count_launches(False)
assert _core.launch_counts() == {}
"""
    check_script(script, RADDLE_DISABLE_CUDA="1")


OPS = """
import raddle
from raddle import _core, ops

x, y = (raddle.zeros((4, 64), "float16", device) for device in ("cuda:0", "cuda:1"))
w, v = (raddle.zeros((64,), "float16", device) for device in ("cuda:0", "cuda:1"))
"""


def test_devices_are_summed_and_off_is_off(tmp_path):
    script = (
        OPS
        + """
ops.rmsnorm(x, w, out=x)  # before
_core.count_launches(True)
for _ in range(3):
    ops.rmsnorm(x, w, out=x)
    ops.rmsnorm(y, v, out=y)
ops.silu_and_mul(x, out=raddle.zeros((4, 32), "float16", "cuda:0"))
assert _core.launch_counts() == {"ops_norm": 6, "ops_act_and_mul": 1}, _core.launch_counts()
_core.count_launches(False)
ops.rmsnorm(x, w, out=x)
assert _core.launch_counts() == {"ops_norm": 6, "ops_act_and_mul": 1}
_core.count_launches(True)
assert _core.launch_counts() == {}
"""
    )
    check_script(script, build_stubs(tmp_path), RADDLE_CACHE_DIR="")


def test_raddle_graphs_count_what_they_replay(tmp_path):
    script = (
        OPS
        + """
from raddle import errors
ops.rmsnorm(x, w, out=x)  # the kernel is there before the capture
_core.count_launches(True)
graph = raddle.Graph(device="cuda:0")
with graph:
    ops.rmsnorm(x, w, out=x)
    for refused in (_core.launch_counts, lambda: _core.count_launches(True)):
        try:
            refused()
        except errors.StateError as error:
            assert "capture" in str(error)
        else:
            raise AssertionError("not refused")
assert _core.launch_counts() == {}
for _ in range(5):
    graph.launch()
assert _core.launch_counts() == {"ops_norm": 5}, _core.launch_counts()
"""
    )
    check_script(script, build_stubs(tmp_path), RADDLE_CACHE_DIR="")


@pytest.mark.gpu
def test_counting_changes_no_result(counting):
    """What is counted are kernels of programmatic launch that wait for each other."""
    rng = np.random.default_rng(5)
    x, weight = (
        raddle.tensor(rng.standard_normal(shape).astype(np.float32), device="cuda")
        for shape in ((300, 512), (512,))
    )
    out = raddle.zeros((300, 512), "float32", "cuda")

    def chain():
        ops.rmsnorm(x, weight, out=out)
        for _ in range(20):
            ops.rmsnorm(out, weight, out=out)

    _core.count_launches(False)
    chain()
    expected = out.to("cpu").numpy()
    assert np.abs(expected).max() > 0.1
    _core.count_launches(True)
    graph = raddle.Graph(device="cuda")
    with graph:
        chain()
    assert _core.launch_counts() == {}
    for _ in range(7):
        graph.launch()
    assert _core.launch_counts() == {"ops_norm": 7 * 21}
    np.testing.assert_array_equal(out.to("cpu").numpy(), expected)
    chain()
    assert _core.launch_counts() == {"ops_norm": 8 * 21}
    np.testing.assert_array_equal(out.to("cpu").numpy(), expected)
