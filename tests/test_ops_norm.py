"""Layer norm, weight offsets and 8-bit results of norms against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

from tests.ops_cases import DTYPES, assert_rounded, draw, from_bits, get, put, to_bits
from tests.reference import ops as reference

FP8 = ["float8_e4m3fn", "float8_e5m2"]


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def empty_fp8(shape, kind, device):
    return raddle.empty(shape, dtype=kind, device=device)


def assert_nearest(out, value, kind):
    """out holds the 8-bit numbers nearest to value: as near as can be, and a float32 error more."""
    table = reference.fp8_values(kind)
    finite = np.sort(table[np.isfinite(table)])
    got = table[out.to("cpu").numpy()]
    value = np.clip(value, finite[0], finite[-1])
    above = np.searchsorted(finite, value).clip(1, len(finite) - 1)
    best = np.minimum(np.abs(finite[above] - value), np.abs(finite[above - 1] - value))
    assert got.shape == value.shape
    assert (np.abs(got - value) <= best + 4e-6 * np.abs(value) + 1e-12).all()


# ------------------------------------------------------------------ weight offsets, layer norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 111, 4096, 16384])
def test_weight_offset(device, rng, dtype, width):
    x, x_value = draw(rng, (3, width), dtype, device)
    weight, weight_value = draw(rng, (width,), dtype, device)
    got = get(ops.rmsnorm(x, weight, weight_offset=1.0, dtype=dtype), dtype)
    assert_rounded(got, reference.rmsnorm(x_value, weight_value + 1, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_offset_after_an_add(device, rng, dtype):
    x, x_value = draw(rng, (5, 500), dtype, device)
    residual, residual_value = draw(rng, (5, 500), dtype, device)
    weight, weight_value = draw(rng, (500,), "float32", device)
    ops.fused_add_rmsnorm(x, residual, weight, weight_offset=-0.5, dtype=dtype)
    total = x_value + residual_value
    np.testing.assert_array_equal(
        get(residual, dtype), from_bits(to_bits(np.float32(total), dtype), dtype)
    )
    assert_rounded(get(x, dtype), reference.rmsnorm(total, weight_value - 0.5, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (128, 129), (2, 16384), (2, 3, 96), (0, 8), (3, 0)])
@pytest.mark.parametrize("weight_dtype", ["float32", None])
def test_layernorm(device, rng, dtype, shape, weight_dtype):
    x, x_value = draw(rng, shape, dtype, device, scale=2)
    weight, weight_value = draw(rng, shape[-1:], weight_dtype or dtype, device)
    bias, bias_value = draw(rng, shape[-1:], weight_dtype or dtype, device)
    got = get(ops.layernorm(x, weight, bias, 1e-5, dtype=dtype), dtype)
    assert got.shape == shape
    if 0 not in shape:
        want = reference.layernorm(x_value, weight_value, bias_value, 1e-5)
        assert_rounded(got, want, dtype, slack=1e-6)


def test_layernorm_of_values_far_from_zero(device, rng):
    """Differences to the mean are squared, not squares subtracted."""
    x = np.float32(4096 + rng.standard_normal((4, 1000)))
    ones, zeros = np.ones(1000, np.float32), np.zeros(1000, np.float32)
    got = get(ops.layernorm(put(x, device), put(ones, device), put(zeros, device)))
    want = reference.layernorm(x.astype(np.float64), 1, 0, 1e-6)
    np.testing.assert_allclose(got, want, atol=2e-3)  # the mean is rounded to float32 once


def test_layernorm_in_place_of_strided_heads(device, rng):
    bits = np.float32(rng.standard_normal((4, 200)))
    row = put(bits.copy(), device)
    view = row[:, 10:170].reshape(4, 5, 32)
    weight, weight_value = draw(rng, (32,), "float32", device)
    bias, bias_value = draw(rng, (32,), "float32", device)
    assert ops.layernorm(view, weight, bias, out=view) is view
    want = bits.astype(np.float64)
    part = want[:, 10:170].reshape(4, 5, 32)
    want[:, 10:170] = reference.layernorm(part, weight_value, bias_value, 1e-6).reshape(4, -1)
    assert_rounded(get(row), want, "float32", slack=1e-6)


# ------------------------------------------------------------------ 8-bit results


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [111, 512, 16384])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_rmsnorm_to_8_bits(device, rng, kind, dtype, width, scale):
    x, x_value = draw(rng, (3, width), dtype, device)
    weight, weight_value = draw(rng, (width,), dtype, device)
    out = empty_fp8((3, width), kind, device)
    assert ops.rmsnorm(x, weight, out=out, scale=scale, dtype=dtype) is out
    want = reference.rmsnorm(x_value, weight_value, 1e-6) / np.float32(scale)
    assert_nearest(out, want, kind)


@pytest.mark.parametrize("kind", FP8)
def test_every_8_bit_number_and_what_lies_between(device, kind):
    """Values whose norm is known exactly: 1 times a weight."""
    table = reference.fp8_values(kind)
    numbers = np.sort(table[np.isfinite(table)])
    between = (numbers[1:] + numbers[:-1]) / 2  # ties go to the even mantissa
    far = np.array([1e30, -1e30, 1e-30, -1e-30, 464.0, 61440.0])
    weight = np.float32(np.concatenate([numbers, between, far]))
    x = np.ones((1, len(weight)), np.float32)
    out = empty_fp8(x.shape, kind, device)
    ops.rmsnorm(put(x, device), put(weight, device), 0.0, out=out)
    assert_nearest(out, weight[None].astype(np.float64), kind)
    codes = out.to("cpu").numpy()[0, len(numbers) : len(numbers) + len(between)]
    exact = numbers[:-1][np.diff(numbers) > 0]
    ties = codes[: len(exact)][between[: len(exact)] != 0]
    assert (ties[np.abs(table[ties]) > 0] % 2 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_to_8_bits_leaves_x(device, rng, dtype):
    x, x_value = draw(rng, (4, 256), dtype, device)
    residual, residual_value = draw(rng, (4, 256), dtype, device)
    weight, weight_value = draw(rng, (256,), dtype, device)
    out = empty_fp8((4, 256), FP8[0], device)
    scale = put(np.array([0.25], np.float32), device)
    ops.fused_add_rmsnorm(x, residual, weight, out=out, scale=scale, dtype=dtype)
    total = x_value + residual_value
    np.testing.assert_array_equal(get(x, dtype), x_value)
    np.testing.assert_array_equal(
        get(residual, dtype), from_bits(to_bits(np.float32(total), dtype), dtype)
    )
    assert_nearest(out, reference.rmsnorm(total, weight_value, 1e-6) / 0.25, FP8[0])


def test_layernorm_to_8_bits_and_nan(device, rng):
    value = np.float32(rng.standard_normal((2, 96)))
    value[1, 5] = np.nan
    weight, weight_value = draw(rng, (96,), "float32", device)
    bias, bias_value = draw(rng, (96,), "float32", device)
    out = empty_fp8((2, 96), FP8[1], device)
    ops.layernorm(put(value, device), weight, bias, out=out, scale=0.5)
    want = reference.layernorm(value[:1].astype(np.float64), weight_value, bias_value, 1e-6)
    assert_nearest(out[:1], want / 0.5, FP8[1])
    assert np.isnan(reference.fp8_values(FP8[1])[out.to("cpu").numpy()[1]]).all()


X = np.ones((4, 8), np.float32)
W = np.ones(8, np.float32)
BAD_CALLS = [
    (lambda: ops.layernorm(X, W, None), DTypeError, "bias"),
    (lambda: ops.layernorm(X, W, W[:7]), ShapeError, "bias.*8.*7"),
    (lambda: ops.layernorm(X, W, W.astype(np.float16)), DTypeError, "bias: .*float16"),
    (lambda: ops.rmsnorm(X, W, weight_offset=float("inf")), ArgumentError, "weight_offset"),
    (lambda: ops.rmsnorm(X, W, scale=2.0), UnsupportedError, "scale: .*float32"),
    (lambda: ops.rmsnorm(X, W, out=empty_fp8((4, 8), FP8[0], "cpu"), scale=0), ArgumentError, "0"),
    (
        lambda: ops.rmsnorm(X, W, out=empty_fp8((4, 8), FP8[0], "cpu"), scale=W),
        ShapeError,
        "scale: .*one",
    ),
    (
        lambda: ops.rmsnorm(X, W, out=empty_fp8((4, 8), FP8[0], "cpu"), scale=W[:1].astype("f8")),
        DTypeError,
        "scale: .*float64",
    ),
    (lambda: ops.rmsnorm(X, W, out=empty_fp8((4, 9), FP8[0], "cpu")), ShapeError, "out"),
    (lambda: ops.fused_add_rmsnorm(X, X.copy(), W, out=X[:, :4]), ShapeError, "out"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_name_the_argument(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(X, 1)


def test_residual_and_out_are_different_memory():
    residual = np.ones((4, 8), np.float32)
    with pytest.raises(ArgumentError, match="residual: .*same memory as out"):
        ops.fused_add_rmsnorm(X, residual, W, out=residual)
