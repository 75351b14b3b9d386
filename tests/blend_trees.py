"""Random requests for the tests of raddle.blend, of every shape that a tree of prefixes may have,
and pools, steps and machines that are as small, or as odd, as may be. A seed is a case."""

from dataclasses import dataclass, replace

import numpy
from raddle.blend import CostModel, Requests

BLOCK_SIZES = (1, 2, 3, 16, 64, 512)
HIGH = 2**64 - 1


@dataclass
class Case:
    """Requests (input, output, ids), what they may generate, where they come from; a machine."""

    block: int
    rows: list
    most: list  # max_tokens, or None: the default
    sources: list
    weights: list
    pool: int
    step_tokens: int
    cost: CostModel

    @property
    def outputs(self):
        return [output for _, output, _ in self.rows]

    def arrays(self):
        ids = [i for _, _, own in self.rows for i in own]
        lengths = [len(own) for _, _, own in self.rows]
        return dict(
            block_size=self.block,
            input_lengths=numpy.array([row[0] for row in self.rows], numpy.int32),
            output_lengths=numpy.array(self.outputs, numpy.int32),
            max_tokens=None if self.most is None else numpy.array(self.most, numpy.int32),
            sources=numpy.array(self.sources, numpy.int32),
            weights=numpy.array(self.weights, numpy.float32),
            hash_ids=numpy.array(ids, numpy.uint64),
            indptr=numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)]),
        )

    def requests(self, **changes):
        return Requests(**{**self.arrays(), **changes})

    def simulate(self, requests, policy, *, pool=None, seed=0, seen=None):
        """All numbers of the C core but the time that planning took; the timeline as bytes."""
        pool = self.pool if pool is None else pool
        found = requests._core.simulate(
            policy, self.cost.to_dict(), pool, self.step_tokens, seed, seen
        )
        del found["planning_seconds"]
        found["timeline"] = found["timeline"].numpy().tobytes()
        return found


# -- trees --------------------------------------------------------------------------------------
# Each returns lists of block ids, one per request.


def chains(rng, count):
    """Prefixes of one another, as deep as may be, in any order."""
    ids = [int(i) for i in rng.integers(0, HIGH, 70, numpy.uint64)]
    return [ids[: int(rng.integers(0, len(ids)))] for _ in range(count)]


def fans(rng, count):
    """One prefix, and then each for itself."""
    prefix = [7] * int(rng.integers(1, 9))
    return [prefix + [1000 + i] * int(rng.integers(0, 4)) for i in range(count)]


def repeats(rng, count):
    """Few prompts, asked many times."""
    prompts = [[HIGH - k] * int(rng.integers(0, 12)) for k in range(3)]
    return [prompts[int(rng.integers(0, 3))] for _ in range(count)]


def forests(rng, count):
    """Two ways at every turn, by ids that come back at other depths."""
    return [[int(i) for i in rng.integers(0, 2, int(rng.integers(0, 9)))] for _ in range(count)]


def combs(rng, count):
    """A spine with a tooth at every block: as many nodes as requests can have."""
    return [[*range(i // 2), *([HIGH] if i % 2 else [])] for i in rng.permutation(count).tolist()]


def strangers(rng, count):
    """Nothing in common."""
    return [[100 * i + k for k in range(int(rng.integers(0, 6)))] for i in range(count)]


SHAPES = (chains, fans, repeats, forests, combs, strangers)


def tree(rng, count):
    """One of the shapes, or all of them beside each other."""
    kind = int(rng.integers(0, len(SHAPES) + 1))
    if kind < len(SHAPES):
        return SHAPES[kind](rng, count)
    each = [shape(rng, max(count // len(SHAPES), 1)) for shape in SHAPES]
    found = [[k, *ids] for k, group in enumerate(each) for ids in group]
    return [found[i] for i in rng.permutation(len(found))]


# -- the rest -----------------------------------------------------------------------------------


def costs(rng):
    """Machines: with and without weights, overlap, overhead; one rate or several, of which the last
    may be slower, so that the best steps are smaller than they may be."""
    many = (8.0, 256.0, 2048.0)
    kinds = (((2e14,), (1.0,)), ((4e12, 9e13, 2e14), many), ((4e12, 1.2e14, 1e14), many))
    rates = kinds[int(rng.choice(3, p=[0.5, 0.25, 0.25]))]
    return CostModel(
        flops_per_token=1.6e10,
        flops_per_score=float(rng.choice([0, 5e5])),
        kv_bytes_per_token=131072.0,
        weight_bytes=float(rng.choice([0, 1.6e10])),
        attention_flops_rate=1.5e14,
        read_rate=float(rng.choice([1.7e12, 2e11])),
        gemm_rate=rates[0],
        rate_tokens=rates[1],
        alpha=float(rng.choice([0, 0.45, 1])),
        overhead=float(rng.choice([0, 1e-4])),
    )


def case(seed, most_requests=80, longest=1500):
    """Cases are as different as they can be: a pool that the largest request fills, steps of one
    token, outputs of one token beside outputs of many."""
    rng = numpy.random.default_rng(seed)
    block = int(rng.choice(BLOCK_SIZES))
    ids = tree(rng, int(rng.integers(1, most_requests + 1)))
    count = len(ids)
    outputs = rng.choice(
        [1, 2, 7, 64, 65, 300, longest], count, p=[0.3, 0.1, 0.2, 0.1, 0.1, 0.15, 0.05]
    )
    outputs = numpy.minimum(outputs, longest) if rng.integers(0, 5) else numpy.ones(count, int)
    rows = []
    for own, output in zip(ids, outputs.tolist(), strict=True):
        tail = int(rng.choice([0, 1, block - 1, 3 * block + 1]))  # what has no id may be long
        rows.append((max(len(own) * block + tail, 1), output, own))
    kind = int(rng.integers(0, 3))
    slack = rng.integers(0, 50, count) * (kind == 1) + longest * (kind == 2)
    sources = rng.integers(0, int(rng.choice([1, 2, 5])), count)
    need = max(length + output for length, output, _ in rows)
    return Case(
        block=block,
        rows=rows,
        most=None if kind == 0 else [o + int(s) for o, s in zip(outputs.tolist(), slack)],
        sources=(sources * int(rng.choice([1, 1, 977]))).tolist(),
        weights=numpy.exp(rng.uniform(-7, 7, count)).tolist(),
        pool=int(need * float(rng.choice([1, 1.2, 3, 1000]))),
        step_tokens=int(rng.choice([1, 7, 64, 512, 4096], p=[0.05, 0.15, 0.2, 0.4, 0.2])),
        cost=costs(rng),
    )


def small_case(seed, **options):
    """One whose steps an engine in Python takes one by one."""
    found = case(seed, **{"most_requests": 30, "longest": 150, **options})
    return replace(found, step_tokens=max(found.step_tokens, 7))


def seen_of(case, seed, share=0.2):
    """Output lengths that were seen, -1 elsewhere: of some, of none, or of all but a few."""
    rng = numpy.random.default_rng(seed + 10**6)
    odds = float(rng.choice([0, share, 0.9]))
    is_seen = rng.random(len(case.rows)) < odds
    return numpy.where(is_seen, case.outputs, -1).astype(numpy.int32)
