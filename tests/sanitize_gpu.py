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


VARIANT = """
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    return logit + v->bias.data[row->qo_head * v->bias.stride[0] + kv_index];
}
bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index) {
    return kv_index % 3 != 1;
}
raddle_pair raddle_variant_key(const raddle_variant *v, const raddle_key *key, int32_t dim,
                               raddle_pair x) {
    return x;
}
"""


def check_variants(rng):
    """The hooks and 8-bit K/V: numbers are compared elsewhere, here nothing may go astray."""
    variant = raddle.Variant("biased", VARIANT, tensors=["bias"])
    bias = put(rng.standard_normal((8, 300)).astype(np.float32))
    sinks = put(rng.standard_normal(8).astype(np.float32))
    built_ins = dict(logits_soft_cap=4.0, sinks=True)
    for kv_dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        for spec, run in (
            (dict(built_ins, pos_encoding="ROPE"), dict(sinks=sinks)),
            (dict(built_ins, pos_encoding="ALIBI"), dict(sinks=sinks)),
            (dict(variant=variant), dict(variant_args=dict(bias=bias))),
            (dict(weights="sigmoid"), {}),
        ):
            check_variant(rng, kv_dtype, spec, run)


def check_variant(rng, kv_dtype, spec, run):
    heads = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64)
    batch = Batch(rng, [0, 1, 17, 300], **heads)
    cache = batch.kv_cache
    if kv_dtype != "bfloat16":
        cache = (rng.integers(0, 60, cache.shape)).astype(np.uint8)
    for qo_len in (1, 4, 20):
        plan = (
            BatchPrefill(
                max_qo_tokens=4 * qo_len,
                max_qo_len=qo_len,
                page_size=16,
                max_batch=4,
                max_pages=40,
                kv_dtype=kv_dtype,
                device="cuda",
                **heads,
                **spec,
            )
            if qo_len > 1
            else BatchDecode(
                page_size=16,
                max_batch=4,
                max_pages=40,
                kv_dtype=kv_dtype,
                device="cuda",
                **heads,
                **spec,
            )
        )
        table = (batch.indptr, batch.indices, batch.last_page_len)
        if qo_len > 1:
            plan.plan(np.arange(5, dtype=np.int32) * qo_len, *table)
        else:
            plan.plan(*table)
        q = put(np.full((4 * qo_len, 8, 64), 0x3F80, np.uint16), "bfloat16")
        plan.run(q, put(cache, kv_dtype), **run)


def check_widths(rng):
    """Items of 1 to 8 heads, some of them cut; planned on the host, and on the GPU."""
    heads = dict(num_qo_heads=16, num_kv_heads=8, head_dim=64)
    for workers, lens in ((0, [900, 3]), (4, [100, 0, 90, 17]), (3, [300, 200])):
        batch = Batch(rng, lens, **heads)
        plan = BatchDecode(
            page_size=16, max_batch=4, max_pages=80, max_ctas=workers, device="cuda", **heads
        )
        table = (batch.indptr, batch.indices, batch.last_page_len)
        for on_device in (False, True):
            given = [put(x) for x in table] if on_device else table
            plan.plan(*given, on_device=on_device)
            out = plan.run(put(batch.q, "bfloat16"), put(batch.kv_cache, "bfloat16"))
            got = from_bits(out.to("cpu").numpy(), "bfloat16")
            assert_close(got, batch.expected()[0], "bfloat16")


def check_rows(rng):
    """Tiles of 16 to 32 rows of a K/V head, of which some requests are cut."""
    for group_size, head_dim in ((16, 128), (24, 128), (32, 128), (32, 64)):
        heads = dict(num_qo_heads=2 * group_size, num_kv_heads=2, head_dim=head_dim)
        batch = Batch(rng, [0, 1, 17, 700], **heads)
        plan = BatchDecode(page_size=16, max_batch=80, max_pages=80, device="cuda", **heads)
        plan.plan(batch.indptr, batch.indices, batch.last_page_len)
        out = plan.run(put(batch.q, "bfloat16"), put(batch.kv_cache, "bfloat16"))
        got = from_bits(out.to("cpu").numpy(), "bfloat16")
        assert_close(got, batch.expected()[0], "bfloat16")


def main():
    rng = np.random.default_rng(0)
    check_variants(rng)
    check_widths(rng)
    check_rows(rng)
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
