"""Tiny shapes of every kernel of the ops family, for compute-sanitizer; see .ci/gpu.

Needs: a GPU. No torch: its own kernels would be checked too, slowly.
"""

import numpy as np
import raddle
from raddle import ops

from tests.ops_cases import get, put, to_bits


def compare(name, call, arrays, dtype, **settings):
    """A call on both back ends, on copies of the same arrays; the results, and what is written."""
    results = []
    for device in ("cpu", "cuda"):
        tensors = [
            put(a.copy(), device, dtype if a.dtype in (np.uint16, np.float16) else None)
            for a in arrays
        ]
        made = call(*tensors, dtype=dtype, **settings)
        made = made if isinstance(made, tuple) else (made,)
        results.append([get(x, dtype) for x in (*made, *tensors) if x is not None])
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=2e-2, err_msg=f"{name} {dtype}")


def check_rows(rng, dtype, width):
    """Norms, activations, rotations: whole vectors and odd ends."""

    def draw(*shape):
        return to_bits(rng.standard_normal(shape), dtype)

    weight = draw(width)
    compare("rmsnorm", ops.rmsnorm, [draw(5, width), weight], dtype)
    compare("layernorm", ops.layernorm, [draw(5, width), weight, weight], dtype)
    compare("fused_add", ops.fused_add_rmsnorm, [draw(5, width), draw(5, width), weight], dtype)
    compare("silu", ops.silu_and_mul, [draw(5, 2 * width)], dtype)
    positions = np.arange(6, dtype=np.int32)
    turns, table = ops.rope_turns(2 * width), ops.rope_cos_sin_cache(6, 2 * width)
    for interleave in (False, True):
        heads = [draw(6, 3, 2 * width), draw(6, 2, 2 * width), positions]
        options = {"interleave": interleave}

        def from_turns(q, k, where, **options):
            ops.apply_rope(q, k, where, turns, **options)

        compare("rope by turns", from_turns, heads, dtype, **options)
        compare("rope", ops.apply_rope, [*heads, table.numpy()], dtype, **options)


def check_fp8(rng, dtype):
    """Norms and rotated parts of heads to 8 bits, the latter into pages too."""
    x = put(to_bits(rng.standard_normal((5, 3, 64)), dtype), "cuda", dtype)
    row = put(to_bits(np.ones(64), dtype), "cuda", dtype)
    out = raddle.empty((5, 3, 64), dtype="float8_e4m3fn", device="cuda")
    ops.rmsnorm(x, row, out=out, dtype=dtype)
    other = raddle.empty((5, 3, 64), dtype="float8_e4m3fn", device="cuda")
    cache = raddle.empty((3, 2, 3, 64), dtype="float8_e4m3fn", device="cuda")
    table = ops.rope_cos_sin_cache(5, 64, device="cuda")
    rows = put(np.arange(5, dtype=np.int32), "cuda")
    ops.rope_fp8(x, x, table, rows, q_rope_out=out, k_rope_out=other, dtype=dtype)
    ops.rope_fp8(
        x,
        x,
        table,
        rows,
        q_rope_out=out,
        k_rope_out=cache,
        batch_indices=put(np.array([0, 0, 0, -1, 0], np.int32), "cuda"),
        token_positions=rows,
        kv_indptr=put(np.array([0, 3], np.int32), "cuda"),
        kv_indices=put(np.array([2, 0, 1], np.int32), "cuda"),
        dtype=dtype,
    )


def linear(x, weight, bias, dtype):
    return ops.Linear(weight, bias, dtype=dtype)(x)


def check_linear(rng, dtype, n, width):
    """Few rows: our own kernel, whose tiles, chunks and rows are not all there."""
    arrays = [
        to_bits(rng.standard_normal(shape), dtype) for shape in ((3, width), (n, width), (n,))
    ]
    compare("linear", linear, arrays, dtype)


def top_ids(logits, ids, dtype):
    return ops.token_logprobs(logits, ids, top=5, dtype=dtype)[1]


def check_vocabularies(rng, dtype, vocab):
    """What has a CTA for each row."""
    logits = to_bits(rng.standard_normal((3, vocab)) * 3, dtype)
    probs = to_bits(rng.dirichlet(np.ones(vocab), 3), dtype)
    settings = {"top_k": 9, "top_p": 0.8, "min_p": 0.01}
    ids = np.array([0, vocab - 1, 1], np.int64)
    for device in ("cpu", "cuda"):
        np.testing.assert_allclose(
            get(ops.softmax(put(logits, device, dtype), dtype=dtype)).sum(-1), 1, rtol=1e-4
        )
    compare("sample", ops.sample, [logits], dtype, **settings)
    compare("sample_probs", ops.sample_probs, [probs], dtype, filter_order="joint", **settings)
    compare("renorm", ops.renorm_probs, [probs], dtype, top_k=9, top_p=0.8)
    compare("token_logprobs", top_ids, [logits, ids], dtype)
    masked = ops.mask_logits(put(logits, "cuda", dtype), top_k=9, top_p=0.8, dtype=dtype)
    assert (get(masked, dtype) > -np.inf).any(-1).all()
    draft, target = (to_bits(rng.dirichlet(np.ones(vocab), (3, n)), dtype) for n in (2, 3))
    drafted = np.array([[0, 1], [2, 3], [4, vocab - 1]], np.int32)
    compare("verify", ops.verify_draft, [draft, drafted, target], dtype, row_streams=True)


def main():
    rng = np.random.default_rng(0)
    for dtype in ("bfloat16", "float16", "float32"):
        for width in (33, 64, 256):
            check_rows(rng, dtype, width)
        check_fp8(rng, dtype)
        for n, width in ((40, 8), (9, 264), (4300, 1032)):
            check_linear(rng, dtype, n, width)
        for vocab in (40, 1025, 5000):
            check_vocabularies(rng, dtype, vocab)
    ids, table = put(np.array([3, 0], np.int32), "cuda"), put(np.ones((4, 33), np.float32), "cuda")
    ops.embedding(ids, table)
    print("both back ends agree")


if __name__ == "__main__":
    main()
