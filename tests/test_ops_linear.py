"""Linear layers against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda; torch for the test that says so.
"""

import numpy as np
import pytest
from raddle import errors, ops

from tests.ops_cases import DTYPES, assert_rounded, draw, from_bits, get, put, to_bits


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


# ------------------------------------------------------------------ linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,out_features,in_features",
    [(1, 128, 256), (1, 33, 257), (2, 1, 1), (5, 31, 64), (12, 96, 1000), (13, 64, 255),
     (64, 160, 512), (300, 70, 130), (8, 39, 1032), (9, 39, 1032), (7, 5000, 16), (3, 4500, 2056),
     (0, 8, 8), (3, 0, 8)],
)  # fmt: skip
def test_linear(device, rng, dtype, n, out_features, in_features):
    weight, weight_value = draw(rng, (out_features, in_features), dtype, device, in_features**-0.5)
    bias, bias_value = draw(rng, (out_features,), dtype, device)
    x, value = draw(rng, (n, in_features), dtype, device)
    want = value @ weight_value.T
    for with_bias in (True, False):
        layer = ops.Linear(weight, bias if with_bias else None, dtype=dtype)
        assert_rounded(get(layer(x), dtype), want + with_bias * bias_value, dtype, slack=1e-6)
    wide = put(np.full((n, out_features), np.nan, np.float32), device)
    assert layer(x, out=wide) is wide
    assert_rounded(get(wide), want, "float32", slack=2e-6)


def test_linear_copies_a_host_weight_of_any_strides(rng):
    weight = rng.standard_normal((40, 66)).astype(np.float32)[::-2, ::3]
    want = weight.astype(np.float64).copy()
    layer = ops.Linear(weight)
    weight[:] = np.nan
    x = np.eye(22, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), want.T)


@pytest.mark.parametrize("n", [1, 8, 9, 300])
def test_linear_on_some_multiprocessors(device, rng, n):
    """A bound changes who computes, not what; the CPU has none to bound."""
    weight, weight_value = draw(rng, (700, 512), "bfloat16", device, 512**-0.5)
    x, value = draw(rng, (n, 512), "bfloat16", device)
    layer = ops.Linear(weight, dtype="bfloat16")
    with pytest.raises(errors.ArgumentError, match=r"max_sms: expected 0 \(all\) or more .* -1"):
        layer(x, max_sms=-1)
    if device == "cpu":
        with pytest.raises(errors.UnsupportedError, match="max_sms: expected 0 on the CPU.* 5"):
            layer(x, max_sms=5)
        return
    for max_sms in (1, 40, 10_000):
        got = get(layer(x, max_sms=max_sms), "bfloat16")
        assert_rounded(got, value @ weight_value.T, "bfloat16", slack=1e-6)


def test_linear_of_strided_rows(device, rng):
    weight, weight_value = draw(rng, (48, 64), "float32", device)
    wide = np.float32(rng.standard_normal((9, 160)))
    full = np.full((9, 100), np.nan, np.float32)
    x, out = put(wide, device)[:, 32:96], put(full, device)
    layer = ops.Linear(weight)
    layer(x, out=out[:, 16:64])
    got = get(out)
    want = wide[:, 32:96].astype(np.float64) @ weight_value.T
    assert_rounded(got[:, 16:64], want, "float32", slack=2e-6)
    assert np.isnan(got[:, :16]).all() and np.isnan(got[:, 64:]).all()


def test_linear_waits_for_its_input(device, rng):
    """It may start before what writes x has ended, and what reads the result before it has."""
    gain = put(np.ones(4096, np.float16), device)
    weights = [draw(rng, (n, 4096), "float16", device, 4096**-0.5) for n in (4096, 24)]
    wide, narrow = (ops.Linear(weight) for weight, _ in weights)
    rows = [draw(rng, (2, 4096), "float16", device) for _ in range(8)]
    x, y = (put(np.zeros((2, 4096), np.float16), device) for _ in range(2))
    outs = [put(np.zeros((2, 24), np.float32), device) for _ in rows]
    for (row, _), out in zip(rows, outs):
        ops.rmsnorm(row, gain, 0.0, out=x)
        wide(x, out=y)
        narrow(y, out=out)
    for (_, value), out in zip(rows, outs):
        normed = value / np.sqrt((value**2).mean(-1, keepdims=True))
        want = normed @ weights[0][1].T @ weights[1][1].T
        np.testing.assert_allclose(get(out), want, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_each_other(rng, dtype):
    """On the CPU, bit for bit, whatever number of rows came along."""
    weight, _ = draw(rng, (77, 519), dtype, "cpu")
    x, _ = draw(rng, (270, 519), dtype, "cpu")
    layer = ops.Linear(weight, dtype=dtype)
    whole = layer(x, out=np.empty((270, 77), np.float32))
    for n in (1, 2, 7, 12, 13, 64, 255):
        part = layer(x[:n], out=np.empty((n, 77), np.float32))
        np.testing.assert_array_equal(part, whole[:n])


def test_linear_does_not_read_past_a_row(rng):
    """NaN around x and the weight stays outside, at every odd size."""
    for depth in (1, 3, 31, 33, 257):
        x = np.full((3, depth + 2), np.nan, np.float32)
        weight = np.full((5, depth + 2), np.nan, np.float32)
        x[:, 1:-1] = rng.standard_normal((3, depth))
        weight[:, 1:-1] = rng.standard_normal((5, depth))
        for dtype in DTYPES:
            a, w = to_bits(x, dtype), to_bits(weight, dtype)
            got = ops.Linear(w[:, 1:-1], dtype=dtype)(a[:, 1:-1], out=np.empty((3, 5), np.float32))
            want = from_bits(a[:, 1:-1], dtype) @ from_bits(w[:, 1:-1], dtype).T
            assert_rounded(got, want, "float32", slack=2e-6)


def test_linear_from_torch_parameters(rng):
    torch = pytest.importorskip("torch", reason="needs torch")
    module = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    got = ops.Linear(module.weight, module.bias)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, module(x).detach(), rtol=1.6e-2, atol=1e-2)
