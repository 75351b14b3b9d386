"""raddle.blend.Scheduler on random trees, driven by engines that are not as it thinks: it agrees
with the simulator where they are, and keeps its books where they are not.

Needs: numpy.
"""

import numpy
import pytest
from raddle.blend import policy_names
from raddle.errors import ArgumentError, DTypeError, StateError

from tests.blend_engine import Engine, Foreign, check_books
from tests.blend_trees import seen_of, small_case
from tests.reference import blend as reference

ROOMY = 10**7
COUNTED = (
    "steps",
    "hit_tokens",
    "computed_tokens",
    "recomputed_tokens",
    "preemptions",
    "peak_tokens",
)


@pytest.fixture(params=policy_names())
def policy(request):
    return request.param


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
        least = reference.least_seconds(own.cost, surveyed, engine.preemptions, own.pool)
        assert engine.seconds >= least * (1 - 1e-6)


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


class Careful(Engine):
    """Knows when each that runs will end, and what all will hold until then."""

    def admit(self, request, begin):
        super().admit(request, begin)
        if len(self.computed) == 1:
            return  # alone it always may
        own = numpy.array([self.own(i) for i in self.computed])
        left = numpy.array([self.rows[i][1] - self.given[i] for i in self.computed])
        steps = numpy.arange(left.max())[:, None]  # as if prompts were computed at once
        held = ((own + steps) * (steps < left)).sum(axis=1)
        assert held.max() + self.memory.num_read * self.block <= self.pool


def test_who_begins_has_room_to_its_end(policy):
    """With outputs known, nobody is admitted into a pool that would overflow before the first of
    them ends, or any other."""
    for seed in range(2600, 2612):
        drive(small_case(seed), policy, Careful, seed=seed).run()


class Shrinking(Foreign):
    """Somebody else takes and gives back memory all the time."""

    def free_tokens(self):
        # What gave a token has no room for it yet: the next step makes it.
        held = self.least_held() - len(self.decoding)
        reading = set(self.computed) - self.decoding
        self.read_before = sum(self.own(i) for i in reading)
        self.read_before += self.block * len({at for i in reading for at in self.memory.paths[i]})
        left = self.pool - held
        kind = self.rng.integers(0, 4)
        free = None if kind == 0 else [0, int(self.rng.integers(0, left + 1)), 10**9][kind - 1]
        self.room = held + min(left, left if free is None else free)
        return free

    def begin(self):
        before = set(self.computed)
        step, gave = super().begin()
        assert self.scheduler.counts()["held_tokens"] <= max(self.room, self.read_before)
        assert self.room >= self.read_before or set(self.computed) <= before
        self.was_held_up = getattr(self, "was_held_up", 0) + (step.tokens == 0)
        return step, gave


@pytest.mark.parametrize("lengths", ["known", "guess"])
def test_memory_that_comes_and_goes(policy, lengths):
    """Only prompts that are being read run in room that is gone; all come to an end."""
    held_up = preemptions = 0
    for seed in range(2700, 2703):
        own = small_case(seed)
        engine = drive(own, policy, Shrinking, seed=seed, lengths=lengths).run()
        check_books(engine)
        assert engine.given == own.outputs
        held_up, preemptions = held_up + engine.was_held_up, preemptions + engine.preemptions
    assert held_up > 0 and preemptions > 0


def test_free_tokens_that_the_pool_has_anyway(policy):
    for seed in range(2800, 2804):
        own = small_case(seed)
        plain = drive(own, policy, seed=seed).run()
        told = drive(own, policy, seed=seed)
        told.free_tokens = lambda: 10**12
        assert told.run().steps == plain.steps


@pytest.mark.parametrize("policy", ["fcfs", "dfs", "lpm"])
def test_less_memory_is_a_smaller_pool(policy):
    for seed in range(2900, 2906):
        own = small_case(seed)
        small = drive(own, policy, seed=seed).run()
        told = drive(own, policy, pool=3 * own.pool, seed=seed)
        told.free_tokens = lambda told=told, pool=own.pool: (
            pool - told.least_held() + len(told.decoding)
        )
        assert told.run().steps == small.steps


@pytest.mark.parametrize(
    ("free", "error"),
    [(-1, ArgumentError), (2**63, ArgumentError), (1.5, DTypeError), ("1", DTypeError)],
)
def test_bad_free_tokens(free, error):
    engine = drive(small_case(1), "fcfs")
    with pytest.raises(error, match="free_tokens: expected"):
        engine.scheduler.step(free)
    check_books(engine.run())


def test_steps_cost_what_the_model_says():
    for seed in range(2400, 2420):
        own = small_case(seed)
        engine = drive(own, "fcfs")
        while not engine.scheduler.done:
            step, gave = engine.begin()
            seconds = reference.step_seconds(own.cost, (step.tokens, step.scores, step.reads))
            assert step.seconds == pytest.approx(float(seconds), rel=1e-9)
            engine.end(gave)
