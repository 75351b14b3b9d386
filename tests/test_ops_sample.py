"""Softmax, log-probabilities and sampling against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import math

import numpy as np
import pytest
from raddle import ops
from raddle.errors import ArgumentError

from tests.ops_cases import DTYPES, draw, from_bits, get, put, to_bits
from tests.reference import ops as reference


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


# ------------------------------------------------------------------ softmax, log-probabilities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32003, 128256])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_softmax(device, rng, dtype, vocab, temperature):
    logits, value = draw(rng, (3, vocab), dtype, device, scale=5)
    got = get(ops.softmax(logits, temperature=temperature, dtype=dtype))
    want = reference.softmax(value, temperature)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_softmax_of_masked_and_infinite_logits(device):
    logits = np.array(
        [[-np.inf, 0, -np.inf, 0], [3e38, -3e38, 0, 3e38], [np.inf, 1, 2, 3]], np.float32
    )
    got = get(ops.softmax(put(logits, device)))
    np.testing.assert_array_equal(got, [[0, 0.5, 0, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "vocab,top", [(1, 1), (50, 50), (1000, 20), (128256, 5), (700, 0), (3000, 128)]
)
def test_token_logprobs(device, rng, dtype, vocab, top):
    n = 4
    logits, value = draw(rng, (n, vocab), dtype, device, scale=4)
    ids = rng.integers(0, vocab, n)
    want = reference.log_softmax(value)
    order = np.lexsort((np.broadcast_to(np.arange(vocab), value.shape), -value))[:, :top]
    for index in (np.int32, np.int64):
        logprobs, top_ids, top_logprobs = ops.token_logprobs(
            logits, put(ids.astype(index), device), top=top, dtype=dtype
        )
        np.testing.assert_allclose(get(logprobs), want[np.arange(n), ids], rtol=1e-5, atol=2e-6)
        np.testing.assert_array_equal(get(top_ids), order)
        np.testing.assert_allclose(
            get(top_logprobs), np.take_along_axis(want, order, 1), rtol=1e-5, atol=2e-6
        )


def test_top_logprobs_of_ties_come_by_id(device):
    logits = np.zeros((1, 500), np.float32)
    logits[0, [7, 300]] = 1
    _, ids, _ = ops.token_logprobs(put(logits, device), put(np.array([3]), device), top=6)
    np.testing.assert_array_equal(get(ids), [[7, 300, 0, 1, 2, 3]])


# ------------------------------------------------------------------ sample


def sample(logits, device, **settings):
    dtype = settings.get("dtype")
    return get(ops.sample(put(logits, device, dtype), **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 1025, 32000])
def test_greedy_takes_the_first_maximum(device, rng, dtype, vocab):
    value = np.round(rng.standard_normal((9, vocab)), 1)  # many ties
    got = sample(to_bits(value, dtype), device, temperature=0.0, top_k=3, seed=5, dtype=dtype)
    np.testing.assert_array_equal(got, from_bits(to_bits(value, dtype), dtype).argmax(-1))
    assert got.dtype == np.int32


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [17, 5000])
def test_sample_inverts_the_distribution(device, rng, settings, vocab):
    """Each token is where the cumulative sum passes the generator's number."""
    n = 200
    row = np.float32(rng.standard_normal(vocab) * 2)
    row[rng.integers(0, vocab, vocab // 5)] = -np.inf
    offsets = np.arange(n) + 2**33
    got = sample(np.tile(row, (n, 1)), device, seed=2**40 + 3, offset=list(offsets), **settings)
    p = reference.kept(row.astype(np.float64), **settings)
    ends = np.cumsum(p)
    for token, offset in zip(got, offsets, strict=True):
        u = reference.philox_uniform(2**40 + 3, int(offset))
        assert p[token] > 0
        assert ends[token] - p[token] - 1e-6 <= u <= ends[token] + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_frequencies(device, rng, dtype):
    """Chi-square of 20,000 draws against the reference, with 5 sigma of room."""
    n, vocab = 20000, 40
    bits = to_bits(rng.standard_normal(vocab), dtype)
    p = reference.kept(from_bits(bits, dtype), top_k=25, top_p=0.95)
    got = sample(
        np.tile(bits, (n, 1)), device, seed=np.arange(n), top_k=25, top_p=0.95, dtype=dtype
    )
    counts = np.bincount(got, minlength=vocab)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch(device, rng):
    logits = np.float32(rng.standard_normal((150, 3001)))
    settings = {
        "temperature": rng.uniform(0.2, 2, 150),
        "top_k": rng.integers(0, 50, 150),
        "top_p": rng.uniform(0.3, 1, 150),
        "min_p": rng.uniform(0, 0.1, 150),
        "seed": rng.integers(0, 2**62, 150),
        "offset": rng.integers(0, 2**40, 150),
    }
    settings["temperature"][::10] = 0
    whole = sample(logits, device, **settings)
    order = rng.permutation(150)
    some = order[:67]
    part = sample(logits[some], device, **{k: v[some].tolist() for k, v in settings.items()})
    np.testing.assert_array_equal(part, whole[some])
    for i in order[:5]:
        alone = sample(logits[i : i + 1], device, **{k: v[i].item() for k, v in settings.items()})
        assert alone[0] == whole[i]


def test_settings_may_lie_on_the_device(device, rng):
    n = 70
    logits = np.float32(rng.standard_normal((n, 999)))
    host = {
        "temperature": rng.uniform(0, 2, n).astype(np.float32),
        "top_k": rng.integers(-1, 50, n).astype(np.int32),
        "top_p": rng.uniform(0.3, 1, n).astype(np.float32),
        "min_p": rng.uniform(0, 0.1, n).astype(np.float32),
        "seed": rng.integers(0, 2**62, n),
        "offset": rng.integers(0, 2**40, n),
    }
    there = sample(logits, device, **{k: put(v, device) for k, v in host.items()})
    np.testing.assert_array_equal(there, sample(logits, device, **host))


def test_sample_of_fixed_inputs():
    """By the reference's own generator and cumulative sums, token for token."""
    logits = np.float32(np.sin(np.arange(4 * 1000).reshape(4, 1000) * 0.37) * 4)
    got = ops.sample(logits, seed=[1, 2, 3, 4], offset=7, top_p=0.9, temperature=0.8)
    p = [reference.kept(row.astype(np.float64), top_p=0.9, temperature=0.8) for row in logits]
    want = [
        np.searchsorted(np.cumsum(row), reference.philox_uniform(seed, 7), side="right")
        for seed, row in zip([1, 2, 3, 4], p, strict=True)
    ]
    np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
def test_both_back_ends_draw_the_same_tokens(rng):
    n = 500
    logits = to_bits(rng.standard_normal((n, 32000)) * 3, "bfloat16")
    settings = {
        "temperature": rng.uniform(0.1, 2, n),
        "top_k": rng.integers(0, 60, n),
        "top_p": rng.uniform(0.3, 1, n),
        "min_p": rng.uniform(0, 0.05, n) * (rng.random(n) < 0.5),
        "seed": rng.integers(0, 2**62, n),
    }
    cpu = sample(logits, "cpu", dtype="bfloat16", **settings)
    cuda = sample(logits, "cuda", dtype="bfloat16", **settings)
    np.testing.assert_array_equal(cpu, cuda)


@pytest.mark.parametrize("row", [[0, np.nan, 1], [-np.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_sampled(device, row, temperature):
    logits = np.array([[1, 2, 9], row, [9, 1, 2]], np.float32)
    if device == "cpu":
        with pytest.raises(ArgumentError, match="logits: .*row 1"):
            ops.sample(logits, temperature=temperature)
        return
    got = sample(logits, device, temperature=temperature)
    assert got[1] == -1
    if temperature == 0:
        np.testing.assert_array_equal(got, [2, -1, 0])
