"""Paged decode against FlashInfer and torch's attention (cuDNN on a GPU): the named rows, errors
against float64, and a scan over batch and length.

All sides read the same memory, torch as if it were contiguous, which flatters it. "read" is a
kernel that only reads the same bytes: what is left where that is no faster is the machine's.
FlashInfer is measured where it can be imported; build its kernels first (--warm-peers). Needs:
torch."""

import dataclasses
import sys

import common
import decode_cases
import flashinfer_peer
import raddle
import torch
from decode_sides import (
    Data,
    exact_output,
    raddle_calls,
    read_calls,
    torch_calls,
    torch_output,
)
from raddle import _core

PARTS = ("rows", "errors", "scan")
SMALL_BYTES = 64 << 20  # up to here a step is short enough for its launch to count
SCAN_REPEAT = 9
OURS = "raddle"


def add_arguments(parser):
    parser.add_argument("--rows", metavar="NAME,...", help="only these rows")
    parser.add_argument("--parts", metavar="PART,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--warm-peers", action="store_true", help="only build FlashInfer's kernels, all at once"
    )


def torch_name(device):
    return "torch cudnn" if device == "cuda" else "torch sdpa"


def make_data(case, device):
    return Data(case, device, common.copies_to_rotate(device, case.num_bytes))


def flashinfer_sides(case, data, **switches):
    if data.device == "cpu":
        return {}
    return {
        flashinfer_peer.NAMES[mode]: lambda m=mode: flashinfer_peer.calls(case, data, m)
        for mode in flashinfer_peer.modes(case, **switches)
    }


def row_sides(case, data):
    """What is measured for a row, as name -> maker of its closures. Ours come first, peers last."""
    device = data.device
    makers = {OURS: lambda: raddle_calls(case, data)}
    if device == "cuda" and case.num_bytes <= SMALL_BYTES:
        makers[f"{OURS}, no pdl"] = lambda: raddle_calls(case, data, pdl=False)
    makers["read"] = lambda: read_calls(case, data)
    with_batch_attention = case.name in decode_cases.BATCH_ATTENTION_ROWS
    makers |= flashinfer_sides(case, data, with_batch_attention=with_batch_attention)
    if case.kv_dtype == case.dtype:
        if case.is_contiguous:
            makers[torch_name(device)] = lambda: torch_calls(case, data)
        return makers
    # torch has no attention over fp8: on the CPU its 16-bit one is the peer, on a GPU ours is.
    wide = dataclasses.replace(case, kv_dtype=case.dtype)
    wide_data = make_data(wide, device)
    if device == "cuda":
        makers[f"{OURS}, {wide.kv_dtype} K/V"] = lambda: raddle_calls(wide, wide_data)
    else:
        name = f"{torch_name(device)}, {wide.kv_dtype} K/V"
        makers[name] = lambda: torch_calls(wide, wide_data)
    return makers


def measure(device, makers, repeat):
    """({side: median us}, {side: why it did not run}), sides interleaved."""
    sides, failed = {}, {}
    for name, make in makers.items():
        try:
            calls = make()
            calls[0]()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # a peer may raise anything, and ours is a row that failed
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  {name} does not run: {failed[name]}")
        else:
            sides[name] = calls
    times = common.time_sides(device, list(sides.values()), repeat) if sides else []
    return dict(zip(sides, times)), failed


def is_peer(name):
    return not name.startswith(OURS) and name != "read"


def bench_row(report, args, case):
    device = args.device
    data = make_data(case, device)
    us, failed = measure(device, row_sides(case, data), args.repeat)
    facts = dict(sides_us=us, failed=failed, shape=dataclasses.asdict(case))
    if OURS not in us:
        report.sections.setdefault("failed_rows", []).append(dict(case=case.name, **facts))
        return
    peers = {name: time for name, time in us.items() if is_peer(name)}
    best = min(peers, key=peers.get, default=None)
    facts["ratios"] = {name: time / us[OURS] for name, time in us.items() if name != OURS}
    # A host's ceiling moves: it is measured along. A card's does not.
    cache_bytes = data.caches[0].nbytes
    ceiling = report.ceilings["read GB/s"] if device == "cuda" else cache_bytes / us["read"] / 1e3
    counts = dict(num_bytes=case.num_bytes, ceiling=ceiling)
    report.add(f"decode {case.name}", us[OURS], best, peers.get(best), **counts, **facts)
    others = {name: time for name, time in us.items() if name not in (OURS, best)}
    print("  " + ", ".join(f"{name} {time:.2f}" for name, time in others.items()), flush=True)


