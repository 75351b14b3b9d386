"""raddle.blend.Scheduler, driven by an engine in plain Python that keeps its own books.

Needs: numpy.
"""

import gc
import sys
import threading

import numpy
import pytest
from raddle import _core
from raddle.blend import Scheduler, Step, policy_names
from raddle.errors import ArgumentError, DTypeError, ShapeError, StateError

from tests.blend_cases import COST, POOL, make, random_rows, run
from tests.blend_engine import Engine

UNKNOWN = {"output_lengths": None}


def with_limits(rows):
    """Requests that say no more of their outputs than what they may be at most."""
    most = numpy.full(len(rows), max(output for _, output, _ in rows), numpy.int32)
    return make(rows, max_tokens=most, **UNKNOWN)


# -- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("kind", ["known", "guess", "unknown"])
def test_books_agree(policy, kind):
    for seed, pool in ((0, 2_000), (1, 4_000), (2, POOL), (3, 10**7)):
        rows = random_rows(seed, 120)
        requests = with_limits(rows) if kind == "unknown" else None
        lengths = "known" if kind == "known" else "guess"
        engine = Engine(rows, pool, policy=policy, requests=requests, lengths=lengths).run()
        counts = engine.scheduler.counts()
        assert engine.given == [output for _, output, _ in rows]
        assert counts["steps"] == len(engine.steps) and counts["done"] == len(rows)
        assert counts["running"] == counts["decoding"] == 0
        assert counts["computed_tokens"] == engine.tokens
        assert counts["hit_tokens"] == engine.hits
        assert counts["preemptions"] == engine.preemptions
        assert counts["recomputed_tokens"] == engine.again
        assert 0 < counts["peak_tokens"] <= pool
        prompts, outputs = (sum(row[i] for row in rows) for i in (0, 1))
        assert engine.tokens == prompts - engine.hits + outputs - len(rows) + engine.again
        assert kind != "known" or pool != 10**7 or engine.preemptions == 0


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("sampled", [False, True])
def test_as_simulated(policy, sampled):
    """The same scheduler told of the same ends, by a clock in C or by hand."""
    rows = random_rows(7, 200)
    requests = make(rows)
    seen, options = None, {}
    if sampled:
        chosen = requests.sample(0.05, quota=5)
        seen = numpy.full(len(rows), -1, numpy.int32)
        seen[chosen] = requests.output_lengths[chosen]
        options = dict(lengths="guess", seen=seen)
    for pool in (3_000, POOL):
        found = run(requests, policy, pool, seen=seen)
        engine = Engine(rows, pool, policy=policy, requests=requests, **options).run()
        counts = engine.scheduler.counts()
        for name in ("steps", "hit_tokens", "computed_tokens", "preemptions", "peak_tokens"):
            assert counts[name] == found[name], name
        assert engine.seconds == pytest.approx(found["seconds"], rel=1e-9)


def test_preemption():
    """Outputs outlive what was thought of them: the newest step back, and lose no token by it."""
    rows = [(64, 2, [i]) for i in range(60)] + [(64, 500, [100 + i]) for i in range(60)]
    engine = Engine(rows, 3_000, policy="fcfs", lengths="guess").run()
    assert engine.preemptions > 0 and engine.again > 0
    back = [i for preempted, _, _ in engine.steps for i in preempted]
    firsts = [c[0] for _, chunks, _ in engine.steps for c in chunks if c[3]]
    assert len(firsts) == len(rows) + len(back)
    assert engine.given == [output for _, output, _ in rows]


def test_same_seed_same_steps():
    rows = random_rows(4, 100)

    def steps(seed):
        return Engine(rows, 4_000, policy="random", lengths="guess", seed=seed).run().steps

    assert steps(3) == steps(3) != steps(4)


def test_no_requests_and_nothing_left():
    assert Engine([]).scheduler.done
    for engine in (Engine([]), Engine([(5, 1, [])]).run()):
        done = engine.scheduler.counts()["done"]
        step, gave = engine.begin()
        assert (step.tokens, gave, len(step.preempted)) == (0, set(), 0)
        engine.scheduler.retire([])
        assert engine.scheduler.done and engine.scheduler.counts()["done"] == done


