"""The ops family against float64 NumPy, on both back ends. Needs: numpy; a GPU for device cuda; torch and
transformers for the comparisons that say so.
"""

import math

import numpy as np
import pytest

import raddle
from raddle import ops
from raddle.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from tests.reference import ops as reference

DTYPES = ["float32", "float16", "bfloat16"]
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of one result, relative


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def to_bits(x, dtype):
    """The array that a NumPy user would hold: bfloat16 as uint16, rounded to nearest even."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
    return x.astype(dtype)


def from_bits(x, dtype):
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def put(x, device, dtype=None):
    """A NumPy array where the test runs: itself, or a raddle.Tensor on CUDA with the same strides."""
    return x if device == "cpu" else raddle.tensor(x, dtype=dtype, device=device)


def get(x, dtype="float32"):
    """float64 value of a result, or the integers."""
    x = x.to("cpu").numpy() if isinstance(x, raddle.Tensor) else x
    return x if x.dtype.kind == "i" else from_bits(x, dtype)


def draw(rng, shape, dtype, device, scale=1.0):
    """(tensor under test, its float64 value)."""
    bits = to_bits(rng.standard_normal(shape) * scale, dtype)
    return put(bits, device, dtype), from_bits(bits, dtype)


def assert_rounded(got, want, dtype, slack=0.0):
    """Within one rounding of dtype, and slack relative to the largest value for float32 sums."""
    limit = np.abs(want) * ROUNDING[dtype] * 1.01 + (slack + 1e-6) * np.abs(want).max(initial=0)
    worst = np.max(np.abs(got - want) - limit, initial=-1)
    assert worst <= 0, f"error over the limit by {worst}"
    assert got.shape == want.shape


# ------------------------------------------------------------------ norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096), (7, 64), (3, 1), (5, 1031), (2, 3, 520), (0, 8), (2, 0)])
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
    """q_norm of Qwen 3: [n, heads, head_dim] inside a qkv row, the rest of which stays as it was."""
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
@pytest.mark.parametrize("width", [64, 777, 4096])
def test_fused_add_rmsnorm_is_an_add_and_a_norm(device, rng, dtype, width):
    x, x_value = draw(rng, (6, width), dtype, device)
    residual, residual_value = draw(rng, (6, width), dtype, device, scale=2)
    weight, weight_value = draw(rng, (width,), dtype, device)
    assert ops.fused_add_rmsnorm(x, residual, weight, 1e-5, dtype=dtype) is None
    total = get(residual, dtype)
    np.testing.assert_array_equal(
        total, from_bits(to_bits(np.float32(x_value + residual_value), dtype), dtype)
    )
    assert_rounded(get(x, dtype), reference.rmsnorm(total, weight_value, 1e-5), dtype)


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
    gate = np.array([-1e30, -200, -88.8, -1e-30, 0, 1e-30, 88.8, 200, 1e30, np.inf, np.nan], np.float32)
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
@pytest.mark.parametrize("head_dim,rotary_dim", [(64, 64), (128, 128), (80, 32), (6, 2), (1030, 1030)])
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
    np.testing.assert_array_equal(got[:, heads * head_dim :], np.float64(get(row))[:, heads * head_dim :])
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
        rope_parameters={"rope_theta": 50000.0, **scaling, "rope_type": scaling.get("rope_type", scaling.get("type"))},
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


# ------------------------------------------------------------------ linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,out_features,in_features",
    [(1, 128, 256), (1, 33, 257), (2, 1, 1), (5, 31, 64), (12, 96, 1000), (13, 64, 255), (64, 160, 512),
     (300, 70, 130), (0, 8, 8), (3, 0, 8)],
)  # fmt: skip
def test_linear(device, rng, dtype, n, out_features, in_features):
    weight, weight_value = draw(rng, (out_features, in_features), dtype, device, in_features**-0.5)
    bias, bias_value = draw(rng, (out_features,), dtype, device)
    x, value = draw(rng, (n, in_features), dtype, device)
    want = value @ weight_value.T
    for with_bias in (True, False):
        layer = ops.Linear(weight, bias if with_bias else None, dtype=dtype)
        assert_rounded(get(layer(x), dtype), want + with_bias * bias_value, dtype, slack=1e-6)
    wide = put(np.full((n, out_features), np.nan, np.float32), device)
    assert layer(x, out=wide) is wide
    assert_rounded(get(wide), want, "float32", slack=2e-6)


def test_linear_copies_a_host_weight_of_any_strides(rng):
    weight = rng.standard_normal((40, 66)).astype(np.float32)[::-2, ::3]
    want = weight.astype(np.float64).copy()
    layer = ops.Linear(weight)
    weight[:] = np.nan
    x = np.eye(22, dtype=np.float32)
    np.testing.assert_array_equal(layer(x), want.T)


def test_linear_of_strided_rows(device, rng):
    weight, weight_value = draw(rng, (48, 64), "float32", device)
    wide = np.float32(rng.standard_normal((9, 160)))
    full = np.full((9, 100), np.nan, np.float32)
    x, out = put(wide, device)[:, 32:96], put(full, device)
    layer = ops.Linear(weight)
    layer(x, out=out[:, 16:64])
    got = get(out)
    want = wide[:, 32:96].astype(np.float64) @ weight_value.T
    assert_rounded(got[:, 16:64], want, "float32", slack=2e-6)
    assert np.isnan(got[:, :16]).all() and np.isnan(got[:, 64:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_do_not_depend_on_each_other(rng, dtype):
    """On the CPU, bit for bit, whatever number of rows came along."""
    weight, _ = draw(rng, (77, 519), dtype, "cpu")
    x, _ = draw(rng, (270, 519), dtype, "cpu")
    layer = ops.Linear(weight, dtype=dtype)
    whole = layer(x, out=np.empty((270, 77), np.float32))
    for n in (1, 2, 7, 12, 13, 64, 255):
        part = layer(x[:n], out=np.empty((n, 77), np.float32))
        np.testing.assert_array_equal(part, whole[:n])


def test_linear_does_not_read_past_a_row(rng):
    """NaN around x and the weight stays outside, at every odd size."""
    for depth in (1, 3, 31, 33, 257):
        x = np.full((3, depth + 2), np.nan, np.float32)
        weight = np.full((5, depth + 2), np.nan, np.float32)
        x[:, 1:-1] = rng.standard_normal((3, depth))
        weight[:, 1:-1] = rng.standard_normal((5, depth))
        for dtype in DTYPES:
            a, w = to_bits(x, dtype), to_bits(weight, dtype)
            got = ops.Linear(w[:, 1:-1], dtype=dtype)(a[:, 1:-1], out=np.empty((3, 5), np.float32))
            want = from_bits(a[:, 1:-1], dtype) @ from_bits(w[:, 1:-1], dtype).T
            assert_rounded(got, want, "float32", slack=2e-6)


def test_linear_from_torch_parameters(rng):
    torch = pytest.importorskip("torch", reason="needs torch")
    module = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    got = ops.Linear(module.weight, module.bias)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, module(x).detach(), rtol=1.6e-2, atol=1e-2)


# ------------------------------------------------------------------ softmax, log-probabilities


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 32003, 128256])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_softmax(device, rng, dtype, vocab, temperature):
    logits, value = draw(rng, (3, vocab), dtype, device, scale=5)
    got = get(ops.softmax(logits, temperature=temperature, dtype=dtype))
    want = reference.softmax(value, temperature)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


def test_softmax_of_masked_and_infinite_logits(device):
    logits = np.array([[-np.inf, 0, -np.inf, 0], [3e38, -3e38, 0, 3e38], [np.inf, 1, 2, 3]], np.float32)
    got = get(ops.softmax(put(logits, device)))
    np.testing.assert_array_equal(got, [[0, 0.5, 0, 0.5], [0.5, 0, 0, 0.5], [1, 0, 0, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab,top", [(1, 1), (50, 50), (1000, 20), (128256, 5), (700, 0), (3000, 128)])
def test_token_logprobs(device, rng, dtype, vocab, top):
    n = 4
    logits, value = draw(rng, (n, vocab), dtype, device, scale=4)
    ids = rng.integers(0, vocab, n)
    want = reference.log_softmax(value)
    order = np.lexsort((np.broadcast_to(np.arange(vocab), value.shape), -value))[:, :top]
    for index in (np.int32, np.int64):
        logprobs, top_ids, top_logprobs = ops.token_logprobs(
            logits, put(ids.astype(index), device), top=top, dtype=dtype
        )
        np.testing.assert_allclose(get(logprobs), want[np.arange(n), ids], rtol=1e-5, atol=2e-6)
        np.testing.assert_array_equal(get(top_ids), order)
        np.testing.assert_allclose(
            get(top_logprobs), np.take_along_axis(want, order, 1), rtol=1e-5, atol=2e-6
        )


def test_top_logprobs_of_ties_come_by_id(device):
    logits = np.zeros((1, 500), np.float32)
    logits[0, [7, 300]] = 1
    _, ids, _ = ops.token_logprobs(put(logits, device), put(np.array([3]), device), top=6)
    np.testing.assert_array_equal(get(ids), [[7, 300, 0, 1, 2, 3]])


# ------------------------------------------------------------------ sample


def sample(logits, device, **settings):
    dtype = settings.get("dtype")
    return get(ops.sample(put(logits, device, dtype), **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 1025, 32000])
def test_greedy_takes_the_first_maximum(device, rng, dtype, vocab):
    value = np.round(rng.standard_normal((9, vocab)), 1)  # many ties
    got = sample(to_bits(value, dtype), device, temperature=0.0, top_k=3, seed=5, dtype=dtype)
    np.testing.assert_array_equal(got, from_bits(to_bits(value, dtype), dtype).argmax(-1))
    assert got.dtype == np.int32


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [17, 5000])
def test_sample_inverts_the_distribution(device, rng, settings, vocab):
    """The token is where the cumulative sum passes the generator's number: checked for each draw."""
    n = 200
    row = np.float32(rng.standard_normal(vocab) * 2)
    row[rng.integers(0, vocab, vocab // 5)] = -np.inf
    offsets = np.arange(n) + 2**33
    got = sample(np.tile(row, (n, 1)), device, seed=2**40 + 3, offset=list(offsets), **settings)
    p = reference.kept(row.astype(np.float64), **settings)
    ends = np.cumsum(p)
    for token, offset in zip(got, offsets, strict=True):
        u = reference.philox_uniform(2**40 + 3, int(offset))
        assert p[token] > 0
        assert ends[token] - p[token] - 1e-6 <= u <= ends[token] + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_frequencies(device, rng, dtype):
    """Chi-square of 20,000 draws against the reference, with 5 sigma of room."""
    n, vocab = 20000, 40
    bits = to_bits(rng.standard_normal(vocab), dtype)
    p = reference.kept(from_bits(bits, dtype), top_k=25, top_p=0.95)
    got = sample(
        np.tile(bits, (n, 1)), device, seed=np.arange(n), top_k=25, top_p=0.95, dtype=dtype
    )
    counts = np.bincount(got, minlength=vocab)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    freedom = (p > 0).sum() - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch(device, rng):
    logits = np.float32(rng.standard_normal((150, 3001)))
    settings = {
        "temperature": rng.uniform(0.2, 2, 150),
        "top_k": rng.integers(0, 50, 150),
        "top_p": rng.uniform(0.3, 1, 150),
        "min_p": rng.uniform(0, 0.1, 150),
        "seed": rng.integers(0, 2**62, 150),
        "offset": rng.integers(0, 2**40, 150),
    }
    settings["temperature"][::10] = 0
    whole = sample(logits, device, **settings)
    order = rng.permutation(150)
    some = order[:67]
    part = sample(logits[some], device, **{k: v[some].tolist() for k, v in settings.items()})
    np.testing.assert_array_equal(part, whole[some])
    for i in order[:5]:
        alone = sample(logits[i : i + 1], device, **{k: v[i].item() for k, v in settings.items()})
        assert alone[0] == whole[i]


def test_settings_may_lie_on_the_device(device, rng):
    n = 70
    logits = np.float32(rng.standard_normal((n, 999)))
    host = {
        "temperature": rng.uniform(0, 2, n).astype(np.float32),
        "top_k": rng.integers(-1, 50, n).astype(np.int32),
        "top_p": rng.uniform(0.3, 1, n).astype(np.float32),
        "min_p": rng.uniform(0, 0.1, n).astype(np.float32),
        "seed": rng.integers(0, 2**62, n),
        "offset": rng.integers(0, 2**40, n),
    }
    there = sample(logits, device, **{k: put(v, device) for k, v in host.items()})
    np.testing.assert_array_equal(there, sample(logits, device, **host))


def test_sample_without_the_other_back_end(rng):
    """The tokens of fixed inputs, so that every machine and back end can be held to the same ones."""
    logits = np.float32(np.sin(np.arange(4 * 1000).reshape(4, 1000) * 0.37) * 4)
    got = ops.sample(logits, seed=[1, 2, 3, 4], offset=7, top_p=0.9, temperature=0.8)
    p = [reference.kept(row.astype(np.float64), top_p=0.9, temperature=0.8) for row in logits]
    want = [
        np.searchsorted(np.cumsum(row), reference.philox_uniform(seed, 7), side="right")
        for seed, row in zip([1, 2, 3, 4], p, strict=True)
    ]
    np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
def test_both_back_ends_draw_the_same_tokens(rng):
    n = 500
    logits = to_bits(rng.standard_normal((n, 32000)) * 3, "bfloat16")
    settings = {
        "temperature": rng.uniform(0.1, 2, n),
        "top_k": rng.integers(0, 60, n),
        "top_p": rng.uniform(0.3, 1, n),
        "min_p": rng.uniform(0, 0.05, n) * (rng.random(n) < 0.5),
        "seed": rng.integers(0, 2**62, n),
    }
    cpu = sample(logits, "cpu", dtype="bfloat16", **settings)
    cuda = sample(logits, "cuda", dtype="bfloat16", **settings)
    np.testing.assert_array_equal(cpu, cuda)


@pytest.mark.parametrize("row", [[0, np.nan, 1], [-np.inf] * 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_cannot_be_sampled(device, row, temperature):
    logits = np.array([[1, 2, 9], row, [9, 1, 2]], np.float32)
    if device == "cpu":
        with pytest.raises(ArgumentError, match="logits: .*row 1"):
            ops.sample(logits, temperature=temperature)
        return
    got = sample(logits, device, temperature=temperature)
    assert got[1] == -1
    if temperature == 0:
        np.testing.assert_array_equal(got, [2, -1, 0])


# ------------------------------------------------------------------ arguments


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch", reason="needs torch")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    got = ops.rmsnorm(x, torch.ones(64))
    assert isinstance(got, torch.Tensor) and got.dtype == torch.bfloat16
    assert ops.sample(x).dtype == torch.int32
    want = torch.nn.functional.silu(x[:, :32].float()) * x[:, 32:].float()
    torch.testing.assert_close(ops.silu_and_mul(x).float(), want, rtol=1e-2, atol=1e-6)


X = np.ones((4, 8), np.float32)
W = np.ones(8, np.float32)
CACHE = np.ones((4, 8), np.float32)
Q = np.ones((4, 2, 8), np.float32)
POSITIONS = np.zeros(4, np.int32)
READ_ONLY = np.ones((4, 8), np.float32)
READ_ONLY.flags.writeable = False

BAD_CALLS = [
    (lambda: ops.rmsnorm(X.astype(np.float64), W), DTypeError, "x: .*float64"),
    (lambda: ops.rmsnorm(X, np.ones(7, np.float32)), ShapeError, "weight"),
    (lambda: ops.rmsnorm(X, W.astype(np.float16)), DTypeError, "weight: .*float16"),
    (lambda: ops.rmsnorm(X, W, eps=-1.0), ArgumentError, "eps: .*-1"),
    (lambda: ops.rmsnorm(X, W, eps=float("nan")), ArgumentError, "eps"),
    (lambda: ops.rmsnorm(X[:, ::2], W[::2]), UnsupportedError, "x: .*stride 1.*2"),
    (lambda: ops.rmsnorm(X, W, out=np.ones((4, 9), np.float32)), ShapeError, "out"),
    (lambda: ops.rmsnorm(X, W, out=np.ones((4, 8), np.float16)), DTypeError, "out"),
    (lambda: ops.rmsnorm(X, W, out=READ_ONLY), ArgumentError, "out"),
    (lambda: ops.rmsnorm(np.float32(1), W), Exception, "x"),
    (lambda: ops.rmsnorm(to_bits(X, "bfloat16"), W), DTypeError, 'dtype="bfloat16"'),
    (lambda: ops.rmsnorm(None, W), DTypeError, "x"),
    (lambda: ops.rmsnorm(X, W, dtype="bf17"), Exception, "dtype"),
    (lambda: ops.fused_add_rmsnorm(X, X, W), ArgumentError, "residual: .*same memory"),
    (lambda: ops.fused_add_rmsnorm(X, np.ones((3, 8), np.float32), W), ShapeError, "residual"),
    (lambda: ops.fused_add_rmsnorm(READ_ONLY, X, W), ArgumentError, "x"),
    (lambda: ops.silu_and_mul(X[:, :7].copy()), ShapeError, "x: .*even.*7"),
    (lambda: ops.silu_and_mul(X, out=X), ShapeError, "out"),
    (lambda: ops.embedding(W, X), DTypeError, "ids: .*float32"),
    (lambda: ops.embedding(POSITIONS[None], X), ShapeError, "ids"),
    (lambda: ops.embedding(POSITIONS, W), ShapeError, "table"),
    (lambda: ops.apply_rope(X, None, POSITIONS, CACHE), ShapeError, "q"),
    (lambda: ops.apply_rope(Q, Q[:3].copy(), POSITIONS, CACHE), ShapeError, "k"),
    (lambda: ops.apply_rope(Q, None, POSITIONS[:3], CACHE), ShapeError, "positions"),
    (lambda: ops.apply_rope(Q, None, W[:4], CACHE), DTypeError, "positions"),
    (lambda: ops.apply_rope(Q, None, POSITIONS, CACHE[:, :7]), ShapeError, "cos_sin_cache: .*7"),
    (
        lambda: ops.apply_rope(Q, None, POSITIONS, np.ones((4, 10), np.float32)),
        ShapeError,
        "cos_sin_cache: .*10",
    ),
    (lambda: ops.apply_rope(Q, None, POSITIONS, CACHE.astype(np.float16)), DTypeError, "cos_sin_cache"),
    (lambda: ops.rope_cos_sin_cache(4, 7), ArgumentError, "rotary_dim: .*7"),
    (lambda: ops.rope_cos_sin_cache(-1, 8), ArgumentError, "max_position"),
    (lambda: ops.rope_cos_sin_cache(4, 8, theta=0.0, scaling={}), ArgumentError, "theta"),
    (lambda: ops.rope_cos_sin_cache(4, 8, scaling={"type": "linear"}), ArgumentError, "factor"),
    (
        lambda: ops.rope_cos_sin_cache(4, 8, scaling={"type": "linear", "factor": 0}),
        ArgumentError,
        "factor",
    ),
    (lambda: ops.Linear(W), ShapeError, "weight"),
    (lambda: ops.Linear(X.astype(np.int32)), DTypeError, "weight: .*int32"),
    (lambda: ops.Linear(X, W), ShapeError, "bias"),
    (lambda: ops.Linear(X, W[:4].astype(np.float16)), DTypeError, "bias"),
    (lambda: ops.Linear(X)(W[:7]), ShapeError, "x: .*in_features = 8, got 7"),
    (lambda: ops.Linear(X)(X.astype(np.float16)), DTypeError, "x"),
    (lambda: ops.Linear(X)(X, out=np.ones((4, 5), np.float32)), ShapeError, "out"),
    (lambda: ops.Linear(X)(X, out=np.ones((4, 4), np.float16)), DTypeError, "out: .*float16"),
    (lambda: ops.softmax(X, temperature=0.0), ArgumentError, "temperature: .*0"),
    (lambda: ops.softmax(W), ShapeError, "logits"),
    (lambda: ops.softmax(X[:, :0]), ShapeError, "logits: .*vocabulary"),
    (lambda: ops.sample(X, temperature=-1.0), ArgumentError, "temperature: .*-1"),
    (lambda: ops.sample(X, temperature=float("inf")), ArgumentError, "temperature"),
    (lambda: ops.sample(X, temperature="hot"), DTypeError, "temperature: .*str"),
    (lambda: ops.sample(X, temperature=[1.0, 1.0, -2.0, 1.0]), ArgumentError, "-2 for row 2"),
    (lambda: ops.sample(X, top_k=-2), ArgumentError, "top_k: .*-2"),
    (lambda: ops.sample(X, top_k=1.5), DTypeError, "top_k: .*integer"),
    (lambda: ops.sample(X, top_k=[1, 2]), ShapeError, "top_k: .*4 rows.*got 2"),
    (lambda: ops.sample(X, top_k=np.ones(4, np.float32)), DTypeError, "top_k"),
    (lambda: ops.sample(X, top_p=0.0), ArgumentError, "top_p: .*0"),
    (lambda: ops.sample(X, top_p=np.full(4, 1.5)), ArgumentError, "top_p: .*1.5"),
    (lambda: ops.sample(X, min_p=1.01), ArgumentError, "min_p"),
    (lambda: ops.sample(X, seed=np.ones(3, np.int64)), ShapeError, "seed"),
    (lambda: ops.sample(X, out=np.ones(4, np.int64)), DTypeError, "out"),
    (lambda: ops.token_logprobs(X, POSITIONS + 8), ArgumentError, "ids: .*row 0.*8"),
    (lambda: ops.token_logprobs(X, POSITIONS, top=9), ArgumentError, "top: .*8.*9"),
    (lambda: ops.token_logprobs(X, POSITIONS, top=-1), ArgumentError, "top"),
    (lambda: ops.token_logprobs(X * np.nan, POSITIONS), ArgumentError, "logits: row 0 holds NaN"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_name_the_argument(number):
    call, error, message = BAD_CALLS[number]
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(X, 1)
