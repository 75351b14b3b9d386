"""Linear layers and the small operations of a transformer against torch's own, on the CPU and on a
GPU.

The peers of rotary embedding and of filtered sampling are the usual few lines of torch. Needs:
torch."""

import itertools

import common
import raddle
import torch
import torch.nn.functional as F
from raddle import ops

LINEAR = [(14336, 4096), (4096, 14336)]  # out_features, in_features
LINEAR_ROWS = [1, 4, 16, 64, 256]
ROWS = {"cpu": [1, 16, 512], "cuda": [1, 64, 4096]}
VOCAB = 128256
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128


def random(shape, device, dtype=torch.bfloat16):
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def rotate(args, num_bytes, make):
    """Closures over copies of a working set that do not fit in the cache together."""
    return [make() for _ in range(common.copies_to_rotate(args.device, num_bytes))]


def compare(report, args, case, num_bytes, make, peer, **counts):
    """make() -> (our call, the peer's), over fresh data."""
    pairs = rotate(args, num_bytes, make)
    ours_us, peer_us = common.time_sides(args.device, list(zip(*pairs)), args.repeat)
    report.add(case, ours_us, peer, peer_us, num_bytes=num_bytes, **counts)


def bench_linear(report, args, dtype):
    shapes = LINEAR[:1] if args.quick else LINEAR
    for (n, k), m in itertools.product(shapes, LINEAR_ROWS):
        element = torch.finfo(dtype).bits // 8
        num_bytes = (n * k + m * (n + k)) * element
        flops = 2 * m * n * k

        def make(n=n, k=k, m=m):
            weight, x = random((n, k), args.device, dtype), random((m, k), args.device, dtype)
            out = torch.empty((m, n), device=args.device, dtype=dtype)
            layer = ops.Linear(weight)
            return lambda: layer(x, out=out), lambda: F.linear(x, weight)

        is_memory_bound = m <= 16
        counts = {"ceiling": report.ceilings["read GB/s"]} if is_memory_bound else {
            "flops": flops,
            "ceiling": report.ceilings[f"matmul {str(dtype)[6:]} TFLOP/s"],
        }  # fmt: skip
        name = f"linear {n}x{k} m={m} {str(dtype)[6:]}"
        compare(report, args, name, num_bytes, make, "torch linear", **counts)


def bench_norms(report, args, n):
    ceiling = {"ceiling": report.ceilings["read GB/s"]}

    def make_norm():
        x, weight = random((n, HIDDEN), args.device), random(HIDDEN, args.device)
        out = torch.empty_like(x)
        return (
            lambda: ops.rmsnorm(x, weight, out=out),
            lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-6),
        )

    def make_fused():
        x, residual = random((n, HIDDEN), args.device), random((n, HIDDEN), args.device)
        weight = random(HIDDEN, args.device)

        def peer():
            residual.add_(x)
            x.copy_(F.rms_norm(residual, (HIDDEN,), weight, 1e-6))

        return lambda: ops.fused_add_rmsnorm(x, residual, weight), peer

    row = HIDDEN * 2
    compare(report, args, f"rmsnorm n={n} d={HIDDEN}", 2 * n * row, make_norm, "torch", **ceiling)
    compare(report, args, f"fused_add_rmsnorm n={n}", 4 * n * row, make_fused, "torch", **ceiling)


def bench_rope(report, args, n):
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def make():
        qkv = random((n, width), args.device)
        q = qkv[:, : HEADS * HEAD_DIM].view(n, HEADS, HEAD_DIM)
        k = qkv[:, HEADS * HEAD_DIM : (HEADS + KV_HEADS) * HEAD_DIM].view(n, KV_HEADS, HEAD_DIM)
        positions = torch.arange(n, device=args.device)
        table = ops.rope_cos_sin_cache(max(n, 4096), HEAD_DIM, device=args.device)
        cos_sin = torch.from_dlpack(table)

        def peer():
            cos, sin = cos_sin[positions].to(q.dtype)[:, None].chunk(2, -1)
            for x in (q, k):
                a, b = x.chunk(2, -1)
                x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))

        return lambda: ops.apply_rope(q, k, positions, cos_sin), peer

    num_bytes = 2 * n * (HEADS + KV_HEADS) * HEAD_DIM * 2
    ceiling = report.ceilings["read GB/s"]
    compare(report, args, f"apply_rope n={n}", num_bytes, make, "torch", ceiling=ceiling)


