"""FlashInfer as a peer: its wrappers planned for a decode case, and its kernels built ahead.

Optional: load() says why it cannot be used. Its kernels are compiled by nvcc when first planned, 20
to 90 s each. Run as a program (raddle need not be built yet), or by bench_decode.py --warm-peers,
this plans a tiny case of each in processes of their own, all at once."""

import functools
import importlib
import subprocess
import sys
import time
import types

import decode_cases
import numpy as np

WORKSPACE_BYTES = 512 << 20
# kernel -> (wrapper, type of K and V); the tensor-core decode kernel is that of its prefill.
KERNELS = {
    "cc": ("cc", "bfloat16"),
    "tc": ("tc", "bfloat16"),
    "ba": ("ba", "bfloat16"),
    "cc-fp8": ("cc", decode_cases.FP8),
    "tc-fp8": ("tc", decode_cases.FP8),
}
NAMES = {"cc": "flashinfer cc", "tc": "flashinfer tc", "ba": "flashinfer BatchAttention"}


@functools.cache
def load():
    """The module, or None, said once."""
    try:
        module = importlib.import_module("flashinfer")
    except Exception as error:  # its import fails in many ways
        print(f"flashinfer is no peer here: {type(error).__name__}: {error}")
        return None
    if not hasattr(module, "jit"):
        print(f"flashinfer is no peer here: {module.__file__} is not FlashInfer")
        return None
    return module


@functools.cache
def workspace():
    import torch

    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def decode_wrapper(mode):
    """Its wrapper for one query token each; mode: "cc" (CUDA cores) or "tc" (tensor cores)."""
    if mode == "cc":
        return load().BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD")
    return load().BatchDecodeWithPagedKVCacheWrapper(
        workspace(), "NHD", use_tensor_cores=True, backend="fa2"
    )


def calls(case, data, mode):
    """Closures over data.caches. mode: "cc", "tc" or "ba" (BatchAttention)."""
    import torch

    indptr, indices, last = (torch.as_tensor(x) for x in data.table)
    qo_indptr = torch.as_tensor(case.qo_indptr())
    indices = indices.cuda()
    shape = (case.heads, case.kv_heads, case.dim)
    dtypes = dict(
        q_data_type=getattr(torch, case.dtype), kv_data_type=getattr(torch, case.kv_dtype)
    )
    q, out = data.q, data.out
    if mode == "ba":
        wrapper = load().BatchAttention("NHD")
        lens = torch.tensor(case.lens, dtype=torch.int32).cuda()
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
        table = (qo_indptr.cuda(), indptr.cuda(), indices, lens)
        wrapper.plan(*table, *shape, case.dim, case.page, causal=True, **dtypes)
        return [lambda c=c: wrapper.run(q, c, out=out, lse=lse) for c in data.caches]
    if case.qo_len == 1:
        wrapper = decode_wrapper(mode)
        wrapper.plan(indptr, indices, last, *shape, case.page, **dtypes)
    else:
        wrapper = load().BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="fa2")
        table = (qo_indptr.cuda(), indptr.cuda(), indices, last.cuda())
        wrapper.plan(*table, *shape, case.page, causal=True, **dtypes)
    return [lambda c=c: wrapper.run(q, c, out=out) for c in data.caches]


def modes(case, with_batch_attention=False):
    """Which of its kernels take a case; none where they would be built for one row alone."""
    if case.dim != 128 or load() is None:
        return []
    if case.qo_len > 1:
        return ["tc"]
    return ["cc", "tc", "ba"] if with_batch_attention else ["cc", "tc"]


def host_calls(batch, pages_each, heads):
    """(plan, run) of its CUDA-core decode wrapper for bench_overhead.py: short requests."""
    import torch

    wrapper = decode_wrapper("cc")
    pages = batch * pages_each
    indptr = (torch.arange(batch + 1) * pages_each).int()
    indices = torch.as_tensor(np.random.default_rng(0).permutation(pages)).int().cuda()
    last = torch.ones(batch, dtype=torch.int32)
    q = torch.zeros(batch, heads["num_qo_heads"], heads["head_dim"], device="cuda").bfloat16()
    cache = torch.zeros(pages, 2, 16, heads["num_kv_heads"], heads["head_dim"], device="cuda")
    cache, out = cache.bfloat16(), torch.empty_like(q)
    dtypes = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)

    def plan():
        wrapper.plan(indptr, indices, last, *heads.values(), 16, **dtypes)

    plan()
    return plan, lambda: wrapper.run(q, cache, out=out)


def build(kernel):
    """Compile one of KERNELS by planning and running a tiny case."""
    import torch

    mode, kv_dtype = KERNELS[kernel]
    case = decode_cases.equal(2, 64, kv_dtype=kv_dtype)
    q = torch.zeros(case.batch, case.heads, case.dim, dtype=torch.bfloat16, device="cuda")
    cache = torch.zeros(case.cache_shape, device="cuda").to(getattr(torch, kv_dtype))
    data = types.SimpleNamespace(
        q=q, out=torch.empty_like(q), caches=[cache], table=case.page_table()
    )
    calls(case, data, mode)[0]()
    torch.cuda.synchronize()


def warm():
    """Build all kernels, each in a process of its own; returns how many failed."""
    started = time.perf_counter()
    running = {
        kernel: subprocess.Popen([sys.executable, __file__, kernel], stderr=subprocess.STDOUT)
        for kernel in KERNELS
    }
    failed = 0
    for kernel, process in running.items():
        status = process.wait()
        failed += status != 0
        seconds = time.perf_counter() - started
        print(f"flashinfer {kernel}: {'failed' if status else 'built'} by {seconds:.0f} s")
    return failed


if __name__ == "__main__":
    sys.exit(build(sys.argv[1]) if sys.argv[1:] else warm())
