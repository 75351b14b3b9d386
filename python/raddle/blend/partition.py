"""Requests for several replicas of a model, each with a memory of its own."""

import dataclasses

from .. import _core
from .run import _seen, order


@dataclasses.dataclass(frozen=True)
class Partition:
    """Who runs what.

    parts: int32 ndarrays of requests, one per replica, each depth first through the tree of
    prefixes. tail: int32 ndarray: requests that belong to whoever is done first, in runs of
    neighbours, best taken from the front. speedup: of all replicas over one, by the busiest of them
    and without the tail's stealing. duplicated: tokens that replicas compute besides those that one
    computes, a share of these.
    """

    parts: list
    tail: object
    speedup: float
    duplicated: float


def partition(
    requests, cost, replicas, *, tail=0.0, lengths="known", sample_rate=0.01, seed=0
) -> Partition:
    """Deals requests out to replicas (1 to 1024): computing and reading even, prefixes whole.

    requests: Requests. cost: a CostModel. tail: the share of the work, 0 to 1, that nobody owns, so
    that replicas whose outputs were misjudged can be helped. lengths, sample_rate, seed: as for
    simulate(); outputs that are unknown are guessed from those that are not. Vector bin packing,
    largest first, of runs of the tree's order. Raises ArgumentError.
    """
    import numpy

    seen = _seen(requests, lengths, sample_rate, seed)
    found, shares = _core.blend_partition(requests._core, cost.to_dict(), replicas, tail, seen)
    owners = found.numpy()
    walk = order(requests, cost, "dfs", pool_tokens=1 << 40)  # which is the same for any pool
    of_walk = owners[walk]
    lists = [numpy.ascontiguousarray(walk[of_walk == i]) for i in range(replicas + 1)]
    return Partition(
        parts=lists[:-1],
        tail=lists[-1],
        speedup=1 / shares["busiest"] if shares["busiest"] else float(replicas),
        duplicated=shares["tokens_again"] / max(shares["tokens"], 1),
    )
