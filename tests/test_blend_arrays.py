"""Arrays and arguments of raddle.blend: any layout, and every one that cannot be.

Needs: numpy.
"""

import numpy
import pytest
from raddle.blend import Requests, simulate
from raddle.errors import ArgumentError, DTypeError, ShapeError

from tests.blend_cases import (
    BLOCK,
    COST,
    POOL,
    arrays_of,
    hits_in_order,
    make,
    numbers,
    random_rows,
    run,
)


def test_layouts_and_dtypes():
    """However the arrays lie in memory, what they say is the same."""
    rows = random_rows(9, 80)
    arrays = {**arrays_of(rows), "sources": numpy.arange(80) % 5}
    expected = numbers(run(Requests(**arrays)))

    def every_second(a):
        return numpy.repeat(a, 2)[::2]

    def backwards(a):
        return a[::-1].copy()[::-1]

    def column(a):
        return numpy.stack([a, a * 0 + 9], axis=1)[:, 0]

    def read_only(a):
        a = a.copy()
        a.flags.writeable = False
        return a

    def other_width(a):
        return a.astype({"int32": "int64", "int64": "int32", "uint64": "int64"}[str(a.dtype)])

    for change in (every_second, backwards, column, read_only, other_width):
        changed = {k: v if k == "block_size" else change(v) for k, v in arrays.items()}
        assert numbers(run(Requests(**changed))) == expected, change.__name__


def test_tokens_are_ids():
    """Prompts as tokens share what prompts as ids of the same blocks share."""
    rows = random_rows(10, 60)
    prompts = []
    for i, (length, _, ids) in enumerate(rows):
        blocks = [numpy.full(BLOCK, x) for x in ids] + [1000 + i + numpy.arange(length)]
        prompts.append(numpy.concatenate(blocks)[:length])
    indptr = numpy.concatenate([[0], numpy.cumsum([len(p) for p in prompts])])
    outputs = arrays_of(rows)["output_lengths"]
    tokens = numpy.concatenate(prompts)
    expected = hits_in_order(rows, range(60))
    for own in (tokens, tokens.astype(numpy.int32), numpy.repeat(tokens, 3)[::3]):
        requests = Requests(block_size=BLOCK, tokens=own, indptr=indptr, output_lengths=outputs)
        assert requests.prompt_tokens == len(tokens)
        found = run(requests, "fcfs", 10**7)
        assert found["hit_tokens"] == expected


def test_high_ids_and_repeated_ids():
    top = 2**64 - 1
    rows = [(2 * BLOCK, 1, [top, 0]), (2 * BLOCK, 1, [top, top]), (2 * BLOCK, 1, [0, top])]
    assert make(rows).distinct_blocks == 5
    signed = arrays_of(rows)["hash_ids"].view(numpy.int64)
    assert make(rows, hash_ids=signed).distinct_blocks == 5


