"""raddle.blend on random trees: what holds for every policy, whatever the requests, the pool, the
machine, what is known of outputs, and what the engine does with them.

Needs: numpy.
"""

import functools
import math

import numpy
import pytest
from raddle.blend import CostModel, Requests, Scheduler, order, policy_names
from raddle.errors import ArgumentError, RaddleError, StateError

from tests.blend_cases import COST
from tests.blend_engine import Engine
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


def check_bound(own, surveyed, seconds, preemptions):
    """No run takes less. One that steps back gives its next token at the end of its prompt, where
    the cost model has no reading: so much less may be read."""
    work, least = surveyed
    work = work - (0, 0, preemptions * own.pool)
    work[2] = max(work[2], 0)
    assert seconds >= reference.bound_seconds(own.cost, work, least) * (1 - 1e-6)


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
        check_bound(own, survey(seed), found["seconds"], found["preemptions"])
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


# -- a driven scheduler -------------------------------------------------------------------------


def drive(own, policy, kind=Engine, pool=None, seed=0, **options):
    return kind(
        own.rows,
        own.pool if pool is None else pool,
        own.step_tokens,
        block=own.block,
        cost=own.cost,
        policy=policy,
        seed=seed,
        **{"requests": own.requests(), **options},
    )


COUNTED = (
    "steps",
    "hit_tokens",
    "computed_tokens",
    "recomputed_tokens",
    "preemptions",
    "peak_tokens",
)


def check_books(engine):
    """The scheduler counts what the engine does; every token was given, each but once."""
    counts, rows = engine.scheduler.counts(), engine.rows
    assert counts["done"] == len(rows) == len(engine.ended) and engine.scheduler.done
    assert counts["running"] == counts["decoding"] == 0
    for name, own in (
        ("steps", len(engine.steps)),
        ("hit_tokens", engine.hits),
        ("computed_tokens", engine.tokens),
        ("recomputed_tokens", engine.again),
        ("preemptions", engine.preemptions),
    ):
        assert counts[name] == own, name
    needed = sum(row[0] for row in rows) - engine.hits + sum(engine.given) - len(rows)
    assert engine.tokens == needed + engine.again


@pytest.mark.parametrize("is_known", [True, False])
def test_driven_as_simulated(policy, is_known):
    """Step by step in Python, where the books are kept twice, or behind the clock in C."""
    for seed in range(2000, 2010):
        own = small_case(seed)
        seen = None if is_known else seen_of(own, seed)
        options = {} if is_known else dict(lengths="guess", seen=seen)
        engine = drive(own, policy, seed=seed, **options).run()
        check_books(engine)
        assert engine.given == own.outputs
        found = own.simulate(own.requests(), policy, seed=seed, seen=seen)
        counts = engine.scheduler.counts()
        assert {name: counts[name] for name in COUNTED} == {name: found[name] for name in COUNTED}
        assert engine.seconds == pytest.approx(found["seconds"], rel=1e-9)


class Foreign(Engine):
    """An engine of somebody else's: retires in any order and by any kind of sequence, ends requests
    when it likes, and calls what it must not."""

    def __init__(self, rows, *args, seed=0, truth=None, misuse=True, **options):
        super().__init__(rows, *args, seed=seed, **options)
        self.rng = numpy.random.default_rng(seed)
        self.truth = [row[1] for row in rows] if truth is None else truth
        self.misuse = misuse

    def is_over(self, request):
        return self.given[request] == self.truth[request]

    def begin(self):
        if self.misuse and self.rng.random() < 0.1:
            self.refuse(StateError, [])
        step, gave = super().begin()
        if self.misuse and self.rng.random() < 0.2:
            with pytest.raises(StateError):
                self.scheduler.step()
            some = sorted(gave)
            for bad in self.bad_names(some):
                self.refuse(ArgumentError, bad)
        return step, gave

    def bad_names(self, gave):
        """Each behind some that might be retired."""
        others = sorted(set(range(len(self.rows))) - set(gave))
        bad = [-1, len(self.rows), 2**31 - 1, -(2**31), 2**40]
        bad += [others[int(self.rng.integers(0, len(others)))]] if others else []
        head = gave[: int(self.rng.integers(0, len(gave) + 1))]
        yield from ([*head, name] for name in bad)
        if gave:
            yield [*gave, gave[0]][-len(self.rows) :] if len(gave) == 1 else [gave[0], *gave[:-1]]

    def refuse(self, error, ended):
        before = self.scheduler.counts()
        with pytest.raises(error):
            self.scheduler.retire(ended)
        assert self.scheduler.counts() == before

    def end(self, gave, as_array=False):
        ended = self.rng.permutation([i for i in gave if self.is_over(i)]).astype(int).tolist()
        kind = int(self.rng.integers(0, 4))
        if kind == 0:
            ended = tuple(ended)
        elif kind == 1:
            ended = numpy.array(ended, numpy.int64)[::-1]
        elif kind == 2:
            ended = numpy.repeat(numpy.array(ended, numpy.int32), 2)[::2]
        self.retire(ended)


