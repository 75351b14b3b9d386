"""Orders of requests, and what they take on a machine that a CostModel describes."""

from dataclasses import dataclass, field

from .. import _core
from ..errors import ArgumentError

__all__ = ["Result", "Timeline", "compare", "order", "policy_names", "simulate"]


def policy_names():
    """The orders that there are, a tuple of names. Some of them: "fcfs", as they came; "dfs", depth
    first through the tree of prefixes; "paced", strata of like density side by side."""
    return _core.blend_policy_names()


@dataclass(frozen=True, eq=False)
class Timeline:
    """What happened over a run, in up to 512 stretches of equally many steps (the last may have
    fewer): float64 ndarrays [stretches]."""

    seconds: object  # that a stretch took
    compute_seconds: object  # of its computing, had it been alone
    read_seconds: object  # of its reading, likewise
    held_tokens: object  # of K and V in the pool, on average
    steps: object
    prompt_tokens: object  # of prompts that were computed to their ends
    hit_tokens: object  # of them, that were found in memory


@dataclass(frozen=True, eq=False)
class Result:
    """What a run of all requests takes, as simulated."""

    policy: str
    seconds: float
    bound_seconds: float  # that no order beats
    share_of_bound: float  # bound_seconds / seconds; 1 without requests
    tokens_per_s: float  # input and output tokens of all requests, found ones too
    hit_ratio: float  # of the prompts' tokens, the share that was found in memory
    peak_kv_tokens: int
    preemptions: int
    planning_s: float  # to guess lengths and make the plan, on this machine; the tree comes before
    timeline: Timeline = field(repr=False)


def simulate(
    requests,
    cost,
    policy="paced",
    *,
    pool_tokens,
    step_tokens=2048,
    lengths="known",
    sample_rate=0.01,
    seed=0,
):
    """Run requests behind a virtual clock; returns a Result.

    requests: Requests, all outputs known. cost: a CostModel. pool_tokens: of K and V in memory.
    step_tokens: the most through the GEMMs of a step. lengths: what the scheduler knows of outputs,
    "known" (all) or "sample": those of requests.sample(sample_rate, seed=seed), from which the
    others are guessed (the sample's own run is not added: its answers are part of the job). seed:
    of the sample and of the policy "random"; the same seed, the same result.

    Decodes come first in a step, chunks of prompts fill it; a request is admitted when its peak
    fits as far as lengths are known, and steps back to be computed again when the pool overflows.
    After BlendServe (arXiv 2411.16102). Other Python threads run meanwhile. Raises ArgumentError
    for an unknown policy, an unknown output or a request that is larger than the pool.
    """
    seen = _seen(requests, lengths, sample_rate, seed)
    found = requests._core.simulate(policy, cost.to_dict(), pool_tokens, step_tokens, seed, seen)
    tokens = found["prompt_tokens"] + found["output_tokens"]
    seconds = found["seconds"]
    return Result(
        policy=policy,
        seconds=seconds,
        bound_seconds=found["bound_seconds"],
        share_of_bound=found["bound_seconds"] / seconds if seconds else 1.0,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        hit_ratio=found["hit_tokens"] / max(found["prompt_tokens"], 1),
        peak_kv_tokens=found["peak_tokens"],
        preemptions=found["preemptions"],
        planning_s=found["planning_seconds"],
        timeline=_timeline(found["timeline"].numpy()),
    )


def compare(requests, cost, policies=None, **options):
    """simulate() each of policies (default: all there are); returns their Results in that order."""
    names = policy_names() if policies is None else policies
    return [simulate(requests, cost, name, **options) for name in names]


def order(
    requests,
    cost,
    policy="paced",
    *,
    pool_tokens,
    step_tokens=2048,
    lengths="known",
    sample_rate=0.01,
    seed=0,
    merged=True,
):
    """The order of a policy: int32 ndarray [num_requests], each request once.

    Arguments as for simulate(). Outputs need not be known: those that are say what is thought of
    the others. A policy may have several streams that run side by side: merged puts them together,
    each as far on as the others, for an engine that takes requests one by one; else they come one
    after the other. What is in memory changes the order of a run ("lpm" looks at nothing else, and
    is in order of arrival here). Raises ArgumentError.
    """
    seen = _seen(requests, lengths, sample_rate, seed)
    return requests._core.order(
        policy, cost.to_dict(), pool_tokens, step_tokens, seed, seen, merged
    ).numpy()


def _seen(requests, lengths, sample_rate, seed):
    """int32 [num_requests]: output lengths that were sampled, -1 elsewhere; None: all are known."""
    import numpy

    if lengths == "known":
        return None
    if lengths != "sample":
        raise ArgumentError(f'lengths: expected "known" or "sample", got {lengths!r}')
    chosen = requests.sample(sample_rate, seed=seed)
    seen = numpy.full(requests.num_requests, -1, numpy.int32)
    seen[chosen] = requests.output_lengths[chosen]
    return seen


def _timeline(rows):
    seconds, compute, read, held, steps, prompts, hits = rows.T.copy()
    return Timeline(seconds, compute, read, held / steps, steps, prompts, hits)
