"""What every bench_*.py shares: arguments, interleaved medians, ceilings, the table and the JSON.

A row compares raddle with a peer measured in the same process, calls interleaved, since cards and
hosts throttle. Data rotates over copies larger than the last-level cache, so that nothing is found
there by accident. Bytes and flops are counted by hand in each bench. GPU times are those of a CUDA
graph of several calls divided by their number (`hot`)."""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time

ROTATE_BYTES = {"cuda": 256 << 20, "cpu": 128 << 20}
SETTLE_SECONDS = 0.02  # OpenMP's threads spin for some milliseconds after a call,
WARM_SECONDS = 0.02  # and take some to find a core each when they are woken


def parse_args(description, argv=None, extend=None):
    """The arguments that all benches take; extend(parser) adds a bench's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="few shapes, few repetitions")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    if extend:
        extend(parser)
    args = parser.parse_args(argv)
    args.repeat = 7 if args.quick else 21
    return args


def time_cpu(functions, repeat):
    """Median microseconds of each function, calls interleaved.

    functions: one list of rotated closures per side. Before each sample the cores are left alone
    until the other side's threads sleep, and calls that do not count wake this side's.
    """
    times = [[] for _ in functions]
    turns = [itertools.cycle(side) for side in functions]
    for _ in range(repeat):
        for calls, samples in zip(turns, times):
            time.sleep(SETTLE_SECONDS)
            warm_until = time.perf_counter() + WARM_SECONDS
            while time.perf_counter() < warm_until:
                next(calls)()
            call = next(calls)
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(samples) for samples in times]


def time_cuda(functions, repeat, calls=10):
    """As time_cpu on a GPU: each side is captured in a CUDA graph of at least `calls` calls over
    its closures.

    A read that is not timed runs ahead of each replay: the host queues the replay behind it, so
    that the launch of the graph is not in the times of its calls.
    """
    import torch

    (ahead,) = reading("cuda", ROTATE_BYTES["cuda"])
    torch.cuda.synchronize()  # what the closures use may still be on its way on another stream
    graphs = []
    stream = torch.cuda.Stream()
    for side in functions:
        count = max(calls, len(side))
        with torch.cuda.stream(stream):
            for call in side:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                side[i % len(side)]()
        graphs.append((graph, count))
    times = [[] for _ in functions]
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeat + 1):
        for (graph, count), samples in zip(graphs, times):
            ahead()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop) * 1e3 / count)
    return [statistics.median(samples[1:]) for samples in times]


def time_sides(device, functions, repeat):
    """Median microseconds of each side on device."""
    return time_cuda(functions, repeat) if device == "cuda" else time_cpu(functions, repeat)


def copies_to_rotate(device, num_bytes):
    """How many copies of a working set make it larger than the cache."""
    return max(1, min(64, -(-ROTATE_BYTES[device] // max(num_bytes, 1))))


def reading(device, num_bytes):
    """A side that reads num_bytes once, rotated like the benches' data: the ceiling of memory-bound
    rows."""
    import torch
    from raddle import _core

    copies = copies_to_rotate(device, num_bytes)
    blocks = [torch.ones(num_bytes // 4, device=device) for _ in range(copies)]
    return [lambda b=b: _core.memory_read(b) for b in blocks]


def measure_read(device, num_bytes, repeat):
    """GB/s of that."""
    (us,) = time_sides(device, [reading(device, num_bytes)], repeat)
    return num_bytes / us / 1e3


def measure_matmul(device, dtype, repeat):
    """TFLOP/s of a large matrix product of the framework's library: the ceiling of compute-bound
    rows."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    (us,) = time_sides(device, [[lambda: torch.matmul(a, b, out=out)]], repeat)
    return 2 * n**3 / us / 1e6


def describe(device):
    """The machine, the versions and the commit that numbers came from."""
    facts = {
        "device": "cpu",
        "cpu": platform.processor() or platform.machine(),
        "driver": None,
        "versions": {},
    }
    try:
        with open("/proc/cpuinfo") as lines:
            facts["cpu"] = next(
                line.split(":")[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    facts["cpu_threads"] = len(os.sched_getaffinity(0))
    for name in ("raddle", "numpy", "torch", "transformers", "flashinfer"):
        module = sys.modules.get(name)
        if module is not None:
            facts["versions"][name] = module.__version__
    facts["versions"]["python"] = platform.python_version()
    if device == "cuda":
        import torch

        facts["device"] = torch.cuda.get_device_name()
        facts["versions"]["cuda"] = torch.version.cuda
        facts["versions"]["cudnn"] = torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError:
            pass
    query = ["git", "rev-parse", "--short", "HEAD"]
    try:
        facts["commit"] = (
            subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
        )
    except OSError:
        facts["commit"] = None
    facts["commit"] = facts["commit"] or os.environ.get("RADDLE_BENCH_COMMIT")
    return facts


class Report:
    """Collects rows, prints them as they come, writes the JSON at the end.

    sections: what a bench writes beside its rows, by name.
    """

    def __init__(self, bench, args, ceilings):
        self.bench, self.args = bench, args
        self.ceilings = ceilings
        self.rows = []
        self.sections = {}
        for name, number in ceilings.items():
            print(f"ceiling {name}: {number:.1f}")
        print(f"{'case':44} {'ours us':>10} {'peer us':>10} {'ratio':>6} {'% ceiling':>9}  peer")

    def add(
        self,
        case,
        ours_us,
        peer=None,
        peer_us=None,
        *,
        num_bytes=None,
        flops=None,
        ceiling=None,
        **facts,
    ):
        """One row. ceiling: GB/s when bytes decide, TFLOP/s when flops do. facts: written to the
        JSON only."""
        percent = None
        if ceiling and num_bytes and not flops:
            percent = 100 * num_bytes / ours_us / 1e3 / ceiling
        elif ceiling and flops:
            percent = 100 * flops / ours_us / 1e6 / ceiling
        ratio = peer_us / ours_us if peer_us else None
        self.rows.append(
            {
                "case": case,
                "ours_us": ours_us,
                "peer": peer,
                "peer_us": peer_us,
                "ratio": ratio,
                "bytes": num_bytes,
                "flops": flops,
                "percent_of_ceiling": percent,
                **facts,
            }
        )

        def cell(number, width, digits):
            return f"{number:{width}.{digits}f}" if number is not None else " " * (width - 1) + "-"

        print(
            f"{case:44} {cell(ours_us, 10, 2)} {cell(peer_us, 10, 2)} {cell(ratio, 6, 2)} "
            f"{cell(percent, 9, 1)}  {peer or ''}",
            flush=True,
        )

    def write(self):
        """Write the JSON where --json said."""
        if not self.args.json:
            return
        result = {
            "bench": self.bench,
            **describe(self.args.device),
            "ceilings": self.ceilings,
            "rows": self.rows,
            **self.sections,
        }
        with open(self.args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
