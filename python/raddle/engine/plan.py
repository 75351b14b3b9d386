"""In which order the lines of a job are answered, and how long what is left of them will take.

The first lines are a sample, because how long an answer gets is known when it is there. When the
sample has ended all that is left is planned by raddle.blend, from lengths that its answers suggest,
and again whenever as many more answers have ended as had by the last time: few plans a job, each of
fewer requests.
"""

import dataclasses
import time

from ..blend import CostModel, Requests, order, policy_names, simulate
from ..blend.requests import SAMPLE_QUOTA
from ..blend.shape import Shape
from ..errors import ArgumentError

POLICY, SAMPLE_RATE = "paced", 0.01

# Policies that ask for no lengths: they need no sample, and no second plan for their order.
_BLIND = {"fcfs", "random", "lpm", "dfs"}
# Rates of a machine that nobody measured: of the order of a few CPU cores. Steps that have run say
# how far off they are.
_ROUGH_CPU = {"gemm_rate": 1e11, "read_rate": 2e10, "alpha": 1.0}


def cost_of(engine, hardware=None):
    """The CostModel of an engine's model on hardware: a file that `raddle calibrate` wrote, or what
    else CostModel.from_config() takes; None: h100 on a GPU, else rough rates of a CPU. The engine
    computes and reads one after the other: alpha is 1. RaddleError."""
    if hardware is None:
        hardware = _ROUGH_CPU if engine.device == "cpu" else "h100"
    model = dataclasses.replace(engine.config, dtype=engine.dtype)
    cost = CostModel.from_shape(Shape.from_model(model), hardware)
    return dataclasses.replace(cost, alpha=1.0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of an engine: answers at once, tokens of a step, tokens of K and V in memory."""

    max_batch: int
    step_tokens: int
    pool_tokens: int

    @classmethod
    def of(cls, engine):
        groups = engine.cache.groups
        pages = min([g.pool.num_pages for g in groups if g.window_left < 0] or
                    [max(g.pool.num_pages for g in groups)])  # fmt: skip
        return cls(engine.max_batch, engine.max_tokens_per_step, pages * engine.cache.page_size)


class Plan:
    """next() says which line is answered next, each once; end() is told which request has ended.

    requests: arguments of raddle.blend.Requests, lengths of outputs not among them. request_begin
    [num_lines + 1]: whose they are. waits [num_lines]: whether a line is to be answered at all.
    Lines are whole: one stands where its first request does.
    """

    def __init__(
        self,
        requests,
        request_begin,
        waits,
        cost,
        limits,
        *,
        policy=POLICY,
        sample_rate=SAMPLE_RATE,
        seed=0,
    ):
        import numpy as np

        if policy not in policy_names():
            names = ", ".join(policy_names())
            raise ArgumentError(f"schedule: expected one of {names}, got {policy!r}")
        if not 0 <= sample_rate <= 1:
            raise ArgumentError(f"sample_rate: expected a number from 0 to 1, got {sample_rate!r}")
        self._arrays, self._cost, self._limits = requests, cost, limits
        self._policy, self._seed = policy, seed
        self._all = Requests(**requests)
        count = self._all.num_requests
        waits = np.asarray(waits, bool)
        self._line_of = np.repeat(
            np.arange(len(waits), dtype=np.int32), np.diff(np.asarray(request_begin))
        )
        self._is_taken = ~waits  # lines
        self._is_over = ~waits[self._line_of]  # requests
        self._seen, self._so_far = np.full(count, -1, np.int32), np.zeros(count, np.int32)
        self._first = self._choose_sample(sample_rate)  # requests that are to end before a plan
        self._num_ended = self._num_ended_then = 0
        self.num_plans, self.planning_seconds = 0, 0.0
        self.make()

    def next(self):
        """The next line, or None: all were given out."""
        while self._position < len(self._lines):
            line = int(self._lines[self._position])
            self._position += 1
            if not self._is_taken[line]:
                self._is_taken[line] = True
                return line
        return None

    def end(self, request, length):
        """A request has ended with so many tokens; 0: it failed, and says nothing of others."""
        if self._is_over[request]:
            return
        self._is_over[request] = True
        if length:
            self._seen[request] = length
        self._num_ended += 1
        self._num_left -= 1
        self._weight_left -= self._weights[request]

    @property
    def is_due(self):
        """Whether it is time to make() a plan with what was learnt."""
        if self._first is not None:
            return bool(self._is_over[self._first].all())
        return self._num_ended >= 2 * self._num_ended_then

    def make(self, so_far=()):
        """Plan what is left. so_far: (request, tokens that it has given) of those that run."""
        import numpy as np

        begin = time.perf_counter()
        if self.num_plans:
            self._first = None
        least = max(SAMPLE_QUOTA, len(self._is_over) // 100)
        self._num_ended_then = max(self._num_ended, least // 2)
        for request, tokens in so_far:
            self._so_far[request] = tokens
        left = np.flatnonzero(~self._is_over)
        lengths = self._all.guess(self._seen, np.where(self._seen < 0, self._so_far, 0))
        part = self._part(left, lengths)
        options = {"pool_tokens": self._pool_tokens(left, lengths), "seed": self._seed,
                   "step_tokens": self._limits.step_tokens}  # fmt: skip
        ranked = left[order(part, self._cost, self._policy, **options)]
        if self._first is not None:  # the sample leads, in the same order
            in_first = np.isin(ranked, self._first)
            ranked = np.concatenate([ranked[in_first], ranked[~in_first]])
        self._lines, self._position = self._line_of[ranked], 0
        self._seconds = simulate(part, self._cost, self._policy, **options).seconds
        self._weigh(left, lengths)
        self.num_plans += 1
        self.planning_seconds += time.perf_counter() - begin

    @property
    def seconds_left(self):
        """Of all that has not ended, by the cost model: as planned, less what has ended since."""
        if self._num_left == 0:
            return 0.0
        return self._seconds * max(self._weight_left, 0.0)

    @property
    def hit_ratio(self):
        """The share of prompt tokens that need not be computed when no prefix is computed twice."""
        return self._all.shared_tokens / max(self._all.prompt_tokens, 1)

    def bound_seconds(self):
        """What no order of the requests that were seen to end beats, by the cost model."""
        import numpy as np

        seen = np.flatnonzero(self._seen > 0)
        part = self._part(seen, self._seen)
        pool = self._pool_tokens(seen, self._seen)
        options = {"pool_tokens": pool, "step_tokens": self._limits.step_tokens}
        return simulate(part, self._cost, "dfs", **options).bound_seconds

    # ---- inside a plan

    def _choose_sample(self, rate):
        """None where no sample leads."""
        if rate == 0 or self._policy in _BLIND:
            return None
        import numpy as np

        waiting = np.flatnonzero(~self._is_over)
        part = self._part(waiting, None)
        return waiting[part.sample(rate, quota=SAMPLE_QUOTA, seed=self._seed)]

    def _part(self, chosen, lengths):
        """Requests that are some of all, in their order, with what is thought of their outputs."""
        import numpy as np

        arrays, indptr = self._arrays, self._arrays["indptr"]
        counts = np.diff(indptr)
        is_chosen = np.zeros(len(counts), bool)
        is_chosen[chosen] = True
        return Requests(
            block_size=arrays["block_size"],
            input_lengths=arrays["input_lengths"][chosen],
            output_lengths=None if lengths is None else lengths[chosen],
            max_tokens=arrays["max_tokens"][chosen],
            hash_ids=arrays["hash_ids"][np.repeat(is_chosen, counts)],
            indptr=np.concatenate([[0], np.cumsum(counts[chosen])]).astype(np.int64),
        )

    def _pool_tokens(self, chosen, lengths):
        """Of K and V in memory. An engine's slots bound what it holds as well, and blend has none:
        no more than requests of average size take in all slots (too little where slots are few and
        answers short). Room for the largest request in any case, in whole blocks."""
        size = self._arrays["block_size"]
        totals = self._arrays["input_lengths"][chosen] + lengths[chosen].astype("i8")
        if not len(totals):
            return size
        pool = min(self._limits.pool_tokens, int(self._limits.max_batch * totals.mean()))
        return max(pool, (int(totals.max()) // size + 2) * size)

    def _weigh(self, left, lengths):
        """Each request's share of the seconds that are left, 1 in all: its computing, its reading,
        and its part of the weights that a full batch reads."""
        import numpy as np

        cost = self._cost
        prompts = self._arrays["input_lengths"][left].astype("f8")
        outputs = lengths[left].astype("f8")
        computing = (prompts + outputs) * cost.flops_per_token / cost.gemm_rate[-1]
        reads = outputs * (prompts + outputs / 2) * cost.kv_bytes_per_token
        reads += outputs * cost.weight_bytes / self._limits.max_batch
        self._weights = np.zeros(len(self._is_over))
        seconds = computing + reads / cost.read_rate
        self._weights[left] = seconds / seconds.sum()
        self._num_left, self._weight_left = len(left), 1.0
