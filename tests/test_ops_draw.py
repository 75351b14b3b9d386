"""Sampling from probabilities, indices and filters against float64 NumPy, on both back ends.
Sampling from logits: test_ops_sample.py.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.errors import ArgumentError, DeviceError, DTypeError, ShapeError

from tests.ops_cases import DTYPES, ROUNDING, assert_distributed, from_bits, get, put, to_bits
from tests.reference import ops as reference


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def draw_probs(rng, n, vocab, dtype="float32", spread=2.0):
    """(bits, float64 value) of rows of probabilities, a fifth of them 0, many of them tied."""
    logits = np.round(rng.standard_normal((n, vocab)) * spread, 1)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p[rng.random((n, vocab)) < 0.2] = 0
    p[:, rng.integers(vocab)] = 1
    bits = to_bits(p / p.sum(-1, keepdims=True), dtype)
    return bits, from_bits(bits, dtype)


SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 9},
    {"top_k": 100000},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"min_p": 0.25},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.6, "min_p": 0.01},
    {"top_k": 20, "top_p": 0.6, "filter_order": "joint"},
    {"top_k": 3, "top_p": 0.95, "min_p": 0.05, "filter_order": "joint"},
]


def kept(p, settings):
    settings = dict(settings)
    joint = settings.pop("filter_order", "") == "joint"
    return reference.kept_probs(p, joint=joint, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [17, 3001])
def test_probabilities_are_inverted(device, rng, settings, vocab):
    """Each token is where the cumulative sum passes the generator's number."""
    n = 150
    bits, value = draw_probs(rng, 1, vocab)
    offsets = np.arange(n) + 2**33
    got = get(
        ops.sample_probs(
            put(np.tile(bits * np.float32(0.3), (n, 1)), device),  # of any sum
            seed=2**40 + 3,
            offset=list(offsets),
            **settings,
        )
    )
    p = kept((bits[0] * np.float32(0.3)).astype(np.float64), settings)
    ends = np.cumsum(p)
    for token, offset in zip(got, offsets, strict=True):
        u = reference.philox_uniform(2**40 + 3, int(offset))
        assert p[token] > 0
        assert ends[token] - p[token] - 1e-6 <= u <= ends[token] + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[8], SETTINGS[10]], ids=str)
def test_frequencies_with_row_streams(device, rng, dtype, settings):
    """20,000 draws of one row, one seed and one offset."""
    bits, value = draw_probs(rng, 1, 40, dtype)
    indices = put(np.zeros(20000, np.int32), device)
    x = put(bits, device, dtype)
    got = get(
        ops.sample_probs(
            x, indices=indices, seed=11, offset=4, row_streams=True, dtype=dtype, **settings
        )
    )
    assert_distributed(got, kept(value[0], settings))
    again = ops.sample_probs(
        x, indices=indices, seed=11, offset=4, row_streams=True, dtype=dtype, **settings
    )
    np.testing.assert_array_equal(got, get(again))


def test_row_streams_are_philox_counters(device, rng):
    bits, value = draw_probs(rng, 3, 500)
    indices = np.array([2, 0, 1, 2, 2], np.int64)
    got = ops.sample_probs(
        put(bits, device), indices=put(indices, device), seed=5, offset=9, row_streams=True
    )
    want = [
        np.searchsorted(
            np.cumsum(value[i] / value[i].sum()),
            reference.philox_uniform(5, 9, stream=row),
            side="right",
        )
        for row, i in enumerate(indices)
    ]
    np.testing.assert_array_equal(get(got), want)
    assert get(got).dtype == np.int64  # that of indices


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_settings_belong_to_outputs(device, rng, index):
    """With indices a setting is that of the output, not of the row; some lie on the device, with
    any stride."""
    bits, value = draw_probs(rng, 4, 300)
    m = 130
    indices = rng.integers(0, 4, m).astype(index)
    host = {
        "top_k": rng.integers(1, 30, m).astype(np.int32),
        "top_p": rng.uniform(0.3, 1, m).astype(np.float32),
        "min_p": rng.uniform(0, 0.1, m).astype(np.float32),
        "seed": rng.integers(0, 2**62, m),
        "offset": rng.integers(0, 2**40, m),
    }
    x = put(bits, device)
    whole = get(ops.sample_probs(x, indices=put(indices, device), **host))
    there = {}
    for name, array in host.items():
        wide = np.zeros((m, 3), array.dtype)
        wide[:, 1] = array
        there[name] = put(wide, device)[:, 1]
    np.testing.assert_array_equal(
        whole, get(ops.sample_probs(x, indices=put(indices, device), **there))
    )
    for i in (0, 1, 64, 129):
        alone = ops.sample_probs(
            put(bits[indices[i]][None], device), **{k: v[i].item() for k, v in host.items()}
        )
        assert get(alone)[0] == whole[i]
        p = reference.kept_probs(
            value[indices[i]], *(host[k][i] for k in ("top_k", "top_p", "min_p"))
        )
        assert p[whole[i]] > 0


