"""Speculative decoding of drafted chains against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import math

import numpy as np
import pytest
from raddle import ops
from raddle.errors import ArgumentError, DTypeError, ShapeError

from tests.ops_cases import DTYPES, assert_distributed, get, put, to_bits
from tests.reference import ops as reference


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def test_a_draft_like_its_target_is_kept(device, rng):
    n, steps, vocab = 6, 4, 1500
    ids = rng.integers(0, vocab, (n, steps + 1))
    target = np.zeros((n, steps + 1, vocab), np.float32)
    np.put_along_axis(target, ids[..., None], 1, -1)
    draft = rng.random((n, steps, vocab), np.float32)
    counts = [put(np.arange(n, dtype=np.int32), device) for _ in range(2)]
    got = ops.verify_draft(
        put(draft / draft.sum(-1, keepdims=True), device),
        put(np.ascontiguousarray(ids[:, :steps]), device),
        put(target, device),
        accepted=counts[0],
        emitted=counts[1],
        seed=3,
    )
    np.testing.assert_array_equal(get(got), ids)
    for count in counts:
        np.testing.assert_array_equal(get(count), np.arange(n) + steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draft_that_the_target_excludes(device, rng, dtype):
    """Only the last token of the vocabulary has more of the target than of the draft."""
    vocab = 1025
    draft = np.zeros((4, 3, vocab))
    target = np.zeros((4, 4, vocab))
    draft[..., 0], target[..., -1] = 1, 1
    target[2, :2] = draft[2, :2]  # the third row keeps two
    got = ops.verify_draft(
        put(to_bits(draft, dtype), device, dtype),
        put(np.zeros((4, 3), np.int32), device),
        put(to_bits(target, dtype), device, dtype),
        dtype=dtype,
    )
    want = np.full((4, 4), -1)
    want[:, 0] = vocab - 1
    want[2, :3] = 0, 0, vocab - 1
    np.testing.assert_array_equal(get(got), want)


def test_verified_tokens_have_the_targets_distribution(device, rng):
    n, vocab = 20000, 30
    draft, target = rng.random((1, 1, vocab)) ** 2, rng.random((1, 2, vocab)) ** 2
    draft, target = (np.float32(x / x.sum(-1, keepdims=True)) for x in (draft, target))
    ids = rng.choice(vocab, n, p=draft[0, 0].astype(np.float64) / draft[0, 0].sum(dtype=np.float64))
    accepted, emitted = (put(np.zeros(n, np.int32), device) for _ in range(2))
    got = get(
        ops.verify_draft(
            put(np.tile(draft, (n, 1, 1)), device),
            put(ids[:, None], device),
            put(np.tile(target, (n, 1, 1)), device),
            accepted=accepted,
            emitted=emitted,
            seed=77,
            offset=8,
            row_streams=True,
        )
    )
    wanted = target[0].astype(np.float64) / target[0].sum(-1, keepdims=True, dtype=np.float64)
    assert_distributed(got[:, 0], wanted[0])
    kept = got[:, 1] >= 0
    assert_distributed(got[kept, 1], wanted[1])
    np.testing.assert_array_equal(get(emitted), kept)
    np.testing.assert_array_equal(get(accepted), kept)
    np.testing.assert_array_equal(got[kept, 0], ids[kept])
    rate = np.minimum(draft[0, 0], target[0, 0]).sum()
    assert abs(kept.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)


def test_draws_of_a_chain_are_philox_counters(device, rng):
    """Token by token, by the reference's own generator; each row with its own seed and offset."""
    n, steps, vocab = 8, 3, 50
    draft = np.float32(rng.dirichlet(np.ones(vocab), (n, steps)))
    target = np.float32(rng.dirichlet(np.ones(vocab), (n, steps + 1)))
    ids = rng.integers(0, vocab, (n, steps)).astype(np.int32)
    seeds, offsets = rng.integers(0, 2**62, n), rng.integers(0, 2**40, n)
    got = get(
        ops.verify_draft(
            put(draft, device),
            put(ids, device),
            put(target, device),
            seed=put(seeds, device),
            offset=put(offsets.astype(np.uint64), device),
        )
    )
    for row in range(n):
        numbers = [
            reference.philox_uniform(int(seeds[row]), int(offsets[row]), draw=i)
            for i in range(steps + 1)
        ]
        want = []
        for i in range(steps):
            q, p = (x[row, i, ids[row, i]].astype(np.float64) for x in (draft, target))
            if numbers[i] * q >= p:
                left = np.maximum(target[row, i].astype(np.float64) - draft[row, i], 0)
                break
            want.append(ids[row, i])
        else:
            left = target[row, steps].astype(np.float64)
        want.append(np.searchsorted(np.cumsum(left / left.sum()), numbers[-1], side="right"))
        np.testing.assert_array_equal(got[row], want + [-1] * (steps + 1 - len(want)))


def test_drafts_that_cannot_be_verified(device):
    draft = np.full((3, 1, 4), 0.25, np.float32)
    target = np.full((3, 2, 4), 0.25, np.float32)
    target[1, 0] = 0
    ids = np.array([[0], [1], [2]], np.int32)
    if device == "cpu":
        with pytest.raises(ArgumentError, match="target_probs: .*row 1"):
            ops.verify_draft(draft, ids, target)
        with pytest.raises(ArgumentError, match="draft_token_ids: 4 in row 2"):
            ops.verify_draft(draft, np.array([[0], [1], [4]]), target)
        return
    ids[2] = 4
    got = get(ops.verify_draft(put(draft, device), put(ids, device), put(target, device)))
    np.testing.assert_array_equal(got[1], [-1, -1])
    assert 0 <= got[2, 0] < 4 and got[2, 1] == -1 and (got[0] >= 0).all()


P = np.full((2, 4), 0.25, np.float32)
DRAFT, TARGET = np.full((2, 3, 4), 0.25, np.float32), np.full((2, 4, 4), 0.25, np.float32)
IDS = np.zeros((2, 3), np.int32)
BAD_CALLS = [
    (lambda: ops.verify_draft(DRAFT, IDS, DRAFT), ShapeError, "target_probs"),
    (lambda: ops.verify_draft(DRAFT, IDS[:, :2], TARGET), ShapeError, "draft_token_ids"),
    (lambda: ops.verify_draft(DRAFT, IDS, TARGET.astype(np.float16)), DTypeError, "target_probs"),
    (lambda: ops.verify_draft(DRAFT, P, TARGET), DTypeError, "draft_token_ids: .*float32"),
    (lambda: ops.verify_draft(DRAFT, IDS, TARGET, accepted=P[:, 0]), DTypeError, "accepted"),
    (lambda: ops.verify_draft(DRAFT, IDS, TARGET, emitted=IDS[0]), ShapeError, "emitted"),
    (lambda: ops.verify_draft(DRAFT, IDS, TARGET, seed=IDS[0]), (ShapeError, DTypeError), "seed"),
    (lambda: ops.verify_draft(DRAFT, IDS, TARGET, offset="x"), DTypeError, "offset"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_name_the_argument(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()
