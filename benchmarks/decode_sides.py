"""The sides of bench_decode.py: each takes a case and its data and gives closures, one per cache of
the rotation, that run one decode step.

All sides read the same memory: torch's attention sees a cache as contiguous K and V. Needs:
torch."""

import torch
import torch.nn.functional as F
from raddle import _core
from raddle.attention import BatchDecode, BatchPrefill


class Data:
    """Random queries and copies of a random cache on a device, and the page table on the host."""

    def __init__(self, case, device, copies=1):
        self.device = device
        shape = (case.batch * case.qo_len, case.heads, case.dim)
        self.q = random(shape, device, getattr(torch, case.dtype)) * case.q_scale
        self.out = torch.empty_like(self.q)
        cache = random(case.cache_shape, device, getattr(torch, case.kv_dtype))
        self.caches = [cache] + [cache.clone() for _ in range(copies - 1)]
        self.table = case.page_table()


def random(shape, device, dtype):
    drawn = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return torch.empty(shape, device=device, dtype=drawn).normal_().to(dtype)


def raddle_calls(case, data, **switches):
    """Ours; switches are further keywords of the plan."""
    spec = dict(
        num_qo_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.dim,
        page_size=case.page,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        max_batch=case.batch,
        max_pages=case.num_pages,
        device=data.device,
        **switches,
    )
    if case.qo_len == 1:
        plan = BatchDecode(**spec)
        plan.plan(*data.table)
    else:
        tokens = case.batch * case.qo_len
        plan = BatchPrefill(causal=True, max_qo_tokens=tokens, max_qo_len=case.qo_len, **spec)
        plan.plan(case.qo_indptr(), *data.table)
    return [lambda c=c: plan.run(data.q, c, out=data.out) for c in data.caches]


def read_calls(case, data):
    """Nothing but reads of the same bytes."""
    blocks = [cache.view(torch.uint8) for cache in data.caches]
    return [lambda b=block: _core.memory_read(b) for block in blocks]


def sdpa(q, k, v, mask=None):
    """torch's attention, on a GPU by cuDNN."""
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def causal_mask(case, kv_len, device):
    """[qo_len, kv_len], true where a query sees a key: aligned to the bottom right."""
    if case.qo_len == 1:
        return None
    seen = torch.ones(case.qo_len, kv_len, dtype=torch.bool, device=device)
    return seen.tril(kv_len - case.qo_len)


def torch_calls(case, data):
    """torch's attention over contiguous K and V of equal requests."""
    length = case.lens[0]
    q = data.q.view(case.batch, case.qo_len, case.heads, case.dim).transpose(1, 2).contiguous()
    if data.device == "cpu":
        # Several times faster there when the heads of a group are given as query rows.
        q = data.q.view(case.batch, case.kv_heads, -1, case.dim)
    mask = causal_mask(case, length, data.device)
    shape = (2, case.batch, case.kv_heads, length, case.dim)
    pairs = [cache.view(shape) for cache in data.caches]
    return [lambda k=k, v=v: sdpa(q, k, v, mask) for k, v in pairs]


def request(case, data, i, dtype):
    """(q [qo_len, heads, dim], k, v [kv_len, kv_heads, dim]) of one request, gathered."""
    indptr, indices, _ = data.table
    pages = torch.as_tensor(indices[indptr[i] : indptr[i + 1]]).long().to(data.device)
    kv = data.caches[0][pages].to(dtype).transpose(0, 1)
    k, v = kv.reshape(2, -1, case.kv_heads, case.dim)[:, : case.lens[i]]
    return data.q[i * case.qo_len : (i + 1) * case.qo_len].to(dtype), k, v


def torch_output(case, data):
    """The result of torch's attention, request by request, in q's type."""
    rows = []
    for i, length in enumerate(case.lens):
        gathered = request(case, data, i, data.q.dtype)
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in gathered)
        rows.append(sdpa(q, k, v, causal_mask(case, length, data.device))[0].transpose(0, 1))
    return torch.cat(rows)


def exact_output(case, data):
    """The result in float64, from the definition."""
    rows = []
    for i, length in enumerate(case.lens):
        q, k, v = request(case, data, i, torch.float64)
        q = q.view(case.qo_len, case.kv_heads, -1, case.dim)
        logits = torch.einsum("nhgd,lhd->hgnl", q, k) / case.dim**0.5
        mask = causal_mask(case, length, data.device)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        rows.append(torch.einsum("hgnl,lhd->nhgd", logits.softmax(-1), v))
    return torch.cat(rows).view(-1, case.heads, case.dim)
