"""raddle.blend on random trees: what holds for every policy, whatever the requests, the pool, the
machine, and what is known of outputs.

Needs: numpy.
"""

import functools
import math
import resource
from pathlib import Path

import numpy
import pytest
from raddle.blend import CostModel, Requests, Scheduler, order, policy_names
from raddle.errors import ArgumentError, RaddleError

from tests import fuzz_blend
from tests.blend_cases import COST
from tests.blend_trees import case, seen_of, small_case
from tests.reference import blend as reference

ROOMY = 10**7
case, small_case = functools.cache(case), functools.cache(small_case)


@pytest.fixture(params=policy_names())
def policy(request):
    return request.param


def found_by(own, order):
    """Tokens that requests find in this order, when nothing is forgotten."""
    paths, prompts = [row[2] for row in own.rows], [row[0] for row in own.rows]
    return sum(reference.found_in_order(paths, own.block, prompts, order).values())


@functools.cache
def most_found(seed):
    own = case(seed)
    paths, prompts = [row[2] for row in own.rows], [row[0] for row in own.rows]
    return reference.most_found(paths, own.block, prompts)[0]


@functools.cache
def survey(seed):
    own = case(seed)
    return reference.survey(own.rows, own.block, own.pool, own.step_tokens)


# -- simulated runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [True, False])
def test_runs(policy, is_known):
    """Every token is computed once, but for those that are found and those that are computed again;
    nothing is found that one walk through the tree would not find; the pool is never overfull; the
    bound is not beaten; the same seed does the same."""
    for seed in range(90):
        own = case(seed)
        requests, count = own.requests(), len(own.rows)
        seen = None if is_known else seen_of(own, seed)
        prompts, outputs = (sum(row[k] for row in own.rows) for k in (0, 1))
        found = own.simulate(requests, policy, seed=seed, seen=seen)
        assert (found["prompt_tokens"], found["output_tokens"]) == (prompts, outputs)
        needed = prompts - found["hit_tokens"] + outputs - count
        assert found["computed_tokens"] == needed + found["recomputed_tokens"]
        assert 0 <= found["hit_tokens"] <= most_found(seed) <= requests.shared_tokens
        assert max(p + o for p, o, _ in own.rows) - 1 <= found["peak_tokens"] <= own.pool
        work, least = survey(seed)
        bound = reference.bound_seconds(own.cost, work, least)
        assert found["bound_seconds"] == pytest.approx(bound, rel=1e-5)
        least_seconds = reference.least_seconds(
            own.cost, survey(seed), found["preemptions"], own.pool
        )
        assert found["seconds"] >= least_seconds * (1 - 1e-6)
        assert found["steps"] >= math.ceil(least * (1 - 1e-6))
        assert found["steps"] >= max(own.outputs)
        assert (found["recomputed_tokens"] > 0) <= (found["preemptions"] > 0)
        again = own.simulate(own.requests(), policy, seed=seed, seen=seen)
        assert again == found


def test_what_is_known_needs_no_steps_back(policy):
    """With outputs known, and steps that have room for prompts, the peak that is forecast holds."""
    for seed in range(60):
        own = case(seed)
        found = own.simulate(own.requests(), policy, pool=ROOMY * 10)
        assert found["preemptions"] == found["recomputed_tokens"] == 0


def test_with_room_for_all_the_tree_is_walked_once():
    """All sharing that there is, for every order: what was computed stays while someone waits."""
    for seed in range(60):
        own = case(seed)
        requests, walk = own.requests(), reference.Trie([row[2] for row in own.rows]).order()
        assert order(requests, own.cost, "dfs", pool_tokens=own.pool).tolist() == walk
        for name in ("dfs", "fcfs", "random"):
            indices = order(requests, own.cost, name, pool_tokens=own.pool, seed=seed).tolist()
            found = own.simulate(requests, name, pool=ROOMY * 10, seed=seed)
            assert found["hit_tokens"] == found_by(own, indices)


def test_orders(policy):
    """Each request once; the same for the same seed, merged or not."""
    for seed in range(60):
        own = case(seed)
        options = dict(pool_tokens=own.pool, step_tokens=own.step_tokens, seed=seed)
        for merged in (True, False):
            found = [
                order(own.requests(), own.cost, policy, merged=merged, **options) for _ in range(2)
            ]
            assert sorted(found[0].tolist()) == list(range(len(own.rows)))
            assert (found[0] == found[1]).all()