THREE = [(130, 4, [1, 2]), (64, 4, [1]), (7, 4, [])]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(input_lengths=numpy.array([130, 64])), ArgumentError, "indptr"),
        (dict(input_lengths=numpy.array([[130, 64, 7]])), ShapeError, "input_lengths"),
        (dict(input_lengths=numpy.array([130, -64, 7])), ArgumentError, "input_length.*request 1"),
        (dict(input_lengths=numpy.array([130, 0, 7])), ArgumentError, "input_length.*request 1"),
        (dict(input_lengths=numpy.array([127, 64, 7])), ArgumentError, "hash_ids.*request 0"),
        (dict(input_lengths=numpy.array([130, 64, 2**40])), ArgumentError, "lengths.*position 2"),
        (dict(input_lengths=numpy.array([130, 64, 2**31 - 1])), ArgumentError, "max_tokens"),
        (dict(input_lengths=numpy.array([130.0, 64, 7])), DTypeError, "input_lengths.*float64"),
        (dict(input_lengths=numpy.array([130, 64, 7], numpy.int16)), DTypeError, "int16"),
        (dict(input_lengths=numpy.array([130, 64, 7], ">i4")), DTypeError, "byte order"),
        (dict(input_lengths=[130, 64, 7]), DTypeError, "input_lengths"),
        (dict(input_lengths=None), ArgumentError, "input_lengths"),
        (dict(output_lengths=numpy.array([4, 4])), ShapeError, "output_lengths"),
        (dict(output_lengths=numpy.array([4, 0, 4])), ArgumentError, "output_length.*request 1"),
        (dict(output_lengths=numpy.array([4, 4, -2])), ArgumentError, "output_length.*request 2"),
        (dict(output_lengths=numpy.array([4, 4, -(2**40)])), ArgumentError, "output_lengths"),
        (dict(max_tokens=numpy.array([4, 3, 4])), ArgumentError, "output_length.*request 1"),
        (dict(max_tokens=numpy.array([4, 4, 0])), ArgumentError, "max_tokens.*request 2"),
        (dict(max_tokens=numpy.array([4])), ShapeError, "max_tokens"),
        (dict(sources=numpy.array([0, -1, 0])), ArgumentError, "source.*request 1"),
        (dict(sources=numpy.array([0, 2**30, 0])), ArgumentError, "source.*request 1"),
        (dict(weights=numpy.array([1, 1, 1])), DTypeError, "weights"),
        (dict(weights=numpy.array([1, 0, 1], numpy.float32)), ArgumentError, "weight.*request 1"),
        (dict(weights=numpy.array([1, 1, numpy.nan], numpy.float32)), ArgumentError, "weight"),
        (dict(weights=numpy.array([1, 1], numpy.float32)), ShapeError, "weights"),
        (dict(hash_ids=numpy.array([1, 2, 1], numpy.int32)), DTypeError, "hash_ids.*uint64"),
        (dict(hash_ids=numpy.array([1.0, 2, 1])), DTypeError, "hash_ids"),
        (dict(hash_ids=numpy.array([1, 2])), ArgumentError, "indptr"),
        (dict(hash_ids=numpy.array([1, 2, 1, 1])), ArgumentError, "indptr.*last offset"),
        (dict(hash_ids=None), ArgumentError, "indptr: expected None"),
        (dict(indptr=None), ArgumentError, "indptr"),
        (dict(indptr=numpy.array([0, 2, 3])), ShapeError, "indptr"),
        (dict(indptr=numpy.array([0, 2, 1, 3])), ArgumentError, "indptr.*ascending"),
        (dict(indptr=numpy.array([1, 2, 3, 3])), ArgumentError, "indptr.*first offset"),
        (dict(indptr=numpy.array([0, 2, 3, 2**62])), ArgumentError, "indptr.*ascending"),
        (dict(indptr=numpy.array([0, -5, 3, 3])), ArgumentError, "indptr.*ascending"),
        (dict(tokens=numpy.arange(3)), ArgumentError, "tokens"),
        (dict(block_size=0), ArgumentError, "block_size"),
        (dict(block_size=2**31), ArgumentError, "block_size"),
        (dict(block_size="64"), DTypeError, "block_size"),
        (dict(custom_ids=["a"]), ArgumentError, "custom_ids"),
    ],
)  # fmt: skip
def test_bad_arrays(changes, error, words):
    with pytest.raises(error, match=words):
        make(THREE, **changes)


def test_bad_tokens():
    good = dict(block_size=2, tokens=numpy.arange(5), indptr=numpy.array([0, 2, 5]))
    assert Requests(**good).num_requests == 2
    for changes, error, words in (
        (dict(input_lengths=numpy.array([2, 3])), ArgumentError, "input_lengths"),
        (dict(tokens=numpy.array([0, 1, 2, 3, 2**31])), ArgumentError, "tokens.*position 4"),
        (dict(tokens=numpy.arange(5, dtype=numpy.uint32)), DTypeError, "tokens"),
        (dict(indptr=numpy.array([0, 2, 2, 5])), ArgumentError, "input_length.*request 1"),
        (dict(indptr=numpy.zeros(0, numpy.int64)), ShapeError, "indptr"),
        (dict(indptr=numpy.array([0, 2, 6])), ArgumentError, "indptr"),
    ):
        with pytest.raises(error, match=words):
            Requests(**{**good, **changes})


# -- arguments of a run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(policy="best"), ArgumentError, "policy: expected one of fcfs.*got best"),
        (dict(policy=3), DTypeError, "policy"),
        (dict(pool_tokens=0), ArgumentError, "pool_tokens"),
        (dict(pool_tokens=2**70), ArgumentError, "pool_tokens"),
        (dict(pool_tokens=1e6), DTypeError, "pool_tokens"),
        (dict(pool_tokens=133), ArgumentError, "memory: request 0 .*134 tokens"),
        (dict(step_tokens=0), ArgumentError, "step_tokens"),
        (dict(step_tokens=2**31), ArgumentError, "step_tokens"),
        (dict(seed=-1), ArgumentError, "seed"),
        (dict(seed=None), DTypeError, "seed"),
        (dict(lengths="all"), ArgumentError, "lengths"),
        (dict(lengths="sample", sample_rate=2), ArgumentError, "sample_rate"),
    ],
)
def test_bad_runs(changes, error, words):
    requests = make(THREE)
    with pytest.raises(error, match=words):
        simulate(requests, COST, **{"pool_tokens": POOL, **changes})


def test_bad_seen_lengths():
    requests = make([(5, 4, []), (5, 4, [])])
    for seen, words in (([0, 4], "got 0"), ([4, 5], "got 5"), ([4, -2], "got -2")):
        with pytest.raises(ArgumentError, match=f"seen: .*{words}"):
            run(requests, seen=numpy.array(seen))
    with pytest.raises(ShapeError, match="seen"):
        run(requests, seen=numpy.array([4]))
    with pytest.raises(DTypeError, match="seen"):
        run(requests, seen=numpy.array([4.0, 4.0]))
    assert run(requests, seen=numpy.array([-1, 4], numpy.int64))["seconds"] > 0