def test_arrays_are_copies():
    """They stay as they are, whatever becomes of the scheduler; other types of them are read."""
    rows = random_rows(5, 80)
    scheduler = Scheduler(make(rows), COST, pool_tokens=POOL, step_tokens=512)
    first = scheduler.step()
    assert isinstance(first, Step)
    arrays = [getattr(first, name) for name in Step.__dataclass_fields__][:6]
    assert [a.dtype for a in arrays] == [numpy.int32] * 4 + [numpy.bool_] * 2
    assert all(a.ndim == 1 for a in arrays) and len({len(a) for a in arrays[1:]}) == 1
    assert first.admitted.tolist() == first.chunk_request.tolist()
    copies = [a.copy() for a in arrays]
    first.chunk_request[:0] = 0  # they may be written to
    scheduler.retire(numpy.zeros(8, numpy.int64)[::2][:0])
    scheduler.step()
    del scheduler
    gc.collect()
    assert all((a == b).all() for a, b in zip(arrays, copies, strict=True))


# -- misuse ---------------------------------------------------------------------------------------


def test_misuse_leaves_all_as_it_was():
    """All that is wrong is tried in every step; the run is that of one that tries nothing."""
    rows = random_rows(6, 60)
    options = dict(policy="paced", lengths="guess", pool_tokens=4_000)
    plain, tried = Engine(rows, **options), Engine(rows, **options)
    while not plain.scheduler.done:
        refuse(tried.scheduler, StateError, "retire: no step", [], [0])
        plain.end(plain.begin()[1])
        _, gave = tried.begin()
        counts = tried.scheduler.counts()
        with pytest.raises(StateError, match="step: the last one has not ended"):
            tried.scheduler.step()
        some = min(gave)
        others = sorted(set(range(60)) - gave)  # waiting, not yet at their prompts' ends, done
        words = "ended: expected requests that gave a token"
        bad = [[some, some], [-1], [60], [some, 60], [2**31 - 1], numpy.array([-(2**31)])]
        refuse(tried.scheduler, ArgumentError, words, *bad, *([i] for i in others[:5]))
        refuse(tried.scheduler, ArgumentError, "ended", [2**31], numpy.array([some, 2**40]))
        refuse(tried.scheduler, ShapeError, "ended", [some] * 61, numpy.zeros((1, 1), numpy.int32))
        bad = ([0.0], ["a"], [None], None, 3, "ab", {some}, numpy.array([some], numpy.float32))
        refuse(tried.scheduler, DTypeError, "ended", *bad, numpy.array([some], numpy.uint8))
        assert tried.scheduler.counts() == counts
        tried.end(gave)
    assert tried.steps == plain.steps and tried.scheduler.counts() == plain.scheduler.counts()


def refuse(scheduler, error, words, *bad):
    for ended in bad:
        with pytest.raises(error, match=words):
            scheduler.retire(ended)


def test_an_output_without_end():
    """A request that does not end at its max_tokens outgrows the pool; that is said, each time."""
    scheduler = Scheduler(with_limits([(5, 20, [])] * 3), COST, pool_tokens=30)
    with pytest.raises(StateError, match="none of the 3 requests.*pool of 30.*max_tokens"):
        for _ in range(200):
            scheduler.step()
            scheduler.retire([])
    counts = scheduler.counts()
    with pytest.raises(StateError, match="none of the 3"):
        scheduler.step()
    with pytest.raises(StateError, match="no step"):
        scheduler.retire([])
    assert scheduler.counts() == counts and not scheduler.done


