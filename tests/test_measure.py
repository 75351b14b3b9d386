"""What the benchmarks measure by refuses what it cannot read, and holds nothing. Needs: numpy."""

import sys

import numpy as np
import pytest
import raddle
from raddle import _core
from raddle.errors import DTypeError, ShapeError


@pytest.mark.parametrize("size", [0, 1, 15, 100_003])
def test_any_size_is_read(device, size):
    _core.memory_read(raddle.zeros((size,), device=device))


def test_strided_memory_is_refused(device):
    with pytest.raises(ShapeError, match="tensor.*contiguous"):
        _core.memory_read(raddle.zeros((8, 8), device=device)[:, ::2])


def test_opening_keeps_no_reference(device):
    tensor = raddle.zeros((4,), device=device)
    before = sys.getrefcount(tensor)
    _core.tensor_open(tensor, 1000)
    assert sys.getrefcount(tensor) == before


def test_only_tensors_open():
    with pytest.raises(DTypeError, match="tensor.*str"):
        _core.tensor_open("x", 1)
    with pytest.raises(DTypeError, match="tensor.*str"):
        _core.memory_read("x")
    _core.memory_read(np.zeros(4))
