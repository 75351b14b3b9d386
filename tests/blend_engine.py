"""An engine in plain Python for the tests of raddle.blend.Scheduler. It has no model and no clock,
and keeps books of its own: who runs, who holds what, who gave how many tokens."""

import numpy
import pytest
from raddle.blend import Scheduler
from raddle.errors import ArgumentError, StateError

from tests.blend_cases import BLOCK, COST, POOL, make


class Memory:
    """Blocks of all prompts by their prefixes, and who reads them. What nobody runs on stays as
    long as one that waits will read it, unless the room is needed; when that is, books are kept of
    the least and the most that may be there."""

    def __init__(self, rows):
        numbers = {}
        self.paths = []  # of each request, the numbers of its blocks
        for _, _, ids in rows:
            at, path = -1, []
            for i in ids:
                at = numbers.setdefault((at, i), len(numbers))
                path.append(at)
            self.paths.append(path)
        self.running, self.waiting = [0] * len(numbers), [0] * len(numbers)
        self.is_there = [False] * len(numbers)
        self.num_read = self.num_idle = 0
        for path in self.paths:
            for at in path:
                self.waiting[at] += 1

    def held(self, request):
        """Blocks of a path that running requests hold, at least these are found."""
        return sum(1 for at in self.paths[request] if self.running[at])

    def found(self, request):
        """Blocks that are there, if none was evicted."""
        return sum(1 for at in self.paths[request] if self.is_there[at])

    def enter(self, request):
        for at in self.paths[request]:
            self.num_read += self.running[at] == 0
            self.num_idle -= self.running[at] == 0 and self.is_there[at]
            self.running[at] += 1
            self.waiting[at] -= 1
            self.is_there[at] = True

    def leave(self, request, waits_again):
        for at in self.paths[request]:
            self.running[at] -= 1
            self.waiting[at] += waits_again
            if self.running[at] == 0:
                self.num_read -= 1
                self.is_there[at] = self.waiting[at] > 0
                self.num_idle += self.is_there[at]