def test_seeds_matter():
    """To random, and to nothing else."""
    own = case(3, most_requests=80)
    requests = own.requests()
    for name in policy_names():
        orders = {
            tuple(order(requests, own.cost, name, pool_tokens=own.pool, seed=seed).tolist())
            for seed in range(8)
        }
        assert len(orders) == (8 if name == "random" else 1)


def test_weights_and_sources_are_no_order(policy):
    """Of those that are known, weights and sources change nothing."""
    for seed in range(20):
        own = case(seed)
        found = own.simulate(own.requests(), policy, seed=1)
        other = own.requests(weights=None, sources=None, max_tokens=None)
        assert own.simulate(other, policy, seed=1) == found


def test_what_is_thought_may_not_fit():
    """Where output lengths that are guessed might be more than the pool holds, and are not."""
    for seed in range(40):
        rng = numpy.random.default_rng(seed)
        outputs = rng.integers(1, 9, 20)
        outputs[-1] = 40
        requests = Requests(
            block_size=1,
            input_lengths=numpy.full(20, 50, numpy.int32),
            output_lengths=outputs.astype(numpy.int32),
            max_tokens=numpy.full(20, 1000, numpy.int32),
        )
        seen = numpy.where(numpy.arange(20) == 3, outputs, -1) if seed % 2 else numpy.full(20, -1)
        for name in policy_names():
            found = requests._core.simulate(name, COST.to_dict(), 90, 64, 0, seen)
            assert found["peak_tokens"] <= 90 and found["output_tokens"] == outputs.sum()


def test_a_prompt_found_whole():
    """One token is computed again, unless that prompt comes before the one that goes on: two
    tokens are enough for both, which is what the bound says."""
    cost = CostModel(1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
    seconds = []
    for lengths in ([2, 1], [1, 2]):
        requests = Requests(
            block_size=1,
            input_lengths=numpy.array(lengths, numpy.int32),
            output_lengths=numpy.array([1, 1], numpy.int32),
            hash_ids=numpy.array([7, 7], numpy.uint64),
            indptr=numpy.array([0, 1, 2]),
        )
        found = requests._core.simulate("fcfs", cost.to_dict(), 10, 8, 0, None)
        assert found["bound_seconds"] == pytest.approx(2)
        seconds.append(found["seconds"])
    assert seconds == [3, 2]


# -- sizes that cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [-1, 0, -(2**63), 2**62, 2**70])
@pytest.mark.parametrize("name", ["pool_tokens", "step_tokens"])
def test_limits_that_cannot_be(name, pool):
    own = small_case(1)
    options = {"pool_tokens": own.pool, "step_tokens": own.step_tokens, name: pool}
    with pytest.raises(ArgumentError, match=name):
        Scheduler(own.requests(), own.cost, **options)
    with pytest.raises(ArgumentError, match=name):
        order(own.requests(), own.cost, **options)


def test_an_output_without_measure():
    """Is refused before anything is as long as it is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    requests = Requests(
        block_size=16,
        input_lengths=numpy.array([5], numpy.int32),
        output_lengths=numpy.array([2**31 - 10]),
    )
    limit = pages * resource.getpagesize() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        for name in policy_names():
            with pytest.raises(ArgumentError, match="memory: request 0 may take 2147483643 tokens"):
                requests._core.simulate(name, COST.to_dict(), 10**6, 64, 0, None)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_pool_that_is_a_token_short(policy):
    for seed in range(2500, 2520):
        own = small_case(seed)
        need = max(prompt + output for prompt, output, _ in own.rows)
        with pytest.raises(RaddleError, match=f"memory: request .* may take {need} tokens"):
            own.simulate(own.requests(), policy, pool=need - 1)
        assert own.simulate(own.requests(), policy, pool=need)["peak_tokens"] <= need


# -- lines that nobody should write ---------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_malformed_lines(seed):
    """Some of what tests/fuzz_blend.py does at length."""
    found = []
    failures = fuzz_blend.fuzz(range(2000), seed, found.append)
    assert failures == 0, "\n".join(found)
