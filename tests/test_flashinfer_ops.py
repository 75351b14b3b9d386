"""raddle.flashinfer's norm, activation, rope and sampling: FlashInfer's signatures, errors and
semantics, on torch tensors of both devices. The numbers themselves are tested with raddle.ops.

Needs: torch; a GPU for device cuda.
"""

import inspect

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from raddle.errors import ArgumentError, UnsupportedError  # noqa: E402
from raddle.flashinfer import activation, norm, rope, sampling  # noqa: E402

from tests.ops_cases import assert_distributed  # noqa: E402
from tests.reference import ops as reference  # noqa: E402

# FlashInfer 0.7.2's parameters and defaults, which take calls written for 0.6.18 too.
ROPE = "rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0"
LLAMA31 = (
    "rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0, low_freq_factor=1, "
    "high_freq_factor=4, old_context_len=8192"
)
FP8 = (
    "cos_sin_cache, pos_ids, is_neox=True, quantize_dtype=None, quant_scale_q=1.0, "
    "quant_scale_kv=1.0, q_rope_out=None, k_rope_out=None, q_nope_out=None, k_nope_out=None, "
    "enable_pdl=False"
)
DRAW = "indices=None, deterministic=True, generator=None, check_nan=False, seed=None, offset=None"
BOTH = DRAW.replace("None, det", "None, filter_apply_order='top_k_first', det")
SIGNATURES = {
    norm.rmsnorm: "input, weight, eps=1e-06, out=None, enable_pdl=None",
    norm.rmsnorm_quant: "out, input, weight, scale, eps=1e-06, enable_pdl=None",
    norm.fused_add_rmsnorm: "input, residual, weight, eps=1e-06, enable_pdl=None",
    norm.fused_add_rmsnorm_quant: (
        "out, input, residual, weight, scale, eps=1e-06, enable_pdl=None"
    ),
    norm.gemma_rmsnorm: "input, weight, eps=1e-06, out=None, enable_pdl=None",
    norm.gemma_fused_add_rmsnorm: "input, residual, weight, eps=1e-06, enable_pdl=None",
    norm.layernorm: "input, gemma, beta, eps=1e-06",
    norm.layernorm_quant: "out, input, gemma, beta, scale, eps=1e-06",
    activation.silu_and_mul: "input, out=None, enable_pdl=None",
    activation.gelu_and_mul: "input, out=None, enable_pdl=None",
    activation.gelu_tanh_and_mul: "input, out=None, enable_pdl=None",
    rope.apply_rope: f"q, k, indptr, offsets, {ROPE}",
    rope.apply_rope_inplace: f"q, k, indptr, offsets, {ROPE}",
    rope.apply_rope_pos_ids: f"q, k, pos_ids, {ROPE}",
    rope.apply_rope_pos_ids_inplace: f"q, k, pos_ids, {ROPE}",
    rope.apply_llama31_rope: f"q, k, indptr, offsets, {LLAMA31}",
    rope.apply_llama31_rope_inplace: f"q, k, indptr, offsets, {LLAMA31}",
    rope.apply_llama31_rope_pos_ids: f"q, k, pos_ids, {LLAMA31}",
    rope.apply_llama31_rope_pos_ids_inplace: f"q, k, pos_ids, {LLAMA31}",
    rope.apply_rope_with_cos_sin_cache: (
        "positions, query, key, head_size, cos_sin_cache, is_neox=True"
    ),
    rope.apply_rope_with_cos_sin_cache_inplace: (
        "positions, query, key, head_size, cos_sin_cache, is_neox=True"
    ),
    rope.mla_rope_quantize_fp8: f"q_rope, k_rope, q_nope, k_nope, {FP8}",
    rope.rope_quantize_fp8: f"q_rope, k_rope, q_nope, k_nope, {FP8}, backend='cuda'",
    rope.rope_quantize_fp8_append_paged_kv_cache: (
        "q_rope, k_rope, q_nope, k_nope, v, cos_sin_cache, pos_ids, paged_kv_cache, kv_indices, "
        "kv_indptr, batch_indices, positions, is_neox=True, quantize_dtype=None, "
        "quant_scale_q=1.0, quant_scale_kv=1.0, page_size=16, kv_layout='NHD', q_rope_out=None, "
        "q_nope_out=None, enable_pdl=False"
    ),
    sampling.softmax: "logits, temperature=None, enable_pdl=None",
    sampling.sampling_from_logits: f"logits, {DRAW}",
    sampling.sampling_from_probs: f"probs, {DRAW}, return_valid=False",
    sampling.top_p_sampling_from_probs: f"probs, top_p, {DRAW}, return_valid=False",
    sampling.top_k_sampling_from_probs: f"probs, top_k, {DRAW}, return_valid=False",
    sampling.min_p_sampling_from_probs: f"probs, min_p, {DRAW}, return_valid=False",
    sampling.top_k_top_p_sampling_from_logits: f"logits, top_k, top_p, {BOTH}",
    sampling.top_k_top_p_sampling_from_probs: f"probs, top_k, top_p, {BOTH}, return_valid=False",
    sampling.top_p_renorm_probs: "probs, top_p, is_deterministic=False",
    sampling.top_k_renorm_probs: "probs, top_k, is_deterministic=False",
    sampling.top_k_mask_logits: "logits, top_k",
    sampling.chain_speculative_sampling: (
        "draft_probs, draft_token_ids, target_probs, maybe_output_accepted_token_num=None, "
        "maybe_output_emitted_draft_token_num=None, deterministic=True, generator=None, seed=None, "
        "offset=None"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    assert str(inspect.signature(function)) == f"({SIGNATURES[function]})"
    assert function.__doc__


def test_names_that_are_not_there_raise_on_use():
    for module, name in ((norm, "fused_rmsnorm_silu"), (rope, "get_rope_module")):
        with pytest.raises(UnsupportedError, match=name):
            getattr(module, name)(1)
    with pytest.raises(AttributeError):
        norm.no_such_name  # noqa: B018


@pytest.fixture
def rand(device):
    """Standard normal tensors on the device, the same for each run."""
    generator = torch.Generator().manual_seed(20)

    def make(*shape, dtype=torch.float16):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return make


# ------------------------------------------------------------------ norm and activation


def rms(x, weight, eps=1e-6):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms(rand, dtype):
    tolerance = {"rtol": 1e-2, "atol": 1e-2}
    x, residual, w = (rand(*s, dtype=dtype) for s in ((9, 500), (9, 500), (500,)))
    for function, weight in ((norm.rmsnorm, w), (norm.gemma_rmsnorm, w.double() + 1)):
        got = function(x, w, enable_pdl=True)
        torch.testing.assert_close(got.double(), rms(x, weight), **tolerance)
        out = torch.empty_like(x)
        assert function(x, w, 1e-6, out) is out and torch.equal(out, got)
    for function, weight in (
        (norm.fused_add_rmsnorm, w),
        (norm.gemma_fused_add_rmsnorm, w.double() + 1),
    ):
        mine, total = x.clone(), residual.clone()
        assert function(mine, total, w, 1e-6, False) is None
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(mine.double(), rms(x + residual, weight), **tolerance)
    gamma, beta = rand(500, dtype=torch.float32), rand(500, dtype=torch.float32)
    want = torch.nn.functional.layer_norm(x.float(), (500,), gamma, beta, 1e-6)
    torch.testing.assert_close(norm.layernorm(x, gamma, beta).float(), want, **tolerance)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_norms_to_8_bits(rand, device, kind):
    x, residual, w = rand(5, 96), rand(5, 96), rand(96)
    scale = torch.tensor(0.5, device=device)
    out = torch.empty(5, 96, dtype=kind, device=device)
    norm.rmsnorm_quant(out, x, w, scale)
    torch.testing.assert_close(out.double(), rms(x, w) / 0.5, rtol=0.13, atol=0.01)
    norm.rmsnorm_quant(out, x, w, 1e-6)
    assert out.double().abs().max() == torch.finfo(kind).max
    total = residual.clone()
    norm.fused_add_rmsnorm_quant(out, x, total, w, scale, 1e-6, enable_pdl=True)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out.double(), rms(x + residual, w) / 0.5, rtol=0.13, atol=0.01)
    beta = torch.zeros_like(w)
    norm.layernorm_quant(out, x, w, beta, 2.0)
    want = torch.nn.functional.layer_norm(x.double(), (96,), w.double(), beta.double(), 1e-6) / 2
    torch.testing.assert_close(out.double(), want, rtol=0.13, atol=0.01)


def test_activations(rand):
    x = rand(2, 3, 2 * 855)
    gate, up = x.double().chunk(2, -1)
    for function, activate in (
        (activation.silu_and_mul, torch.nn.functional.silu),
        (activation.gelu_and_mul, torch.nn.functional.gelu),
        (activation.gelu_tanh_and_mul, lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
    ):
        got = function(x, enable_pdl=False)
        torch.testing.assert_close(got.double(), activate(gate) * up, rtol=1e-3, atol=1e-3)
        out = torch.empty_like(got)
        assert function(x, out) is out and torch.equal(out, got)


# ------------------------------------------------------------------ rope


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["rope", "llama31_rope"])
def test_rope_in_its_forms(rand, device, kind, index, interleave):
    qkv = rand(20, (8 + 2 * 2) * 64)
    q, k = qkv[:, :512].reshape(20, 8, 64), qkv[:, 512:640].reshape(20, 2, 64)
    indptr = torch.tensor([0, 7, 7, 20], dtype=index, device=device)
    offsets = torch.tensor([3, 0, 90], dtype=index, device=device)
    pos = torch.cat([torch.arange(3, 10), torch.arange(90, 103)]).to(device, index)
    options = {"rotary_dim": 48, "interleave": interleave, "rope_theta": 3e4, "rope_scale": 2}
    before = qkv.clone()
    a = getattr(rope, f"apply_{kind}")(q, k, indptr, offsets, **options)
    b = getattr(rope, f"apply_{kind}_pos_ids")(q, k, pos, **options)
    assert torch.equal(qkv, before)
    c, d = (q.clone(), k.clone()), (q.clone(), k.clone())
    assert getattr(rope, f"apply_{kind}_inplace")(*c, indptr, offsets, **options) is None
    assert getattr(rope, f"apply_{kind}_pos_ids_inplace")(*d, pos, **options) is None
    for other in (b, c, d):
        assert all(torch.equal(x, y) for x, y in zip(a, other, strict=True))
    f = 3e4 ** (-torch.arange(0, 48, 2).double().numpy() / 48)
    if kind == "rope":
        f = f / 2
    else:
        keep = ((8192 * f / (2 * torch.pi) - 1) / 3).clip(0, 1)
        f = f * (keep + (1 - keep) / 2)
    want = reference.rope(q.double().cpu().numpy(), pos.cpu().numpy(), f, interleave=interleave)
    torch.testing.assert_close(a[0].double().cpu(), torch.from_numpy(want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_neox", [False, True])
def test_rope_with_a_table(rand, device, is_neox):
    query, key = rand(6, 4 * 64, dtype=torch.bfloat16), rand(6, 64, dtype=torch.bfloat16)
    angle = torch.outer(torch.arange(9).double(), 1e4 ** (-torch.arange(0, 32, 2).double() / 32))
    table = torch.cat([angle.cos(), angle.sin()], -1).float().to(device)
    pos = torch.tensor([8, 0, 1, 5, 5, 2], device=device)
    got = rope.apply_rope_with_cos_sin_cache(pos, query, key, 64, table, is_neox)
    copies = query.clone(), key.clone()
    rope.apply_rope_with_cos_sin_cache_inplace(pos, *copies, 64, table, is_neox)
    f = 1e4 ** (-torch.arange(0, 32, 2).double().numpy() / 32)
    for x, y, before in zip(got, copies, (query, key), strict=True):
        assert torch.equal(x, y) and x.shape == before.shape
        heads = before.double().cpu().numpy().reshape(6, -1, 64)
        want = reference.rope(heads, pos.cpu().numpy(), f, interleave=not is_neox)
        want = torch.from_numpy(want).reshape(x.shape)
        torch.testing.assert_close(x.double().cpu(), want, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="cos_sin_cache should be float32"):
        rope.apply_rope_with_cos_sin_cache(pos, query, key, 64, table.half(), is_neox)


@pytest.mark.parametrize("kv_heads,nope", [(1, 96), (4, 32), (2, 0)])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rope_to_8_bits_and_into_pages(rand, device, kv_heads, nope, layout):
    """The cache holds what the function without one gives; one head alone is MLA's."""
    n, width, is_mla = 9, 32 + nope, kv_heads == 1
    q, k = rand(n, 8, width), rand(n, width) if is_mla else rand(n, kv_heads, width)
    v = None if is_mla else rand(n, kv_heads, width)
    table, pos = rand(n, 32, dtype=torch.float32), torch.arange(n, device=device)
    parts = (q[..., :32], k[..., :32], q[..., 32:] if nope else None, k[..., 32:] if nope else None)
    outs = rope.rope_quantize_fp8(*parts, table, pos, is_neox=False, quant_scale_kv=2.0)
    assert [x.shape[-1] for x in outs] == [32, 32, nope, nope]
    assert all(x.dtype == torch.float8_e4m3fn for x in outs)
    kind = torch.float8_e4m3fn
    if is_mla:
        shapes = (3, 4, nope), (3, 4, 32)
    else:
        shapes = [(3, 4, kv_heads, width) if layout == "NHD" else (3, kv_heads, 4, width)] * 2
    cache = tuple(torch.zeros(s, device=device).to(kind) for s in shapes)
    indices = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    indptr = torch.tensor([0, 3], dtype=torch.int32, device=device)
    request = torch.zeros(n, dtype=torch.int32, device=device)
    request[4] = -1
    options = {"is_neox": False, "quant_scale_kv": 2.0, "page_size": 4, "kv_layout": layout}
    arguments = (*parts, v, table, pos, cache, indices, indptr, request, pos.int())
    got = rope.rope_quantize_fp8_append_paged_kv_cache(*arguments, **options)
    for mine, other in zip(got, outs[::2], strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    slots = [c.float() if is_mla or layout == "NHD" else c.float().transpose(1, 2) for c in cache]
    slots = [c[indices.long()].flatten(0, 1)[:n] for c in slots]
    keys = torch.cat([slots[1], slots[0]], -1) if is_mla else slots[0]
    want = torch.cat([outs[1].float(), outs[3].float()], -1)
    want[4] = 0
    assert torch.equal(keys, want)
    if not is_mla:
        want = (2 * v.float()).to(kind).float()
        want[4] = 0
        assert torch.equal(slots[1], want)
    for change, error, match in (
        ({"page_size": 8}, ValueError, "page_size"),
        ({"quantize_dtype": torch.float8_e5m2}, ValueError, "dtype mismatch"),
        ({"kv_layout": "NDH"}, KeyError, "kv_layout"),
    ):
        with pytest.raises(error, match=match):
            rope.rope_quantize_fp8_append_paged_kv_cache(*arguments, **{**options, **change})
    with pytest.raises(UnsupportedError, match="cutile"):
        rope.rope_quantize_fp8(*parts, table, pos, backend="cutile")


# ------------------------------------------------------------------ distribution of samples


def test_sampling_frequencies(device):
    torch.manual_seed(5)
    probs = torch.softmax(torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2, -1)
    p, probs = probs[0].double().numpy(), probs.to(device)
    indices = torch.zeros(20000, dtype=torch.int64, device=device)
    tokens = sampling.top_k_top_p_sampling_from_probs(probs, 20, 0.7, indices)
    assert tokens.dtype == torch.int64
    assert_distributed(tokens.cpu().numpy(), reference.kept_probs(p, 20, 0.7))
    tokens = sampling.sampling_from_logits(probs.log(), indices)
    assert_distributed(tokens.cpu().numpy(), reference.kept_probs(p))
    tokens = sampling.min_p_sampling_from_probs(probs, 0.1, indices)
    assert_distributed(tokens.cpu().numpy(), reference.kept_probs(p, min_p=0.1))
    with pytest.raises((ArgumentError, ValueError), match="filter_apply_order"):
        sampling.top_k_top_p_sampling_from_probs(probs, 20, 0.7, filter_apply_order="first")