def bench_activation(report, args, n):
    def make():
        x = random((n, 2 * INNER), args.device)
        out = torch.empty((n, INNER), device=args.device, dtype=x.dtype)
        gate, up = x[:, :INNER], x[:, INNER:]
        return lambda: ops.silu_and_mul(x, out=out), lambda: F.silu(gate) * up

    ceiling = report.ceilings["read GB/s"]
    case = f"silu_and_mul n={n} d={INNER}"
    compare(report, args, case, 3 * n * INNER * 2, make, "torch", ceiling=ceiling)


def bench_embedding(report, args, n):
    table = random((32000, HIDDEN), args.device)

    def make():
        ids = torch.randint(0, 32000, (n,), device=args.device)
        out = torch.empty((n, HIDDEN), device=args.device, dtype=table.dtype)
        return lambda: ops.embedding(ids, table, out=out), lambda: F.embedding(ids, table)

    ceiling = report.ceilings["read GB/s"]
    compare(report, args, f"embedding n={n}", 2 * n * HIDDEN * 2, make, "torch", ceiling=ceiling)


def filtered_sample(logits, top_k, top_p):
    """By sorting, as serving engines did it before rejection sampling."""
    values, order = logits.sort(dim=-1, descending=True)
    values[:, top_k:] = -torch.inf
    p = values.softmax(-1)
    p[p.cumsum(-1) - p > top_p] = 0
    return order.gather(1, torch.multinomial(p, 1))


def bench_logits(report, args, n):
    logits = random((n, VOCAB), args.device, torch.float32) * 3
    ids = torch.zeros(n, dtype=torch.int64, device=args.device)
    probabilities = torch.empty_like(logits)
    out = torch.empty(n, dtype=torch.int32, device=args.device)
    cases = {
        "softmax": (
            lambda: ops.softmax(logits, out=probabilities),
            lambda: logits.softmax(-1),
        ),
        "sample greedy": (
            lambda: ops.sample(logits, temperature=0, out=out),
            lambda: logits.argmax(-1),
        ),
        "sample": (
            lambda: ops.sample(logits, out=out),
            lambda: torch.multinomial(logits.softmax(-1), 1),
        ),
        "sample top_k=50 top_p=0.9": (
            lambda: ops.sample(logits, top_k=50, top_p=0.9, out=out),
            lambda: filtered_sample(logits, 50, 0.9),
        ),
        "token_logprobs top=5": (
            lambda: ops.token_logprobs(logits, ids, top=5),
            lambda: logits.log_softmax(-1).topk(5),
        ),
    }
    for name, sides in cases.items():
        times = common.time_sides(args.device, [[side] for side in sides], args.repeat)
        num_bytes = n * VOCAB * 4 * (2 if name == "softmax" else 1)
        case = f"{name} n={n} vocab={VOCAB} float32"
        ceiling = report.ceilings["read GB/s"]
        report.add(case, times[0], "torch", times[1], num_bytes=num_bytes, ceiling=ceiling)


def main():
    args = common.parse_args(__doc__)
    torch.manual_seed(0)
    dtypes = [torch.bfloat16] if args.device == "cuda" or args.quick else [
        torch.bfloat16,
        torch.float32,
    ]  # fmt: skip
    ceilings = {"read GB/s": common.measure_read(args.device, 1 << 27, args.repeat)}
    for dtype in dtypes:
        name = f"matmul {str(dtype)[6:]} TFLOP/s"
        ceilings[name] = common.measure_matmul(args.device, dtype, args.repeat)
    report = common.Report("ops", args, ceilings)
    print(f"raddle {raddle.__version__}, torch {torch.__version__}")
    with torch.no_grad():
        for dtype in dtypes:
            bench_linear(report, args, dtype)
        for n in ROWS[args.device][: 2 if args.quick else None]:
            bench_norms(report, args, n)
            bench_rope(report, args, n)
            bench_activation(report, args, n)
            bench_embedding(report, args, n)
        for n in (1, 16) if args.device == "cpu" else (1, 64):
            bench_logits(report, args, n)
    report.write()


if __name__ == "__main__":
    main()
