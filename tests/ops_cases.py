"""Makes arguments for the tests of the ops family: every dtype, both devices. Needs: numpy."""

import math

import numpy as np
import raddle

DTYPES = ["float32", "float16", "bfloat16"]
ROUNDING = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}  # of one result, relative


def to_bits(x, dtype):
    """The array that a NumPy user would hold: bfloat16 as uint16, rounded to nearest even."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
    return x.astype(dtype)


def from_bits(x, dtype):
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def put(x, device, dtype=None):
    """A NumPy array where the test runs: itself, or a raddle.Tensor on CUDA."""
    return x if device == "cpu" else raddle.tensor(x, dtype=dtype, device=device)


def get(x, dtype="float32"):
    """float64 value of a result, or the integers."""
    x = x.to("cpu").numpy() if isinstance(x, raddle.Tensor) else x
    return x if x.dtype.kind == "i" else from_bits(x, dtype)


def draw(rng, shape, dtype, device, scale=1.0):
    """(tensor under test, its float64 value)."""
    bits = to_bits(rng.standard_normal(shape) * scale, dtype)
    return put(bits, device, dtype), from_bits(bits, dtype)


def assert_rounded(got, want, dtype, slack=0.0):
    """Within one rounding of dtype, and slack relative to the largest value for float32 sums."""
    limit = np.abs(want) * ROUNDING[dtype] * 1.01 + (slack + 1e-6) * np.abs(want).max(initial=0)
    worst = np.max(np.abs(got - want) - limit, initial=-1)
    assert worst <= 0, f"error over the limit by {worst}"
    assert got.shape == want.shape


def assert_distributed(tokens, p):
    """Chi-square of draws against p, with 5 sigma of room; what expects fewer than 5 is joined."""
    counts = np.bincount(tokens, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    expected = len(tokens) * p
    often = expected >= 5
    expected = np.append(expected[often], expected[~often].sum())
    counts = np.append(counts[often], counts[~often].sum())
    expected, counts = expected[expected > 0], counts[expected > 0]
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = max(len(expected) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5