THREE = [(130, 4, [1, 2]), (64, 4, [1]), (5, 4, [])]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(requests=3), DTypeError, "requests: expected Requests, got int"),
        (dict(cost={}), DTypeError, "cost: expected a CostModel, got dict"),
        (dict(policy="best"), ArgumentError, "policy: expected one of fcfs.*got best"),
        (dict(policy=None), DTypeError, "policy"),
        (dict(pool_tokens=0), ArgumentError, "pool_tokens"),
        (dict(pool_tokens=1e6), DTypeError, "pool_tokens"),
        (dict(pool_tokens=133), ArgumentError, "memory: request 0 .*134 tokens"),
        (dict(step_tokens=0), ArgumentError, "step_tokens"),
        (dict(step_tokens="x"), DTypeError, "step_tokens"),
        (dict(seed=-1), ArgumentError, "seed"),
        (dict(lengths="sample"), ArgumentError, "lengths: expected.*known.*guess.*sample"),
        (dict(seen=numpy.full(3, -1)), ArgumentError, "seen.*guess"),
        (dict(lengths="guess", seen=numpy.full(2, -1)), ShapeError, "seen"),
        (dict(lengths="guess", seen=numpy.zeros(3)), DTypeError, "seen"),
        (dict(lengths="guess", seen=[4, 4, 4]), DTypeError, "seen.*list"),
        (dict(lengths="guess", seen=numpy.array([4, 0, 4])), ArgumentError, "seen.*got 0"),
    ],
)
def test_bad_arguments(changes, error, words):
    requests = make(THREE)
    before = sys.getrefcount(requests._core)
    options = {"requests": requests, "cost": COST, "pool_tokens": POOL, **changes}
    with pytest.raises(error, match=words):
        Scheduler(**options)
    after = sys.getrefcount(requests._core)
    assert after == before


def test_bad_calls():
    core = make(THREE)._core
    good = (core, "dfs", COST.to_dict(), POOL, 512, 0, None)
    for at, bad in ((0, None), (0, COST), (1, 3), (2, []), (3, None), (4, 1.5), (5, "0"), (6, 3)):
        with pytest.raises((TypeError, ArgumentError)):
            _core.BlendScheduler(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(TypeError):
        _core.BlendScheduler(*good[:-1])
    scheduler = _core.BlendScheduler(*good)
    for bad, error in ((-1, ArgumentError), (3, ArgumentError), (2**40, ArgumentError)):
        with pytest.raises(error, match="request"):
            scheduler.generated(bad)
    for bad in (None, "0", 0.0):
        with pytest.raises(DTypeError, match="request"):
            scheduler.generated(bad)
    assert scheduler.generated(2) == 0 and scheduler.num_done == 0
    with pytest.raises(TypeError):
        scheduler.step()


# -- life and threads -----------------------------------------------------------------------------


def test_requests_live_as_long():
    rows = random_rows(8, 50)
    requests = make(rows)
    core = requests._core
    before = sys.getrefcount(core)
    schedulers = [Scheduler(requests, COST, pool_tokens=POOL) for _ in range(3)]
    schedulers[0].step()  # one dies within a step
    assert sys.getrefcount(core) == before + 3
    schedulers.clear()
    assert sys.getrefcount(core) == before
    engine = Engine(rows, requests=requests)
    del requests, core
    gc.collect()
    assert engine.run().scheduler.done


def test_what_is_read_is_let_go():
    scheduler = Scheduler(make(THREE), COST, pool_tokens=POOL)
    ended, numbers = [12345], numpy.zeros(1, numpy.float32)
    before = sys.getrefcount(ended), sys.getrefcount(numbers)
    for wrong in (ended, numbers) * 5:
        with pytest.raises((StateError, DTypeError)):
            scheduler.retire(wrong)
    del wrong
    after = sys.getrefcount(ended), sys.getrefcount(numbers)
    assert after == before


def test_one_thread_at_a_time():
    """While retire() looks at all outputs again in one thread, another one is turned away."""
    count = 100_000
    requests = make([(5, 2, [])] * count, max_tokens=numpy.full(count, 9), **UNKNOWN)
    refused = []
    for _ in range(50):
        scheduler = Scheduler(requests, COST, pool_tokens=POOL, lengths="guess")
        is_over = threading.Event()

        def ask(scheduler=scheduler, is_over=is_over):
            while not is_over.is_set():
                try:
                    assert scheduler.generated(0) in (0, 1) and scheduler.counts()["done"] == 0
                except StateError as error:
                    refused.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            while not scheduler.counts()["steps"]:
                again(scheduler.step)
                again(lambda scheduler=scheduler: scheduler.retire([]))
        finally:
            is_over.set()
            thread.join()
        if refused:
            break
    assert refused and all("another thread is inside this scheduler" in text for text in refused)
    assert scheduler.step().num_decoding == scheduler.counts()["decoding"] > 0


def again(call):
    """Until no other thread is inside."""
    while True:
        try:
            return call()
        except StateError as error:
            assert "another thread" in str(error)
