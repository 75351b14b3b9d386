"""Decode and prefill against torch's scaled_dot_product_attention, on the CPU and on a GPU (cuDNN,
flash back ends).

The peer reads contiguous K and V, which flatters it: raddle's cache is paged and shuffled. Needs:
torch."""

import contextlib

import common
import numpy as np
import raddle
import torch
import torch.nn.functional as F
from raddle import _core
from raddle.attention import BatchDecode, BatchPrefill

PAGE = 16
DECODE = [  # batch, kv_len, num_qo_heads, num_kv_heads, head_dim
    (1, 4096, 32, 8, 128),
    (8, 4096, 32, 8, 128),
    (16, 4096, 32, 8, 128),
    (1, 32768, 32, 8, 128),
    (1, 1024, 32, 8, 128),
    (4, 2048, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (64, 1024, 32, 8, 128),
    (64, 4096, 32, 8, 128),
    (32, 4096, 32, 32, 128),
    (32, 4096, 64, 8, 128),
    (32, 4096, 32, 8, 64),
]
PREFILL = [
    (1, 2048, 32, 8, 128),
    (4, 4096, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (1, 16384, 32, 8, 128),
]
CPU_DECODE, CPU_PREFILL = DECODE[:4], PREFILL[:1]


def paged_table(batch, kv_len, seed=0):
    """Shuffled page table of equal requests."""
    pages = -(-kv_len // PAGE)
    order = np.random.default_rng(seed).permutation(batch * pages).astype(np.int32)
    indptr = (np.arange(batch + 1) * pages).astype(np.int32)
    last = np.full(batch, kv_len - (pages - 1) * PAGE, np.int32)
    return indptr, order, last


def peers(device):
    """torch's back ends that exist here, each as (name, context)."""
    if device == "cpu":
        return [("torch sdpa", contextlib.nullcontext)]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return [
        ("torch cudnn", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
        ("torch flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    ]


def random(shape, device, dtype):
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def compare(report, args, case, ours, make_peer, reading=None, **counts):
    """Measures ours against each peer that runs; the row holds the fastest. reading: a third side,
    whose rate is the ceiling of the row."""
    best = None
    for name, context in peers(args.device):
        try:
            with context():
                sides = [ours, make_peer()] + ([reading] if reading else [])
                sides[1][0]()
                ours_us, peer_us, *read_us = common.time_sides(args.device, sides, args.repeat)
        except RuntimeError as error:
            print(f"  {name} does not run here: {str(error).splitlines()[0]}")
            continue
        if best is None or peer_us < best[2]:
            best = (ours_us, name, peer_us)
            if reading:
                counts["ceiling"] = counts["num_bytes"] / read_us[0] / 1e3
    report.add(case, *best, **counts)


def bench_decode(report, args, dtype, batch, kv_len, heads, kv_heads, dim):
    device = args.device
    num_bytes = batch * kv_len * kv_heads * dim * 2 * dtype.itemsize
    copies = common.copies_to_rotate(device, num_bytes)
    indptr, indices, last = paged_table(batch, kv_len)
    name = str(dtype).removeprefix("torch.")
    plan = BatchDecode(
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        page_size=PAGE,
        dtype=name,
        max_batch=batch,
        max_pages=len(indices),
        device=device,
    )
    plan.plan(indptr, indices, last)
    q = random((batch, heads, dim), device, dtype)
    out = torch.empty_like(q)
    caches = [random((len(indices), 2, PAGE, kv_heads, dim), device, dtype) for _ in range(copies)]
    ours = [lambda c=c: plan.run(q, c, out=out) for c in caches]
    keys = [
        [random((batch, kv_heads, kv_len, dim), device, dtype) for _ in range(2)]
        for _ in range(copies)
    ]
    # torch's CPU kernel is several times faster when a group's heads are given as query rows.
    grouped = device == "cpu"
    query = q.view(batch, kv_heads, heads // kv_heads, dim) if grouped else q[:, :, None, :]
    query = query.contiguous()

    def make_peer():
        return [
            lambda k=k, v=v: F.scaled_dot_product_attention(query, k, v, enable_gqa=not grouped)
            for k, v in keys
        ]

    case = f"decode {name} B{batch} x {kv_len} {heads}/{kv_heads} d{dim}"
    # A host's ceiling moves: it is measured along. A card's does not.
    reading = common.reading(device, num_bytes) if device == "cpu" else None
    ceiling = report.ceilings["read GB/s"]
    compare(report, args, case, ours, make_peer, reading, num_bytes=num_bytes, ceiling=ceiling)


def bench_prefill(report, args, dtype, batch, length, heads, kv_heads, dim):
    device = args.device
    indptr, indices, last = paged_table(batch, length)
    name = str(dtype).removeprefix("torch.")
    tokens = batch * length
    plan = BatchPrefill(
        num_qo_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        page_size=PAGE,
        dtype=name,
        causal=True,
        max_batch=batch,
        max_pages=len(indices),
        max_qo_tokens=tokens,
        device=device,
    )
    plan.plan((np.arange(batch + 1) * length).astype(np.int32), indptr, indices, last)
    q = random((tokens, heads, dim), device, dtype)
    out = torch.empty_like(q)
    cache = random((len(indices), 2, PAGE, kv_heads, dim), device, dtype)
    k, v = (random((batch, kv_heads, length, dim), device, dtype) for _ in range(2))
    query = q.view(batch, length, heads, dim).transpose(1, 2).contiguous()

    def make_peer():
        return [
            lambda: F.scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)
        ]

    flops = 4 * batch * heads * dim * length * length / 2
    case = f"prefill {name} B{batch} x {length} {heads}/{kv_heads} d{dim} causal"
    ceiling = report.ceilings[f"{name} matmul TFLOP/s"]
    compare(
        report,
        args,
        case,
        [lambda: plan.run(q, cache, out=out)],
        make_peer,
        flops=flops,
        ceiling=ceiling,
    )


def main():
    args = common.parse_args(__doc__)
    if args.device == "cpu":
        torch.set_num_threads(_core.settings()["cpu_threads"])
    dtypes = [torch.bfloat16] if args.device == "cuda" else [torch.bfloat16, torch.float32]
    ceilings = {"read GB/s": common.measure_read(args.device, 512 << 20, args.repeat)}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        ceilings[f"{name} matmul TFLOP/s"] = common.measure_matmul(args.device, dtype, args.repeat)
    report = common.Report("attention", args, ceilings)
    decode, prefill = (CPU_DECODE, CPU_PREFILL) if args.device == "cpu" else (DECODE, PREFILL)
    for dtype in dtypes:
        for shape in decode[:2] if args.quick else decode:
            bench_decode(report, args, dtype, *shape)
        for shape in prefill[:1] if args.quick else prefill:
            bench_prefill(report, args, dtype, *shape)
    report.write()


if __name__ == "__main__":
    print(f"raddle {raddle.__version__}, torch {torch.__version__}")
    main()
