"""Fixtures for tests with fake DLPack producers: the module of fake_producer.c and its doors.

A test module that wants them says `pytest_plugins = ["tests.producers"]`.
"""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tests.native import build_module

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    """The module of fake_producer.c, compiled here."""
    include = [sysconfig.get_path("include"), HERE.parent / "csrc"]
    return build_module(tmp_path_factory.mktemp("fake"), "fake_producer", [], include)


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
