"""Prefill against torch's scaled_dot_product_attention, on the CPU and on a GPU (cuDNN, flash back
ends). Decode has bench_decode.py.

The peer reads contiguous K and V, which flatters it: raddle's cache is paged and shuffled. Needs:
torch."""

import contextlib

import common
import numpy as np
import raddle
import torch
import torch.nn.functional as F
from raddle import _core
from raddle.attention import BatchPrefill

PAGE = 16
PREFILL = [  # batch, length, num_qo_heads, num_kv_heads, head_dim
    (1, 2048, 32, 8, 128),
    (4, 4096, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (1, 16384, 32, 8, 128),
]
CPU_PREFILL = PREFILL[:1]


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


def compare(report, args, case, ours, make_peer, **counts):
    """Measures ours against each peer that runs; the row holds the fastest."""
    best = None
    for name, context in peers(args.device):
        try:
            with context():
                peer = make_peer()
                peer[0]()
                ours_us, peer_us = common.time_sides(args.device, [ours, peer], args.repeat)
        except RuntimeError as error:
            print(f"  {name} does not run here: {str(error).splitlines()[0]}")
            continue
        if best is None or peer_us < best[2]:
            best = (ours_us, name, peer_us)
    report.add(case, *best, **counts)


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
    ceilings = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        ceilings[f"{name} matmul TFLOP/s"] = common.measure_matmul(args.device, dtype, args.repeat)
    report = common.Report("attention", args, ceilings)
    prefill = CPU_PREFILL if args.device == "cpu" else PREFILL
    for dtype in dtypes:
        for shape in prefill[:1] if args.quick else prefill:
            bench_prefill(report, args, dtype, *shape)
    report.write()


if __name__ == "__main__":
    print(f"raddle {raddle.__version__}, torch {torch.__version__}")
    main()
