"""What every test shares: the device parameter, the check for leaked blocks, the list of skips.

--device cpu|cuda|all   which parameters of the `device` fixture run (default: all)
RADDLE_REQUIRE          comma-separated names (torch, transformers, nvrtc, gpu, ...): a skip whose
                        reason names one of them is a failure

A test that cannot run says `pytest.skip("needs NAME: ...")`. Nothing skips silently: the reasons
are listed, with counts, at the end of the run.
"""

import ctypes
import functools
import gc
import os
import re
from collections import Counter

import pytest

REQUIRED = [name for name in os.environ.get("RADDLE_REQUIRE", "").split(",") if name]
passed_key = pytest.StashKey[bool]()


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda", "all"), default="all")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and its driver")
    config.addinivalue_line("markers", "keeps_blocks: fills a cache that outlives the test")


# -- devices ------------------------------------------------------------------------------------


@functools.cache
def missing_gpu():
    """Why no GPU can be used, or an empty string. Asks the driver itself, not raddle."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "needs gpu: libcuda.so.1 is not on this machine"
    count = ctypes.c_int(0)
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value == 0:
        return f"needs gpu: the driver answers error {error}, {count.value} devices"
    return ""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """ "cpu" and "cuda", one after the other."""
    return request.param


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--device")
    if wanted == "all":
        return
    is_gpu = [item.get_closest_marker("gpu") is not None for item in items]
    keep = [gpu == (wanted == "cuda") for gpu in is_gpu]
    dropped = [item for item, kept in zip(items, keep, strict=True) if not kept]
    items[:] = [item for item, kept in zip(items, keep, strict=True) if kept]
    config.hook.pytest_deselected(items=dropped)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and missing_gpu():
        pytest.skip(missing_gpu())


# -- leaks --------------------------------------------------------------------------------------


@functools.cache
def live_blocks():
    """raddle's own count of heap blocks, or None where the module is not installed."""
    try:
        from raddle import _core
    except ImportError:
        return None
    return _core.alloc_live


@pytest.fixture(autouse=True)
def no_leaked_blocks(request):
    """Every block that a passing test took is given back. CUDA tests may leave compiled kernels."""
    count = live_blocks()
    node = request.node
    if count is None or node.get_closest_marker("gpu") or node.get_closest_marker("keeps_blocks"):
        yield
        return
    before = count()
    yield
    if count() > before:
        gc.collect()
    if count() > before and node.stash.get(passed_key, False):
        pytest.fail(f"{count() - before} blocks of raddle's heap outlived the test")


# -- skips --------------------------------------------------------------------------------------


def skip_reason(report):
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def refuse_required_skip(report):
    reason = skip_reason(report) if report.skipped else ""
    named = [name for name in REQUIRED if re.search(rf"\b{re.escape(name)}\b", reason)]
    if named and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"RADDLE_REQUIRE names {named[0]}, but the test skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[passed_key] = report.passed
    refuse_required_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    refuse_required_skip(report)
    return report


def pytest_terminal_summary(terminalreporter):
    skipped = Counter(skip_reason(report) for report in terminalreporter.getreports("skipped"))
    if skipped:
        terminalreporter.section("skipped, and why")
    for reason, count in skipped.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
