"""Tiny shapes of every kernel of the attention family, for compute-sanitizer; see .ci/gpu.

Needs: a GPU. No torch: its own kernels would be checked too, slowly.
"""

import numpy as np
import raddle
from raddle.attention import (
    BatchDecode,
    BatchPrefill,
    append_paged_kv_cache,
    append_slots,
    merge_states,
)

from tests.attention_cases import Batch, assert_close, from_bits


def put(array, dtype=None):
    return raddle.tensor(array, dtype=dtype, device="cuda")


def check_attention(rng, **case):
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=case.pop("head_dim", 64))
    chunk = case.pop("fixed_chunk", 0)
    batch = Batch(rng, [0, 1, 17, 300], **case, **heads)
    limits = dict(page_size=16, max_batch=4, max_pages=40, fixed_chunk=chunk, device="cuda")
    if case.get("qo_lens") is None:
        plan = BatchDecode(**limits, **heads)
        plan.plan(batch.indptr, batch.indices, batch.last_page_len)
    else:
        plan = BatchPrefill(max_qo_tokens=sum(batch.qo_lens), causal=True, **limits, **heads)
        plan.plan(batch.qo_indptr, batch.indptr, batch.indices, batch.last_page_len)
    out = plan.run(put(batch.q, "bfloat16"), put(batch.kv_cache, "bfloat16"))
    got = from_bits(out.to("cpu").numpy(), "bfloat16")
    assert_close(got, batch.expected(causal=case.get("qo_lens") is not None)[0], "bfloat16")


def main():
    rng = np.random.default_rng(0)
    for head_dim in (64, 80, 128, 256):
        check_attention(rng, head_dim=head_dim)
        check_attention(rng, head_dim=head_dim, qo_lens=[2, 1, 5, 70])
    check_attention(rng, fixed_chunk=64)
    check_attention(rng, fixed_chunk=64, qo_lens=[2, 1, 5, 70])
    cache = put(np.zeros((3, 2, 4, 2, 16), np.float16))
    rows = put(np.ones((3, 2, 16), np.float16))
    append_slots(rows, rows, put(np.array([0, -1, 11])), cache)
    table = (put(np.array([2, 0], np.int32)), put(np.array([0, 2], np.int32)))
    append_paged_kv_cache(
        rows, rows, put(np.zeros(3, np.int32)), put(np.arange(3, dtype=np.int32)), cache, *table
    )
    merge_states(put(np.ones((2, 3, 2, 24), np.float32)), put(np.zeros((2, 3, 2), np.float32)))
    print("all close to the reference")


if __name__ == "__main__":
    main()
