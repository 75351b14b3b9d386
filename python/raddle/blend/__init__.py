"""Offline scheduling: in which order a file of requests takes least time, and what that time is.

Requests that share prefixes are computed once when they run one after the other; requests that
compute much and requests that read much hide behind each other when they run at once. An order that
does both beats either, after BlendServe (arXiv 2411.16102). Times are those of a model of the
machine (CostModel), from rates or measured on it, not of a machine. An engine of its own is told
what to do, step by step, by a Scheduler.
"""

from .cost import CostModel
from .partition import Partition, partition
from .requests import Requests
from .run import Result, Timeline, compare, order, policy_names, simulate
from .scheduler import Scheduler, Step

__all__ = [
    "CostModel",
    "Partition",
    "Requests",
    "Result",
    "Scheduler",
    "Step",
    "Timeline",
    "compare",
    "order",
    "partition",
    "policy_names",
    "simulate",
]
