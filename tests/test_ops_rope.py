"""Rotary embedding without a table, by segments, into other memory and to 8 bits, against float64
NumPy on both back ends. With a table and in place: test_ops.py.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

from tests.ops_cases import DTYPES, assert_rounded, draw, get, put
from tests.reference import ops as reference
from tests.test_ops_norm import FP8, assert_nearest, empty_fp8


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def frequencies(dim, theta=10000.0):
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def llama3(f, factor=8.0, low=1.0, high=4.0, original=8192):
    """Frequencies by wavelength: long ones divided, short ones kept, blended between."""
    wavelength = 2 * np.pi / f
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * f / factor + smooth * f
    return np.where(
        wavelength < original / high, f, np.where(wavelength > original / low, f / factor, blended)
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,rotary_dim", [(128, 128), (64, 48), (80, 32), (6, 2), (512, 512)]
)
def test_turns_at_any_position(device, rng, dtype, head_dim, rotary_dim, interleave):
    positions = np.array([0, 1, 299, 131071, 10**6, 2**31 - 1, 17], np.int64)
    turns = ops.rope_turns(rotary_dim, theta=5e5, scaling=LLAMA3)
    q, q_value = draw(rng, (7, 3, head_dim), dtype, device)
    k, k_value = draw(rng, (7, 2, head_dim), dtype, device)
    ops.apply_rope(q, k, put(positions, device), turns, interleave=interleave, dtype=dtype)
    for tensor, value in ((q, q_value), (k, k_value)):
        want = reference.rope(
            value, positions, llama3(frequencies(rotary_dim, 5e5)), interleave=interleave
        )
        assert_rounded(get(tensor, dtype), want, dtype)


def test_turns_scale_and_attention_factor(device, rng):
    positions = np.arange(40, 45, dtype=np.int32)
    q, value = draw(rng, (5, 2, 32), "float32", device)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    turns = ops.rope_turns(32, scaling=scaling)
    table = ops.rope_cos_sin_cache(64, 32, scaling=scaling, device=device)
    other = put(np.float32(value), device)
    ops.apply_rope(q, None, put(positions, device), turns)
    ops.apply_rope(other, None, put(positions, device), table)
    np.testing.assert_allclose(get(q), get(other), atol=1e-6)
    assert turns.attention_factor != 1 and "rotary_dim=32" in repr(turns)


@pytest.mark.parametrize("rows", [3, 1500])
@pytest.mark.parametrize("source", ["table", "turns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim,rotary_dim", [(128, 64), (64, 64), (40, 12)])
def test_into_other_memory(device, rng, rows, source, dtype, head_dim, rotary_dim):
    """Out of a fused row: what is not rotated is copied, q and k stay."""
    heads, kv_heads = 5, 2
    positions = rng.integers(0, 99, rows).astype(np.int32)
    row, value = draw(rng, (rows, (heads + 2 * kv_heads) * head_dim), dtype, device)
    turned = (heads + kv_heads) * head_dim
    q = row[:, : heads * head_dim].reshape(rows, heads, head_dim)
    k = row[:, heads * head_dim : turned].reshape(rows, kv_heads, head_dim)
    q_out = raddle.empty((rows, heads, head_dim), dtype=dtype, device=device)
    k_out = raddle.empty((rows, kv_heads, head_dim), dtype=dtype, device=device)
    angles = (
        ops.rope_turns(rotary_dim)
        if source == "turns"
        else ops.rope_cos_sin_cache(99, rotary_dim, device=device)
    )
    ops.apply_rope(q, k, put(positions, device), angles, q_out=q_out, k_out=k_out, dtype=dtype)
    np.testing.assert_array_equal(get(row, dtype), value)
    want = reference.rope(
        value[:, :turned].reshape(rows, -1, head_dim), positions, frequencies(rotary_dim)
    )
    got = np.concatenate([get(q_out, dtype), get(k_out, dtype)], 1)
    assert_rounded(got, want, dtype)
    np.testing.assert_array_equal(got[..., rotary_dim:], want[..., rotary_dim:])


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("source", ["table", "turns"])
def test_segments(device, rng, index, source):
    """Requests of 0, 4, 1 and 0 rows after one row of none, and two rows of none at the end."""
    indptr = np.array([1, 1, 5, 6, 6], index)
    offsets = np.array([7, 3, 90, 5], index)
    where = np.array([0, 3, 4, 5, 6, 90, 0, 0])
    q, value = draw(rng, (8, 3, 16), "float32", device)
    k, k_value = draw(rng, (8, 1, 16), "float32", device)
    angles = (
        ops.rope_turns(16) if source == "turns" else ops.rope_cos_sin_cache(91, 16, device=device)
    )
    segments = {"indptr": put(indptr, device), "offsets": put(offsets, device)}
    outs = [raddle.empty(x.shape, dtype="float32", device=device) for x in (value, k_value)]
    ops.apply_rope(q, k, None, angles, q_out=outs[0], k_out=outs[1], **segments)
    ops.apply_rope(q, k, None, angles, **segments)
    for tensor, out, before in ((q, outs[0], value), (k, outs[1], k_value)):
        want = reference.rope(before, where, frequencies(16))
        want[[0, 6, 7]] = before[[0, 6, 7]]
        np.testing.assert_array_equal(get(out), get(tensor))
        assert_rounded(get(tensor), want, "float32")


# ------------------------------------------------------------------ 8-bit results


def rotated(value, positions, rotary_dim, interleave):
    return reference.rope(value, positions, frequencies(rotary_dim), interleave=interleave)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,rope,nope", [(16, 1, 64, 512), (6, 2, 32, 96), (3, 3, 6, 5)]
)
def test_parts_of_heads_to_8_bits(
    device, rng, kind, interleave, dtype, heads, kv_heads, rope, nope
):
    n = 9
    positions = rng.integers(0, 200, n).astype(np.int64)
    q, q_value = draw(rng, (n, heads, rope + nope), dtype, device)
    k, k_value = draw(rng, (n, kv_heads, rope + nope), dtype, device)
    outs = [empty_fp8((n, h, rope + nope), kind, device) for h in (heads, kv_heads)]
    ops.rope_fp8(
        q[..., :rope],
        k[..., :rope],
        ops.rope_cos_sin_cache(200, rope, device=device),
        put(positions, device),
        q_nope=q[..., rope:],
        k_nope=k[..., rope:],
        q_rope_out=outs[0][..., :rope],
        k_rope_out=outs[1][..., :rope],
        q_nope_out=outs[0][..., rope:],
        k_nope_out=outs[1][..., rope:],
        q_scale=3.0,
        kv_scale=0.125,
        interleave=interleave,
        dtype=dtype,
    )
    assert_nearest(outs[0], 3 * rotated(q_value, positions, rope, interleave), kind)
    assert_nearest(outs[1], 0.125 * rotated(k_value, positions, rope, interleave), kind)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("nope", [0, 16])
def test_into_a_paged_cache(device, rng, index, layout, nope):
    """Shuffled pages, a row of no request; what is not written stays as it was."""
    n, heads, rope, page_size, pages = 11, 2, 32, 4, 7
    width = rope + nope
    batch = np.array([1, 1, 0, 0, 0, -1, 0, 0, 2, 2, 1], index)
    place = np.array([4, 5, 0, 1, 2, 0, 3, 4, 0, 9, 6], index)
    indptr, table = np.array([0, 2, 4, 7], index), np.array([5, 2, 6, 0, 3, 1, 4], index)
    q, _ = draw(rng, (n, 4, rope), "bfloat16", device)
    k, k_value = draw(rng, (n, heads, width), "bfloat16", device)
    v, v_value = draw(rng, (n, heads, width), "bfloat16", device)
    shape = (pages, page_size, heads) if layout == "NHD" else (pages, heads, page_size)
    caches = [put(np.full((*shape, width), 0x38, np.uint8), device, FP8[0]) for _ in range(2)]
    views = caches
    if device == "cpu":  # a NumPy array of bytes says nothing of float8
        views = [raddle.tensor(c, dtype=FP8[0]) for c in caches]
    if layout == "HND":
        pytest.importorskip("torch", reason="needs torch")
        import torch

        views = [torch.from_dlpack(c).transpose(1, 2) for c in views]
    positions = np.arange(n, dtype=np.int64)
    ops.rope_fp8(
        q,
        k[..., :rope],
        ops.rope_cos_sin_cache(n, rope, device=device),
        put(positions, device),
        k_nope=k[..., rope:] if nope else None,
        v=v,
        q_rope_out=empty_fp8((n, 4, rope), FP8[0], device),
        k_rope_out=views[0][..., :rope],
        k_nope_out=views[0][..., rope:] if nope else None,
        v_out=views[1],
        kv_scale=2.0,
        batch_indices=put(batch, device),
        token_positions=put(place, device),
        kv_indptr=put(indptr, device),
        kv_indices=put(table, device),
        dtype="bfloat16",
    )
    want = [np.full((pages, page_size, heads, width), 1.0) for _ in range(2)]
    turned = rotated(k_value, positions, rope, False)
    for i in range(n):
        if batch[i] >= 0:
            page = table[indptr[batch[i]] + place[i] // page_size]
            want[0][page, place[i] % page_size] = 2 * turned[i]
            want[1][page, place[i] % page_size] = 2 * v_value[i]
    for view, value in zip(views, want, strict=True):
        codes = (
            view.cpu().contiguous().view(torch.uint8).numpy()
            if layout == "HND"
            else view.to("cpu").numpy()
        )
        assert_nearest(raddle.tensor(codes, dtype=FP8[0]), value, FP8[0])


BAD_ROWS = {  # name: (array, value of row 1)
    "batch": ("batch_indices", 3),
    "far position": ("token_positions", 8),
    "negative position": ("token_positions", -1),
    "page id": ("kv_indices", 3),
    "angle": ("positions", 4),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_are_in_no_page(device, name):
    """An error on the CPU; on CUDA the row is not written, and nothing outside the cache is."""
    n, pages, page_size = 3, 3, 4
    arrays = {
        "batch_indices": np.array([0, 0, 1], np.int32),
        "token_positions": np.array([0, 5, 1], np.int32),
        "kv_indptr": np.array([0, 2, 3], np.int32),
        "kv_indices": np.array([0, 1, 2], np.int32),
    }
    positions = np.arange(n, dtype=np.int32)
    array, value = BAD_ROWS[name]
    (positions if array == "positions" else arrays[array])[1] = value
    ones = put(np.ones((n, 1, 8), np.float32), device)
    cache = raddle.empty((pages, page_size, 1, 8), dtype=FP8[0], device=device).zero_()

    def call():
        ops.rope_fp8(
            ones,
            ones,
            ops.rope_cos_sin_cache(4, 8, device=device),
            put(positions, device),
            q_rope_out=empty_fp8((n, 1, 8), FP8[0], device),
            k_rope_out=cache,
            **{name: put(array, device) for name, array in arrays.items()},
        )

    if device == "cpu":
        with pytest.raises(ArgumentError, match="row 1"):
            call()
        assert not cache.numpy().any()
        return
    call()
    written = cache.to("cpu").numpy().any((2, 3))
    assert written[0, 0] and written[2, 1]
    assert written.sum() == (3 if name == "angle" else 2)


Q = np.ones((4, 2, 8), np.float32)
POSITIONS = np.zeros(4, np.int32)
TURNS = ops.rope_turns(8)
BAD_CALLS = [
    (lambda: ops.rope_turns(7), ArgumentError, "rotary_dim: .*7"),
    (lambda: ops.rope_turns(8, theta=-1.0), ArgumentError, "theta"),
    (lambda: ops.apply_rope(Q, None, POSITIONS, None), DTypeError, "cos_sin_cache: .*None"),
    (lambda: ops.apply_rope(Q, None, None, TURNS), ArgumentError, "positions: .*indptr"),
    (
        lambda: ops.apply_rope(Q, None, POSITIONS, ops.rope_turns(514)),
        UnsupportedError,
        "512.*514",
    ),
    (lambda: ops.apply_rope(Q, None, POSITIONS, ops.rope_turns(10)), ShapeError, "8.*10"),
    (
        lambda: ops.apply_rope(Q, None, None, TURNS, indptr=POSITIONS, offsets=POSITIONS),
        ShapeError,
        "offsets.*3.*4",
    ),
    (
        lambda: ops.apply_rope(Q, None, None, TURNS, indptr=Q[0, 0], offsets=POSITIONS),
        DTypeError,
        "indptr: .*float32",
    ),
    (lambda: ops.apply_rope(Q, Q.copy(), POSITIONS, TURNS, q_out=Q.copy()), ArgumentError, "k_out"),
    (lambda: ops.apply_rope(Q, None, POSITIONS, TURNS, q_out=Q[:, :1].copy()), ShapeError, "q_out"),
    (
        lambda: ops.apply_rope(Q, None, POSITIONS, TURNS, q_out=Q.astype(np.float16)),
        DTypeError,
        "q_out",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_name_the_argument(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(Q, 1)