@pytest.mark.parametrize("bad", [-1, 3, 2**31 - 1])
def test_indices_out_of_range(device, bad):
    x = put(np.ones((3, 8), np.float32), device)
    indices = put(np.array([0, bad, 2], np.int32), device)
    if device == "cpu":
        with pytest.raises(ArgumentError, match=f"indices: {bad} at position 1"):
            ops.sample_probs(x, indices=indices)
        return
    got = get(ops.sample_probs(x, indices=indices))
    assert got[1] == -1 and (got[[0, 2]] >= 0).all()


BAD_PROBS = {
    "nan": [0.5, np.nan, 0.5],
    "zero": [0.0, 0.0, 0.0],
    "negative": [-1.0, -2.0, 0.0],
    "infinite": [1.0, np.inf, 0.0],
    "too small to weigh": [2.0**-149, 0.0, 0.0],
}


@pytest.mark.parametrize("name", BAD_PROBS)
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.5}], ids=str)
def test_rows_that_cannot_be_drawn_from(device, name, settings):
    x = np.array([[0, 0, 1], BAD_PROBS[name], [1, 0, 0]], np.float32)
    valid = raddle.empty((3,), dtype="bool", device=device)
    got = get(ops.sample_probs(put(x, device), valid=valid, **settings))
    np.testing.assert_array_equal(got, [2, 0, 0])
    np.testing.assert_array_equal(valid.to("cpu").numpy(), [True, False, True])
    if device == "cpu":
        with pytest.raises(ArgumentError, match=r"probs: .*row 1"):
            ops.sample_probs(x, **settings)
        return
    np.testing.assert_array_equal(get(ops.sample_probs(put(x, device), **settings)), [2, -1, 0])


def test_logits_with_valid(device):
    logits = np.array([[0, -np.inf, -np.inf], [-np.inf] * 3, [0, np.nan, 0]], np.float32)
    for temperature in (0.0, 1.0):
        valid = put(np.full(3, 7, np.uint8), device)
        got = get(ops.sample(put(logits, device), valid=valid, temperature=temperature))
        np.testing.assert_array_equal(got, 0)
        flags = valid if device == "cpu" else valid.to("cpu").numpy()
        np.testing.assert_array_equal(flags, [1, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_order_of_logits(device, rng, dtype):
    """top_p of all tokens is fewer of them than top_p of what top_k leaves."""
    bits = to_bits(rng.standard_normal((1, 60)), dtype)
    p = reference.softmax(from_bits(bits, dtype))[0]
    x, indices = put(bits, device, dtype), put(np.zeros(20000, np.int32), device)
    for order in ("top_k_first", "joint"):
        got = ops.sample(
            x,
            top_k=30,
            top_p=0.5,
            filter_order=order,
            indices=indices,
            row_streams=True,
            dtype=dtype,
        )
        assert_distributed(get(got), reference.kept_probs(p, 30, 0.5, joint=order == "joint"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_back_ends_draw_the_same_tokens(rng, dtype):
    n = 300
    bits, _ = draw_probs(rng, n, 32000, dtype)
    settings = {
        "top_k": rng.integers(0, 60, n),
        "top_p": rng.uniform(0.3, 1, n),
        "min_p": rng.uniform(0, 0.05, n) * (rng.random(n) < 0.5),
        "seed": rng.integers(0, 2**62, n),
    }
    for order in ("top_k_first", "joint"):
        cpu = ops.sample_probs(bits, dtype=dtype, filter_order=order, **settings)
        cuda = ops.sample_probs(put(bits, "cuda", dtype), filter_order=order, **settings)
        np.testing.assert_array_equal(cpu, get(cuda))


# ------------------------------------------------------------------ filters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 111, 3001])
@pytest.mark.parametrize("settings", [{"top_k": 10}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.5}])
def test_renorm_probs(device, rng, dtype, vocab, settings):
    bits, value = draw_probs(rng, 3, vocab, dtype)
    got = get(ops.renorm_probs(put(bits, device, dtype), dtype=dtype, **settings), dtype)
    want = np.array([reference.kept_probs(row, **settings) for row in value])
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1.01 * ROUNDING[dtype] + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 111, 3001])
@pytest.mark.parametrize("settings", [{"top_k": 10}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.5}])
def test_mask_logits(device, rng, dtype, vocab, settings):
    bits = to_bits(np.round(rng.standard_normal((3, vocab)) * 3, 1), dtype)
    value = from_bits(bits, dtype)
    got = get(ops.mask_logits(put(bits, device, dtype), dtype=dtype, **settings), dtype)
    for mine, row in zip(got, value, strict=True):
        keep = reference.kept(row, **settings) > 0
        np.testing.assert_array_equal(mine, np.where(keep, row, -np.inf))


