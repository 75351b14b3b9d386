"""Norms, activations, embedding and rotary embedding against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda; torch and transformers for the comparisons that say so.
"""

import numpy as np
import pytest
from raddle import ops
from raddle.errors import ArgumentError, UnsupportedError

from tests.ops_cases import DTYPES, ROUNDING, assert_rounded, draw, from_bits, get, put, to_bits
from tests.reference import ops as reference


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


# ------------------------------------------------------------------ norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 4096), (7, 64), (3, 1), (5, 1031), (2, 3, 520), (0, 8), (2, 0)]
)
def test_rmsnorm(device, rng, dtype, shape):
    x, x_value = draw(rng, shape, dtype, device, scale=3)
    weight, weight_value = draw(rng, shape[-1:], dtype, device)
    got = get(ops.rmsnorm(x, weight, 1e-5, dtype=dtype), dtype)
    if 0 in shape:
        assert got.shape == shape
        return
    assert_rounded(got, reference.rmsnorm(x_value, weight_value, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_takes_a_float32_weight(device, rng, dtype):
    x, x_value = draw(rng, (4, 96), dtype, device)
    weight, weight_value = draw(rng, (96,), "float32", device)
    got = get(ops.rmsnorm(x, weight, dtype=dtype), dtype)
    assert_rounded(got, reference.rmsnorm(x_value, weight_value, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_of_heads_in_place_in_a_fused_row(device, rng, dtype):
    """q_norm of Qwen 3: [n, heads, head_dim] in a qkv row, the rest of which stays as it was."""
    n, heads, head_dim, offset = 5, 3, 64, 16
    bits = to_bits(rng.standard_normal((n, 400)), dtype)
    before = from_bits(bits, dtype)
    row = put(bits.copy(), device, dtype)
    weight, weight_value = draw(rng, (head_dim,), dtype, device)
    view = row[:, offset : offset + heads * head_dim]
    view = view.reshape(n, heads, head_dim)
    out = ops.rmsnorm(view, weight, out=view, dtype=dtype)
    assert out is view
    after = get(row, dtype)
    want = before.copy()
    part = before[:, offset : offset + heads * head_dim].reshape(n, heads, head_dim)
    want[:, offset : offset + heads * head_dim] = reference.rmsnorm(
        part, weight_value, 1e-6
    ).reshape(n, -1)
    assert_rounded(after, want, dtype)
    np.testing.assert_array_equal(after[:, :offset], before[:, :offset])
    np.testing.assert_array_equal(after[:, 208:], before[:, 208:])


def test_rmsnorm_of_tiny_and_huge_values(device):
    x = np.array([[1e-30] * 8, [1e15] * 8, [0.0] * 8], np.float32)
    got = get(ops.rmsnorm(put(x, device), put(np.ones(8, np.float32), device), 1e-6))
    np.testing.assert_allclose(got[0], 1e-27, rtol=1e-6)
    np.testing.assert_allclose(got[1], 1, rtol=1e-6)
    np.testing.assert_array_equal(got[2], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 777, 2001, 4096, 10240])
def test_fused_add_rmsnorm_is_an_add_and_a_norm(device, rng, dtype, width):
    x, x_value = draw(rng, (6, width), dtype, device)
    residual, residual_value = draw(rng, (6, width), dtype, device, scale=2)
    weight, weight_value = draw(rng, (width,), dtype, device)
    assert ops.fused_add_rmsnorm(x, residual, weight, 1e-5, dtype=dtype) is None
    total = x_value + residual_value
    np.testing.assert_array_equal(
        get(residual, dtype), from_bits(to_bits(np.float32(total), dtype), dtype)
    )
    assert_rounded(get(x, dtype), reference.rmsnorm(total, weight_value, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 2001, 10240])
@pytest.mark.parametrize("in_place", [True, False])
def test_fused_add_rmsnorm_of_strided_heads(device, rng, dtype, width, in_place):
    """Long and short rows inside wider ones, the rest of which stays as it was."""
    n, heads, offset = 3, 2, 16
    where = slice(offset, offset + heads * width)
    wide = [to_bits(rng.standard_normal((n, heads * width + 40)), dtype) for _ in range(2)]
    before = [from_bits(bits, dtype) for bits in wide]
    rows = [put(bits.copy(), device, dtype) for bits in wide]
    x, residual = (row[:, where].reshape(n, heads, width) for row in rows)
    weight, weight_value = draw(rng, (width,), dtype, device)
    out = x if in_place else put(to_bits(np.zeros((n, heads, width)), dtype), device, dtype)
    ops.fused_add_rmsnorm(x, residual, weight, out=out, dtype=dtype)
    total = sum(value[:, where] for value in before)
    after = [get(row, dtype) for row in rows]
    np.testing.assert_array_equal(
        after[1][:, where], from_bits(to_bits(np.float32(total), dtype), dtype)
    )
    want = reference.rmsnorm(total.reshape(n, heads, width), weight_value, 1e-6)
    got = after[0][:, where].reshape(want.shape) if in_place else get(out, dtype)
    assert_rounded(got, want, dtype)
    if not in_place:
        np.testing.assert_array_equal(after[0], before[0])
    for mine, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(mine[:, :offset], theirs[:, :offset])
        np.testing.assert_array_equal(mine[:, where.stop :], theirs[:, where.stop :])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("width", [8, 15, 3000, 12288])
def test_fused_add_rmsnorm_is_of_the_sum_before_it_is_rounded(device, dtype, width):
    """Every other sum lies half a step above 1, and residual rounds it to 1. The weight leads all
    results to one side of the middle of 1 and the next number: a norm of rounded sums to the other.
    """
    step = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    x_value, residual_value = np.zeros((2, width)), np.ones((2, width))
    x_value[:, ::2] = step / 2
    x, residual = (put(to_bits(v, dtype), device, dtype) for v in (x_value, residual_value))
    goal = np.where(np.arange(width) % 2, 1 + 0.4 * step, 1 + 0.6 * step)
    weight_value = goal / reference.rmsnorm(residual_value[0] + x_value[0], 1, 0)
    weight = put(np.float32(weight_value), device)
    ops.fused_add_rmsnorm(x, residual, weight, 0, dtype=dtype)
    np.testing.assert_array_equal(get(residual, dtype), 1)
    want = from_bits(to_bits(goal, dtype), dtype)
    np.testing.assert_array_equal(get(x, dtype), np.broadcast_to(want, (2, width)))


# ------------------------------------------------------------------ activations, embedding


ACTIVATIONS = {
    "silu": ops.silu_and_mul,
    "gelu": ops.gelu_and_mul,
    "gelu_tanh": ops.gelu_tanh_and_mul,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 28672), (3, 2), (4, 1046), (2, 3, 64), (0, 16)])
def test_activations(device, rng, dtype, kind, shape):
    x, value = draw(rng, shape, dtype, device, scale=3)
    got = get(ACTIVATIONS[kind](x, dtype=dtype), dtype)
    want = reference.act_and_mul(kind, value)
    assert got.shape == want.shape
    limit = np.abs(want) * (ROUNDING[dtype] + 1e-6) + 2e-7 * np.abs(value[..., shape[-1] // 2 :])
    assert (np.abs(got - want) <= limit + 1e-7).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_far_out(device, kind):
    gate = np.array(
        [-1e30, -200, -88.8, -1e-30, 0, 1e-30, 88.8, 200, 1e30, np.inf, np.nan], np.float32
    )
    x = np.stack([gate, np.ones_like(gate)]).reshape(1, -1)
    got = get(ACTIVATIONS[kind](put(x, device)))[0]
    assert (np.abs(got[:3]) < 1e-30).all()
    np.testing.assert_allclose(got[3:6], [-0.5e-30, 0, 0.5e-30], rtol=1e-6)
    np.testing.assert_allclose(got[6:9], gate[6:9], rtol=1e-6)
    assert got[9] == np.inf and np.isnan(got[10])


def test_activation_of_strided_rows(device, rng):
    wide = to_bits(rng.standard_normal((5, 100)), "float32")
    x = put(wide, device)[:, 10:90]
    want = reference.act_and_mul("silu", wide[:, 10:90].astype(np.float64))
    assert_rounded(get(ops.silu_and_mul(x)), want, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("width", [1, 64, 1001])
def test_embedding(device, rng, dtype, index, width):
    table, value = draw(rng, (37, width), dtype, device)
    ids = rng.integers(0, 37, 11).astype(index)
    got = get(ops.embedding(put(ids, device), table, dtype=dtype), dtype)
    np.testing.assert_array_equal(got, value[ids])
    assert get(ops.embedding(put(ids[:0], device), table, dtype=dtype), dtype).shape == (0, width)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_embedding_of_ids_out_of_range(device, index):
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    far = np.iinfo(index).max
    for bad in (-1, 4, far, np.iinfo(index).min):
        ids = np.array([2, bad, 0], index)
        if device == "cpu":
            with pytest.raises(ArgumentError, match=rf"ids: {bad} at position 1"):
                ops.embedding(ids, table)
        else:
            got = get(ops.embedding(put(ids, device), put(table, device)))
            np.testing.assert_array_equal(got, [table[2], [0, 0, 0], table[0]])


# ------------------------------------------------------------------ rotary embedding


def default_frequencies(dim, theta=10000.0):
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def test_cos_sin_cache(device):
    table = ops.rope_cos_sin_cache(5000, 64, theta=5e5, device=device)
    assert tuple(table.shape) == (5000, 64)
    turn = reference.rope_angles(np.arange(5000), default_frequencies(64, 5e5))
    np.testing.assert_allclose(get(table), np.concatenate([turn.real, turn.imag], 1), atol=1e-7)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "head_dim,rotary_dim", [(64, 64), (128, 128), (80, 32), (6, 2), (1030, 1030)]
)
def test_apply_rope(device, rng, dtype, head_dim, rotary_dim, interleave):
    n, heads_q, heads_k = 7, 3, 2
    positions = rng.integers(0, 300, n).astype(np.int32 if interleave else np.int64)
    positions[0], positions[1] = 0, 299
    cache = ops.rope_cos_sin_cache(300, rotary_dim, device=device)
    q, q_value = draw(rng, (n, heads_q, head_dim), dtype, device)
    k, k_value = draw(rng, (n, heads_k, head_dim), dtype, device)
    ops.apply_rope(q, k, put(positions, device), cache, interleave=interleave, dtype=dtype)
    for tensor, value in ((q, q_value), (k, k_value)):
        want = reference.rope(
            value, positions, default_frequencies(rotary_dim), interleave=interleave
        )
        assert_rounded(get(tensor, dtype), want, dtype)


def test_apply_rope_in_a_fused_row_and_without_k(device, rng):
    n, heads, kv_heads, head_dim = 4, 4, 2, 16
    width = (heads + 2 * kv_heads) * head_dim
    value = np.float64(np.float32(rng.standard_normal((n, width))))
    row = put(np.float32(value), device)
    q = row[:, : heads * head_dim].reshape(n, heads, head_dim)
    k = row[:, heads * head_dim : (heads + kv_heads) * head_dim].reshape(n, kv_heads, head_dim)
    positions = np.array([5, 0, 19, 2], np.int32)
    cache = ops.rope_cos_sin_cache(20, head_dim, device=device)
    ops.apply_rope(q, k, put(positions, device), cache)
    turned = (heads + kv_heads) * head_dim
    want = value.copy()
    want[:, :turned] = reference.rope(
        value[:, :turned].reshape(n, -1, head_dim), positions, default_frequencies(head_dim)
    ).reshape(n, -1)
    assert_rounded(get(row), want, "float32")
    ops.apply_rope(q, None, put(positions, device), cache)
    got = get(row)
    np.testing.assert_array_equal(
        got[:, heads * head_dim :], np.float64(get(row))[:, heads * head_dim :]
    )
    want[:, : heads * head_dim] = reference.rope(
        want[:, : heads * head_dim].reshape(n, heads, -1), positions, default_frequencies(head_dim)
    ).reshape(n, -1)
    assert_rounded(got, want, "float32")


@pytest.mark.parametrize("bad", [-1, 20, 2**40])
def test_apply_rope_of_positions_out_of_range(device, rng, bad):
    q, value = draw(rng, (3, 2, 8), "float32", device)
    cache = ops.rope_cos_sin_cache(20, 8, device=device)
    positions = np.array([1, bad, 2], np.int64)
    if device == "cpu":
        with pytest.raises(ArgumentError, match=f"positions: {bad} at row 1"):
            ops.apply_rope(q, None, positions, cache)
        np.testing.assert_array_equal(q, value)
        return
    ops.apply_rope(q, None, put(positions, device), cache)
    np.testing.assert_array_equal(get(q)[1], value[1])


SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.75,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, mscale, not truncated": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_cos_sin_cache_is_that_of_transformers(name):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = dict(SCALINGS[name])
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_theta": 50000.0,
            **scaling,
            "rope_type": scaling.get("rope_type", scaling.get("type")),
        },
    )
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.arange(512)[None]
    cos, sin = rotary(torch.zeros(1, 1), positions)
    got = ops.rope_cos_sin_cache(
        512, 64, theta=50000.0, scaling=scaling, max_position_embeddings=1024
    ).numpy()
    # transformers multiplies positions and frequencies in float32: 512 * 2^-24 in the angle.
    np.testing.assert_allclose(got[:, :32], cos[0, :, :32].numpy(), atol=1e-4)
    np.testing.assert_allclose(got[:, 32:], sin[0, :, :32].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_unknown_scalings_are_refused(kind):
    with pytest.raises(UnsupportedError, match=kind):
        ops.rope_cos_sin_cache(8, 8, scaling={"rope_type": kind, "factor": 2.0})
