"""FlashInfer's calls on torch tensors: batches with wrappers that are planned for them.

Needs: torch, where these are used.
"""

import numpy as np
from raddle import flashinfer

from tests.attention_cases import Batch, assert_close
from tests.reference.attention import Variant

try:
    import torch
except ImportError:
    torch = None

HEADS = dict(num_qo_heads=6, num_kv_heads=2, head_dim=64)
LENGTHS = (40, 0, 1, 300, 16)


VARIANTS = {
    "window": (dict(window_left=20), dict(window_left=20)),
    "cap": (dict(logits_soft_cap=3.0), dict(variant=Variant(soft_cap=3.0))),
    "scale": (dict(sm_scale=0.3), dict(sm_scale=0.3)),
    "alibi": (dict(pos_encoding_mode="ALIBI"), dict(variant=Variant(alibi=True))),
    "rope": (
        dict(pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=5e3),
        dict(variant=Variant(rope=(5e3, 2.0))),
    ),
    "rope defaults": (
        dict(pos_encoding_mode="ROPE_LLAMA"),
        dict(variant=Variant(rope=(1e4, 1.0))),
    ),
}


def to_torch(bits, dtype, device):
    """The torch tensor of what to_bits made."""
    if isinstance(bits, tuple):
        return tuple(to_torch(one, dtype, device) for one in bits)
    if dtype == "bfloat16" or dtype.startswith("float8"):
        bits = bits.view(np.int16) if dtype == "bfloat16" else bits
        return torch.from_numpy(bits).view(getattr(torch, dtype)).to(device)
    return torch.from_numpy(bits).to(device)


def value(x):
    return x.detach().double().cpu().numpy()


def tables(batch, device="cpu"):
    return tuple(
        torch.from_numpy(x).to(device) for x in (batch.indptr, batch.indices, batch.last_page_len)
    )


def workspace(device, size=1 << 20):
    return torch.empty(size, dtype=torch.uint8, device=device)


class Problem:
    """A batch as torch tensors, and a wrapper of either kind that is planned for it."""

    def __init__(self, device, lengths=LENGTHS, seed=0, table_device="cpu", **shape):
        shape = {**HEADS, **shape}
        self.batch = Batch(np.random.default_rng(seed), lengths, **shape)
        batch = self.batch
        self.device, self.layout = device, batch.layout
        self.q = to_torch(batch.q, batch.dtype, device)
        self.cache = to_torch(batch.kv_cache, batch.kv_dtype, device)
        self.tables = tables(batch, table_device)
        self.qo_indptr = torch.from_numpy(batch.qo_indptr).to(table_device)
        self.shape = [*(shape[name] for name in HEADS), batch.page_size]
        self.dtypes = dict(q_data_type=batch.dtype, kv_data_type=getattr(torch, batch.kv_dtype))

    def decode(self, *, use_tensor_cores=False, **options):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace(self.device), self.layout, use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(*self.tables, *self.shape, **self.dtypes, **options)
        return wrapper

    def prefill(self, **options):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace(self.device), self.layout
        )
        wrapper.plan(self.qo_indptr, *self.tables, *self.shape, **self.dtypes, **options)
        return wrapper

    def check(self, result, **options):
        want_out, want_lse = self.batch.expected(**options)
        out, lse = result
        assert out.dtype == self.q.dtype and lse.dtype == torch.float32
        assert_close(value(out), want_out, self.batch.dtype)
        assert_close(value(lse), want_lse, "float16")
