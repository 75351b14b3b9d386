"""Host costs: run(), plan(), the tensor doors, import, a cold kernel compile and a warm module
load.

Host time only: on a GPU run() is timed without waiting for the device, one short batch at a time.
Needs: torch for its rows; a GPU for --device cuda."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import common
import numpy as np
import raddle
from raddle import _core
from raddle.attention import BatchDecode

HEADS = dict(num_qo_heads=32, num_kv_heads=8, head_dim=128)


def per_call_us(call, count, repeat, settle=None):
    """Median over repeat of the mean of count calls, in microseconds."""
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - start) / count * 1e6)
        if settle:
            settle()
    return statistics.median(samples)


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


def settler(device):
    """A function that waits for the device, or None."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.synchronize


def bench_plan(report, args):
    """As many calls at a time as a plan has slots to send from: more would wait for the device, as
    no step of a model makes them."""
    for batch in (1, 64, 256, 1024):
        plan, table = make_plan(batch, args.device)
        settle = settler(args.device)
        us = per_call_us(lambda p=plan, t=table: p.plan(*t), 3, 10 * args.repeat, settle)
        report.add(f"plan() from host arrays, B{batch} x 64 pages", us)


def bench_run(report, args):
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
    settle = settler(args.device)
    us = per_call_us(lambda: plan.run(q, cache, out=out), 200, args.repeat, settle)
    one = torch.zeros(1, device=args.device)
    peer_us = per_call_us(lambda: torch.add(one, 1, out=one), 200, args.repeat, settle)
    report.add("run() with torch tensors and out", us, "torch.add of one number", peer_us)
    us = per_call_us(lambda: plan.run(q, cache), 200, args.repeat, settle)
    report.add("run() with torch tensors, result made", us)


def bench_doors(report, args):
    import torch

    tensors = {"torch": torch.zeros(4, 8), "numpy": np.zeros((4, 8), np.float32)}
    tensors["raddle"] = raddle.zeros((4, 8))
    for name, tensor in tensors.items():
        loop_us = per_call_us(lambda t=tensor: _core.tensor_open(t, 10000), 1, args.repeat)
        report.add(f"open a {name} tensor", loop_us / 10000)


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
BatchDecode(
    num_qo_heads=32, num_kv_heads=8, head_dim=128, page_size=16, max_batch=4, max_pages=9,
    device="cuda",
)
print((time.perf_counter() - start) * 1e6)
"""


def bench_compile(report):
    cases = ("first plan, cold kernel compile", "first plan of a second process, disk cache")
    samples = [[], []]
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for times in samples:
                # NVRTC has a cache of its own since CUDA 12.9; without it the first is truly cold.
                times.append(print_of(COMPILE, RADDLE_CACHE_DIR=folder, CUDA_CACHE_DISABLE="1"))
    for case, times in zip(cases, samples):
        report.add(case, statistics.median(times))


def main():
    args = common.parse_args(__doc__)
    report = common.Report("overhead", args, {})
    bench_plan(report, args)
    bench_import(report, args)
    try:
        import torch  # noqa: F401
    except ImportError:
        print("torch is not installed: run() and the doors are not measured")
    else:
        bench_run(report, args)
        bench_doors(report, args)
    if args.device == "cuda":
        bench_compile(report)
    report.write()


if __name__ == "__main__":
    main()