class Engine:
    """Tokens of every request, step by step. Checks each step against what came before."""

    def __init__(
        self,
        rows,
        pool_tokens=POOL,
        step_tokens=512,
        requests=None,
        block=BLOCK,
        cost=COST,
        **options,
    ):
        self.rows, self.pool, self.step_tokens, self.block = rows, pool_tokens, step_tokens, block
        self.scheduler = Scheduler(
            make(rows) if requests is None else requests,
            cost,
            pool_tokens=pool_tokens,
            step_tokens=step_tokens,
            **options,
        )
        self.given = [0] * len(rows)
        self.computed = {}  # of those that run: tokens in memory
        self.found = {}  # of those, at their last admission
        self.since = {}  # when they began to decode
        self.decoding, self.ended = set(), set()
        self.memory, self.has_evicted = Memory(rows), False
        self.tokens = self.hits = self.preemptions = self.again = 0
        self.seconds, self.steps = 0.0, []

    def whole(self, i):
        return self.rows[i][0] + self.given[i]

    def free_tokens(self):
        """That memory has room for beside what runs; None: what the pool leaves."""

    def begin(self):
        free = self.free_tokens()
        step = self.scheduler.step(free)
        self.has_evicted = self.has_evicted or free is not None
        for i in step.preempted.tolist():
            self.decoding.remove(i)
            del self.computed[i]
            self.memory.leave(i, True)
            self.preemptions += 1
            self.has_evicted = True
        assert step.num_decoding == len(self.decoding)
        assert step.reads == sum(self.whole(i) for i in self.decoding)
        assert step.tokens == step.num_decoding + int(step.chunk_count.sum()) <= self.step_tokens
        assert step.seconds > 0 or self.scheduler.done or free is not None
        gave = set(self.decoding)
        hits, prompts, pairs = 0, 0, 0.0
        for request, begin, count, is_first, is_last in self.chunks(step):
            if is_first:
                self.admit(request, begin)
            assert begin == self.computed[request] and count > 0
            assert is_last == (begin + count == self.whole(request))
            self.computed[request] += count
            pairs += count * (begin + (count + 1) / 2)
            if is_last:
                gave.add(request)
                self.since[request] = len(self.steps), len(gave)
                prompts += self.whole(request)
                hits += self.found[request]
        assert (step.prompt_tokens, step.hit_tokens) == (prompts, hits)
        assert step.scores == pairs
        self.check_held()
        self.tokens += step.tokens
        self.seconds += step.seconds
        self.steps.append((step.preempted.tolist(), list(self.chunks(step)), step.num_decoding))
        for i in gave:
            self.given[i] += 1
        self.decoding = gave
        return step, gave

    @staticmethod
    def chunks(step):
        columns = (step.chunk_request, step.chunk_begin, step.chunk_count)
        flags = (step.chunk_is_first, step.chunk_is_last)
        return zip(*(column.tolist() for column in (*columns, *flags)), strict=True)

    def admit(self, request, begin):
        """What lies before the first chunk was computed for another one, or for it before."""
        assert request not in self.computed and request not in self.ended
        most = self.whole(request) - 1  # the last token is always computed
        least = min(self.memory.held(request) * self.block, most)
        there = min(self.memory.found(request) * self.block, most)
        self.memory.enter(request)
        self.has_evicted = self.has_evicted or self.most_held() > self.pool
        assert least <= begin <= there
        assert begin == there or self.has_evicted
        assert begin % self.block == 0 or begin == most
        self.computed[request] = self.found[request] = begin
        if self.given[request] == 0:
            self.hits += begin
        else:
            self.again += most - begin

    def own(self, i):
        """Tokens that it has for itself, while it runs."""
        return self.whole(i) - len(self.rows[i][2]) * self.block

    def least_held(self):
        """Tokens of K and V that those which run need."""
        return self.memory.num_read * self.block + sum(self.own(i) for i in self.computed)

    def most_held(self):
        own = sum(self.own(i) for i in self.computed)
        return (self.memory.num_read + self.memory.num_idle) * self.block + own

    def check_held(self):
        counts, most = self.scheduler.counts(), self.most_held()
        self.has_evicted = self.has_evicted or most > self.pool
        assert self.least_held() <= counts["held_tokens"] <= min(most, self.pool)
        assert counts["held_tokens"] == most or self.has_evicted
        assert counts["held_tokens"] <= counts["peak_tokens"] <= self.pool
        assert counts["running"] == len(self.computed) <= self.step_tokens

    def is_over(self, request):
        """Whether the token that it gave is its last."""
        return self.given[request] == self.rows[request][1]

    def end(self, gave, as_array=False):
        """Those that are through. Their order says whose prefix was used last: as in the simulator,
        the newest first, but those that end with their first token last."""
        ended = [i for i in gave if self.is_over(i)]
        now = [i for i in ended if self.since[i][0] == len(self.steps) - 1]
        old = set(ended) - set(now)
        ended = sorted(old, key=self.since.get, reverse=True) + sorted(now, key=self.since.get)
        self.retire(numpy.array(ended, numpy.int32) if as_array else ended)

    def retire(self, ended):
        self.scheduler.retire(ended)
        numbers = [int(i) for i in ended]
        for i in numbers:
            del self.computed[i]
            self.memory.leave(i, False)
        self.decoding -= set(numbers)
        self.ended |= set(numbers)

    def run(self):
        while not self.scheduler.done:
            _, gave = self.begin()
            self.end(gave, as_array=len(self.steps) % 2 == 0)
            if len(self.steps) % 50 == 0:
                self.check_generated()
        self.check_generated()
        return self

    def check_generated(self):
        requests = range(len(self.rows))
        assert [self.scheduler.generated(i) for i in requests] == self.given


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
