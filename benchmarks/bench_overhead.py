"""Host costs: run(), plan(), the tensor doors, import, a cold kernel compile and a warm module
load, of a built-in kernel and of a user's variant.

Host time only: on a GPU run() is timed without waiting for the device, one short batch at a time.
FlashInfer is the peer of plan() and run() on a GPU where it can be imported; build its kernels
first (bench_decode.py --warm-peers). Needs: torch for its rows; a GPU for --device cuda."""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import common
import flashinfer_peer
import numpy as np
import raddle
from raddle import _core
from raddle.attention import BatchDecode

HEADS = dict(num_qo_heads=32, num_kv_heads=8, head_dim=128)
WARM_SECONDS = 2  # an idle host has lowered its clock


@dataclasses.dataclass
class Row:
    case: str
    call: typing.Callable
    count: int  # calls of a sample
    inner: int = 1  # repetitions that a call makes itself
    peer: str | None = None
    peer_call: typing.Callable | None = None


def time_rows(report, args, rows):
    """Adds a row for each: the median of samples, each the mean of count calls.

    Samples of all rows take turns, since hosts change their clocks, and the host is kept busy, as
    by an engine. On a GPU each begins with an idle device, and nothing waits for it.
    """
    settle = settler(args.device)
    sides = [(row, call) for row in rows for call in (row.call, row.peer_call) if call]
    samples = {id(call): [] for _, call in sides}
    warm_until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm_until:
        for row in rows:
            row.call()
        settle()
    for _ in range(5 * args.repeat):
        for row, call in sides:
            for times in ([], samples[id(call)]):  # the first to warm up
                start = time.perf_counter()
                for _ in range(row.count):
                    call()
                times.append((time.perf_counter() - start) / row.count / row.inner * 1e6)
                settle()
    us = {key: statistics.median(times) for key, times in samples.items()}
    for row in rows:
        report.add(row.case, us[id(row.call)], row.peer, us.get(id(row.peer_call)))


def settler(device):
    """A function that waits for the device."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def make_plan(batch, device, pages_each=64):
    rng = np.random.default_rng(0)
    pages = batch * pages_each
    plan = BatchDecode(page_size=16, max_batch=batch, max_pages=pages, device=device, **HEADS)
    table = (
        (np.arange(batch + 1) * pages_each).astype(np.int32),
        rng.permutation(pages).astype(np.int32),
        rng.integers(1, 17, batch).astype(np.int32),
    )
    return plan, table


def plan_rows(args):
    """As many calls at a time as a plan has slots to send from: more would wait for the device, as
    no step of a model makes them."""
    for batch in (1, 64, 256, 1024):
        plan, table = make_plan(batch, args.device)
        case = f"plan() from host arrays, B{batch} x 64 pages"
        peer, peer_plan, _ = flashinfer_calls(args, batch, 64)
        yield Row(case, lambda p=plan, t=table: p.plan(*t), 3, peer=peer, peer_call=peer_plan)


def flashinfer_calls(args, batch, pages_each):
    """(name, plan, run) of the peer, None where there is none."""
    if args.device == "cpu" or flashinfer_peer.load() is None:
        return None, None, None
    return flashinfer_peer.NAMES["cc"], *flashinfer_peer.host_calls(batch, pages_each, HEADS)


def run_rows(args):
    import torch

    # On the CPU an empty batch leaves nothing but the call; on a GPU the launch is asynchronous.
    plan, table = make_plan(1, args.device, pages_each=1)
    plan.plan(*table)
    rows = 1
    if args.device == "cpu":
        plan.plan(np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
        rows = 0
    q = torch.zeros(rows, 32, 128, dtype=torch.bfloat16, device=args.device)
    cache = torch.zeros(1, 2, 16, 8, 128, dtype=torch.bfloat16, device=args.device)
    out = torch.empty_like(q)
    one = torch.zeros(1, device=args.device)
    yield Row(
        "run() with torch tensors and out",
        lambda: plan.run(q, cache, out=out),
        200,
        peer="torch.add of one number",
        peer_call=lambda: torch.add(one, 1, out=one),
    )
    yield Row("run() with torch tensors, result made", lambda: plan.run(q, cache), 200)
    if args.device == "cuda":
        yield from (batch_run_row(args, batch) for batch in (1, 64))


def batch_run_row(args, batch):
    """run() of a batch of short requests beside FlashInfer's."""
    import torch

    plan, table = make_plan(batch, args.device, pages_each=1)
    plan.plan(*table)
    q = torch.zeros(batch, 32, 128, dtype=torch.bfloat16, device=args.device)
    cache = torch.zeros(batch, 2, 16, 8, 128, dtype=torch.bfloat16, device=args.device)
    out = torch.empty_like(q)
    peer, _, peer_run = flashinfer_calls(args, batch, 1)
    case = f"run() with torch tensors and out, B{batch}"
    return Row(case, lambda: plan.run(q, cache, out=out), 200, peer=peer, peer_call=peer_run)


def door_rows():
    import torch

    tensors = {"torch": torch.zeros(4, 8), "numpy": np.zeros((4, 8), np.float32)}
    tensors["raddle"] = raddle.zeros((4, 8))
    for name, tensor in tensors.items():
        call = lambda t=tensor: _core.tensor_open(t, 10000)  # noqa: E731
        yield Row(f"open a {name} tensor", call, 1, inner=10000)


def print_of(code, **environment):
    """What code prints in a fresh process, as a number."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


IMPORT = """
import time
import numpy
start = time.perf_counter()
import {}
print((time.perf_counter() - start) * 1e6)
"""


def bench_import(report, args):
    for module in ("raddle", "raddle.attention"):
        samples = [print_of(IMPORT.format(module)) for _ in range(min(args.repeat, 9))]
        report.add(f"import {module}, beyond numpy", statistics.median(samples))


COMPILE = """
import time
import raddle
from raddle.attention import BatchDecode
raddle.empty((1,), device="cuda")
start = time.perf_counter()
{}
BatchDecode(
    num_qo_heads=32, num_kv_heads=8, head_dim=128, page_size=16, max_batch=4, max_pages=9,
    device="cuda", variant=variant,
)
print((time.perf_counter() - start) * 1e6)
"""
VARIANT = """
variant = raddle.Variant("distance_bias", '''
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    return logit - v->slope * (float)(row->kv_len - 1 - kv_index);
}''', scalars=("slope",))
"""


def bench_compile(report):
    cases = ("cold kernel compile", "second process, disk cache")
    for what, variant in (("first plan", "variant = None"), ("first plan of a variant", VARIANT)):
        samples = [[], []]
        code = COMPILE.format(variant)
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                for times in samples:
                    # NVRTC has a cache of its own since CUDA 12.9; without it the first is cold.
                    times.append(print_of(code, RADDLE_CACHE_DIR=folder, CUDA_CACHE_DISABLE="1"))
        for case, times in zip(cases, samples):
            report.add(f"{what}, {case}", statistics.median(times))


def main():
    args = common.parse_args(__doc__)
    report = common.Report("overhead", args, {})
    rows = list(plan_rows(args))
    try:
        import torch  # noqa: F401
    except ImportError:
        print("torch is not installed: run() and the doors are not measured")
    else:
        rows += [*run_rows(args), *door_rows()]
    time_rows(report, args, rows)
    bench_import(report, args)
    if args.device == "cuda":
        bench_compile(report)
    report.write()


if __name__ == "__main__":
    main()
