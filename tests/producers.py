"""Fixtures for tests with fake DLPack producers: the module of fake_producer.c and its doors.

A test module that wants them says `pytest_plugins = ["tests.producers"]`.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """The module of fake_producer.c, compiled here."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs compiler: cc or gcc on the PATH")
    target = (
        tmp_path_factory.mktemp("fake") / f"fake_producer{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    flags = ["-std=c11", "-O1", "-g", "-shared", "-fPIC"]
    include = ["-I", sysconfig.get_path("include"), "-I", str(HERE.parent / "csrc")]
    done = subprocess.run(
        [*compiler.split(), *flags, *include, str(HERE / "fake_producer.c"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loader = importlib.machinery.ExtensionFileLoader("fake_producer", str(target))
    spec = importlib.util.spec_from_file_location("fake_producer", target, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def memory():
    """64 floats 0 .. 63, 64-byte aligned, that fake producers point into."""
    raw = np.zeros(64 + 16, np.float32)
    start = (-raw.ctypes.data % 64) // 4
    values = raw[start : start + 64]
    values[:] = np.arange(64)
    return values


@pytest.fixture
def balanced(fake):
    """Whatever a test exports is deleted exactly once by its end."""
    exports, deletes, _ = fake.counts()
    yield
    now = fake.counts()
    assert now[0] - exports == now[1] - deletes
    assert now[2] == 0


@pytest.fixture(params=["capsule", "legacy", "full", "no_view", "no_owned", "integer"])
def make(request, fake, memory, balanced):
    """make(shape, ...) -> a producer whose data is `memory`, for each way to hand it over."""
    kinds = {
        "capsule": {},
        "legacy": {},
        "full": {"__dlpack_c_exchange_api__": fake.table("full")},
        "no_view": {"__dlpack_c_exchange_api__": fake.table("no_view")},
        "no_owned": {"__dlpack_c_exchange_api__": fake.table("no_owned")},
        "integer": {"__c_dlpack_exchange_api__": fake.table("full", True)},
    }
    kind = type(f"Fake_{request.param}", (fake.Producer,), kinds[request.param])
    mode = "legacy" if request.param == "legacy" else "versioned"

    def make(shape, *, address=memory.ctypes.data, **settings):
        return kind(address, shape, mode=mode, **settings)

    make.door = request.param
    return make