@pytest.mark.parametrize("is_known", [True, False])
def test_any_order_of_retiring(policy, is_known):
    """Whose prefix was used last is all that it says: where nothing is evicted, it says nothing."""
    for seed in range(2100, 2104):
        own = small_case(seed)
        options = {} if is_known else dict(lengths="guess", seen=seen_of(own, seed))
        engine = drive(own, policy, Foreign, seed=seed, **options).run()
        check_books(engine)
        assert engine.given == own.outputs
        roomy = drive(own, policy, Foreign, ROOMY, seed=seed, **options).run()
        plain = drive(own, policy, Engine, ROOMY, seed=seed, **options).run()
        assert roomy.steps == plain.steps
        assert roomy.scheduler.counts() == plain.scheduler.counts()


@pytest.mark.parametrize("lengths", ["known", "guess"])
def test_outputs_that_are_not_what_was_said(policy, lengths):
    """Shorter than thought, or longer than max_tokens, as long as they fit into the pool."""
    for seed in range(2200, 2205):
        own, rng = small_case(seed), numpy.random.default_rng(seed)
        truth = []
        for (prompt, output, _), most in zip(own.rows, own.most or own.outputs, strict=True):
            odds = [output, 1, max(output // 2, 1), most + 1, 3 * most + 70]
            wanted = int(rng.choice(odds, p=[0.3, 0.2, 0.2, 0.15, 0.15]))
            truth.append(max(min(wanted, own.pool - prompt), 1))
        engine = drive(own, policy, Foreign, seed=seed, lengths=lengths, truth=truth).run()
        check_books(engine)
        assert engine.given == truth
        rows = [(row[0], t, row[2]) for row, t in zip(own.rows, truth, strict=True)]
        surveyed = reference.survey(rows, own.block, own.pool, own.step_tokens)
        check_bound(own, surveyed, engine.seconds, engine.preemptions)


def test_an_output_larger_than_the_pool(policy):
    """One that never ends stops the run with an error, again and again; the others are as they
    were, and those behind it wait: what stepped back comes first."""
    for seed in range(2300, 2304):
        own = small_case(seed)
        need = max(prompt + output for prompt, output, _ in own.rows)
        engine = drive(own, policy, Foreign, need + 9, seed=seed, misuse=False)
        endless = int(engine.rng.integers(0, len(own.rows)))
        engine.truth[endless] = 10**9
        with pytest.raises(StateError, match=r"none of the \d+ requests that are left"):
            for _ in range(10**5):
                engine.end(engine.begin()[1])
        assert endless not in engine.ended and engine.whole(endless) > engine.pool
        counts = engine.scheduler.counts()
        for call in (engine.scheduler.step, lambda engine=engine: engine.scheduler.retire([])):
            with pytest.raises(StateError):
                call()
        assert engine.scheduler.counts() == counts and counts["done"] == len(engine.ended)
        given = [engine.scheduler.generated(i) for i in range(len(own.rows))]
        assert given == engine.given


def test_steps_cost_what_the_model_says():
    for seed in range(2400, 2420):
        own = small_case(seed)
        engine = drive(own, "fcfs")
        while not engine.scheduler.done:
            step, gave = engine.begin()
            seconds = reference.step_seconds(own.cost, (step.tokens, step.scores, step.reads))
            assert step.seconds == pytest.approx(float(seconds), rel=1e-9)
            engine.end(gave)


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


def test_a_pool_that_is_a_token_short(policy):
    for seed in range(2500, 2520):
        own = small_case(seed)
        need = max(prompt + output for prompt, output, _ in own.rows)
        with pytest.raises(RaddleError, match=f"memory: request .* may take {need} tokens"):
            own.simulate(own.requests(), policy, pool=need - 1)
        assert own.simulate(own.requests(), policy, pool=need)["peak_tokens"] <= need