def test_filters_in_place_with_settings_of_each_row(device, rng):
    n = 70
    bits, value = draw_probs(rng, n, 200)
    top_k = rng.integers(1, 100, n).astype(np.int32)
    x = put(bits.copy(), device)
    assert ops.renorm_probs(x, top_k=put(top_k, device), out=x) is x
    want = [reference.kept_probs(row, int(k)) for row, k in zip(value, top_k, strict=True)]
    np.testing.assert_allclose(get(x), want, rtol=1e-6)
    logits = put(bits.copy(), device)
    ops.mask_logits(logits, top_k=top_k.tolist(), out=logits)
    for mine, row, k in zip(get(logits), value, top_k, strict=True):
        np.testing.assert_array_equal(mine > -np.inf, row >= np.sort(row)[-k])


def test_filters_of_rows_of_nothing(device):
    nan, inf = np.nan, np.inf
    probs = np.array([[0, 0, 0, 0], [1, nan, 1, 0], [1, inf, 0, 0], [-1, 3, 0, 1]], np.float32)
    got = get(ops.renorm_probs(put(probs, device), top_k=3, top_p=0.9))
    np.testing.assert_array_equal(got, [[0] * 4, [nan] * 4, [nan] * 4, [0, 0.75, 0, 0.25]])
    logits = np.array([[-inf] * 4, [1, nan, 1, 0], [1, inf, 0, 2], [-inf, 1, -inf, 0]], np.float32)
    got = get(ops.mask_logits(put(logits, device), top_k=3))
    want = [[-inf] * 4, [nan] * 4, [1, inf, -inf, 2], [-inf, 1, -inf, 0]]
    np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------------ softmax of each row


def test_softmax_with_a_temperature_for_each_row(device, rng):
    logits = np.float32(rng.standard_normal((5, 333)))
    temperature = np.float32([0.1, 0.5, 1, 3, 100])
    got = get(ops.softmax(put(logits, device), temperature=put(temperature, device)))
    want = reference.softmax(logits.astype(np.float64), temperature[:, None].astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)
    if device != "cpu":
        cold = ops.softmax(put(logits[:1], device), temperature=put(np.float32([0]), device))
        np.testing.assert_array_equal(get(cold)[0], logits[0] == logits[0].max())


P = np.full((2, 4), 0.25, np.float32)
BAD_CALLS = [
    (lambda: ops.sample_probs(P, filter_order="top_p_first"), ArgumentError, "filter_order"),
    (lambda: ops.sample_probs(P, indices=P[0]), DTypeError, "indices: .*float32"),
    (lambda: ops.sample_probs(P, indices=np.zeros((2, 3), np.int32)), ShapeError, "indices"),
    (lambda: ops.sample_probs(P, valid=P[:, 0]), DTypeError, "valid: .*float32"),
    (lambda: ops.sample_probs(P, valid=np.ones(3, bool)), ShapeError, "valid"),
    (lambda: ops.sample_probs(P, top_k=[1, 2, 3]), ShapeError, "top_k: .*2 rows.*3"),
    (lambda: ops.sample_probs(P.astype(np.float64)), DTypeError, "probs: .*float64"),
    (lambda: ops.renorm_probs(P[0]), ShapeError, "probs"),
    (lambda: ops.renorm_probs(P, out=np.ones((2, 4), np.float16)), DTypeError, "out"),
    (lambda: ops.renorm_probs(P, top_p=0.0), ArgumentError, "top_p: .*0"),
    (lambda: ops.mask_logits(P, top_k=-2), ArgumentError, "top_k: .*-2"),
    (lambda: ops.mask_logits(P, top_k=[1, 2, 3]), ShapeError, "top_k.*2.*3"),
    (lambda: ops.softmax(P, temperature=P[0]), ShapeError, "temperature: .*2.*4"),
    (lambda: ops.softmax(P, temperature=np.float32([1, 0])), ArgumentError, "0 for row 1"),
    (lambda: ops.softmax(P, temperature=np.ones(2)), DTypeError, "temperature: .*float64"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_name_the_argument(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(P, 0.25)


@pytest.mark.gpu
def test_tensors_of_one_call_are_on_one_device():
    probs = put(P, "cuda")
    with pytest.raises(DeviceError, match="indices"):
        ops.sample_probs(probs, indices=np.zeros(2, np.int32))
    with pytest.raises(DeviceError, match="temperature"):
        ops.softmax(probs, temperature=np.ones(2, np.float32))
