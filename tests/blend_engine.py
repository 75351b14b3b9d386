"""An engine in plain Python for the tests of raddle.blend.Scheduler. It has no model and no clock,
and keeps books of its own: who runs, who holds what, who gave how many tokens."""

import numpy
from raddle.blend import Scheduler

from tests.blend_cases import BLOCK, COST, POOL, make


class Engine:
    """Tokens of every request, step by step. Checks each step against what came before."""

    def __init__(self, rows, pool_tokens=POOL, step_tokens=512, requests=None, **options):
        self.rows, self.pool, self.step_tokens = rows, pool_tokens, step_tokens
        self.scheduler = Scheduler(
            make(rows) if requests is None else requests,
            COST,
            pool_tokens=pool_tokens,
            step_tokens=step_tokens,
            **options,
        )
        self.given = [0] * len(rows)
        self.computed = {}  # of those that run: tokens in memory
        self.found = {}  # of those, at their last admission
        self.since = {}  # when they began to decode
        self.decoding, self.ended, self.prefixes = set(), set(), set()
        self.tokens = self.hits = self.preemptions = self.again = 0
        self.seconds, self.steps = 0.0, []

    def whole(self, i):
        return self.rows[i][0] + self.given[i]

    def begin(self):
        step = self.scheduler.step()
        for i in step.preempted.tolist():
            self.decoding.remove(i)
            del self.computed[i]
            self.preemptions += 1
        assert step.num_decoding == len(self.decoding)
        assert step.reads == sum(self.whole(i) for i in self.decoding)
        assert step.tokens == step.num_decoding + int(step.chunk_count.sum()) <= self.step_tokens
        assert step.seconds > 0 or self.scheduler.done
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
        assert self.held() <= self.scheduler.counts()["held_tokens"] <= self.pool
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
        ids = self.rows[request][2]
        known = 0
        while known < len(ids) and tuple(ids[: known + 1]) in self.prefixes:
            known += 1
        assert 0 <= begin <= min(known * BLOCK, self.whole(request) - 1)
        assert begin % BLOCK == 0 or begin == self.whole(request) - 1
        self.prefixes |= {tuple(ids[: i + 1]) for i in range(len(ids))}
        self.computed[request] = self.found[request] = begin
        if self.given[request] == 0:
            self.hits += begin
        else:
            self.again += self.whole(request) - 1 - begin

    def held(self):
        """Tokens of K and V that those which run need at the least."""
        shared = {
            tuple(self.rows[i][2][: j + 1]) for i in self.computed for j in range(self.depth(i))
        }
        return len(shared) * BLOCK + sum(
            self.whole(i) - self.depth(i) * BLOCK for i in self.computed
        )

    def depth(self, request):
        return len(self.rows[request][2])

    def end(self, gave, as_array=False):
        """Those that are through. Their order says whose prefix was used last: as in the simulator,
        the newest first, but those that end with their first token last."""
        ended = [i for i in gave if self.given[i] == self.rows[i][1]]
        now = [i for i in ended if self.since[i][0] == len(self.steps) - 1]
        old = set(ended) - set(now)
        ended = sorted(old, key=self.since.get, reverse=True) + sorted(now, key=self.since.get)
        self.scheduler.retire(numpy.array(ended, numpy.int32) if as_array else ended)
        for i in ended:
            del self.computed[i]
        self.decoding -= set(ended)
        self.ended |= set(ended)

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