def error_sides(case, data):
    """name -> a function that gives the result."""
    makers = {OURS: lambda: raddle_calls(case, data)} | flashinfer_sides(case, data)
    runs = {name: lambda make=make: make()[0]() for name, make in makers.items()}
    return runs | {torch_name(data.device): lambda: torch_output(case, data)}


def bench_errors(report, args):
    """The largest and the root mean square distance from float64 of each side, the same inputs."""
    rows = report.sections["errors"] = []
    print(f"{'error against float64':24} {'side':16} {'max':>10} {'rms':>10} {'rms rounded':>11}")
    for case in decode_cases.ERROR_CASES:
        data = Data(case, args.device)
        exact = exact_output(case, data)
        floor = (exact.to(data.q.dtype).double() - exact).square().mean().sqrt().item()
        for name, run in error_sides(case, data).items():
            try:
                distance = (run().double() - exact).abs()
            except Exception as error:
                rows.append(dict(case=case.name, side=name, failed=f"{error}".splitlines()[0]))
                print(f"{case.name:24} {name:16} does not run: {rows[-1]['failed']}")
                continue
            largest, rms = distance.max().item(), distance.square().mean().sqrt().item()
            rows.append(dict(case=case.name, side=name, max=largest, rms=rms, floor_rms=floor))
            print(f"{case.name:24} {name:16} {largest:10.2e} {rms:10.2e} {floor:11.2e}", flush=True)


def bench_scan(report, args):
    """Cost against size; plot_decode.py draws it."""
    rows = report.sections["scan"] = []
    cases = decode_cases.scan_cases()
    for case in cases[:: 5 if args.quick else 1]:
        data = make_data(case, args.device)
        makers = {OURS: lambda c=case, d=data: raddle_calls(c, d)} | flashinfer_sides(case, data)
        us, failed = measure(args.device, makers, SCAN_REPEAT)
        facts = dict(batch=case.batch, kv_len=case.lens[0], bytes=case.num_bytes)
        rows.append(dict(**facts, sides_us=us, failed=failed))
        times = ", ".join(f"{name} {time:.2f} us" for name, time in us.items())
        print(f"scan {case.name:14} {case.num_bytes / 1e6:9.1f} MB  {times}", flush=True)
        del data, makers
        torch.cuda.empty_cache()  # blocks of one size do not serve the next


def chosen(args):
    """(parts, rows) that the arguments name."""
    parts = args.parts.split(",") if args.parts else PARTS[: 3 if args.device == "cuda" else 2]
    cuda = args.device == "cuda"
    rows = decode_cases.CUDA_ROWS if cuda else decode_cases.CPU_ROWS
    quick = decode_cases.CUDA_QUICK if cuda else decode_cases.CPU_QUICK
    wanted = args.rows.split(",") if args.rows else quick if args.quick else None
    unknown = set(parts) - set(PARTS) | set(wanted or ()) - {case.name for case in rows}
    if unknown:
        names = ", ".join(case.name for case in rows)
        sys.exit(f"unknown: {', '.join(unknown)}. Parts: {', '.join(PARTS)}. Rows: {names}")
    if args.rows and not args.parts:
        parts = ("rows",)
    return parts, [case for case in rows if wanted is None or case.name in wanted]


def main():
    args = common.parse_args(__doc__, extend=add_arguments)
    if args.warm_peers:
        sys.exit(flashinfer_peer.warm())
    parts, cases = chosen(args)
    if args.device == "cpu":
        torch.set_num_threads(_core.settings()["cpu_threads"])
    torch.manual_seed(0)
    ceilings = {"read GB/s": common.measure_read(args.device, 512 << 20, args.repeat)}
    report = common.Report("decode", args, ceilings)
    try:
        for case in cases if "rows" in parts else []:
            bench_row(report, args, case)
        if "errors" in parts:
            bench_errors(report, args)
        if "scan" in parts:
            bench_scan(report, args)
    finally:
        report.write()
    if "failed_rows" in report.sections:
        sys.exit("failed: " + ", ".join(row["case"] for row in report.sections["failed_rows"]))


if __name__ == "__main__":
    print(f"raddle {raddle.__version__}, torch {torch.__version__}")
    main()
