"""The attention function that transformers calls, against float64, and what it refuses.

Needs: torch, transformers; a GPU for device cuda.
"""

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from raddle.errors import UnsupportedError  # noqa: E402
from raddle.integrations import (  # noqa: E402
    transformers_attention,
)
from raddle.integrations.transformers import clear  # noqa: E402

from tests.transformers_cases import (  # noqa: E402
    Layer,
    call,
    make_qkv,
)


@pytest.fixture(autouse=True)
def no_plans_left():
    yield
    clear()


# ------------------------------------------------------------------ the function itself


def reference(q, k, v, seen, scale, cap=None, sinks=None):
    """float64; seen: bool [batch, queries, keys]. Rows that see nothing are 0."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    extra = torch.full((*logits.shape[:3], 1), -torch.inf, dtype=torch.float64)
    if sinks is not None:
        extra[:] = sinks.double().cpu().view(1, -1, 1, 1)
    weights = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1].nan_to_num(0)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v.nan_to_num(0))


def seen_by(queries, keys, causal=True, window=None, ranges=None, batch=2):
    q = torch.arange(queries)[:, None] + keys - queries
    k = torch.arange(keys)[None]
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    if causal:
        seen &= k <= q
    if window is not None:
        seen &= k > q - window
    for row, (begin, end) in enumerate(ranges or []):
        seen[row] &= (k >= begin) & (k < end) & (q >= begin) & (q < end)
    return seen


def assert_close(got, want, device):
    tolerance = 2e-5 if device == "cpu" else 4e-3
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)


def layouts(x):
    """The same values in memory as caches, projections and slices have them."""
    batch, heads, tokens, dim = x.shape
    longer = x.new_full((batch, heads, tokens + 3, dim), torch.nan)
    longer[:, :, :tokens] = x
    fused = x.new_full((batch, tokens, heads, dim + 16), torch.nan)
    fused[..., :dim] = x.transpose(1, 2)
    return {
        "contiguous": x,
        "slice": longer[:, :, :tokens],
        "projection": x.transpose(1, 2).contiguous().transpose(1, 2),
        "fused": fused[..., :dim].transpose(1, 2),
        "batch inside": x.transpose(0, 2).contiguous().transpose(0, 2),
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 5, 29])
@pytest.mark.parametrize("key_layout", ["contiguous", "slice", "projection", "fused"])
@pytest.mark.parametrize("value_layout", ["contiguous", "projection", "batch inside"])
def test_strides(device, batch, queries, key_layout, value_layout):
    q, k, v = make_qkv(device, batch=batch, queries=queries, dim_v=48)
    want = reference(q, k, v, seen_by(queries, 29, batch=batch), 0.2)
    for q_view in layouts(q).values():
        out, weights = transformers_attention.attention_forward(
            Layer(), q_view, layouts(k)[key_layout], layouts(v)[value_layout], None, scaling=0.2
        )
        assert weights is None and out.is_contiguous()
        assert_close(out, want, device)


@pytest.mark.parametrize("queries", [1, 2, 9, 29])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "cap, with_sinks", [(None, False), (2.0, False), (None, True), (2.0, True)]
)
def test_padding_is_never_read(device, queries, causal, cap, with_sinks):
    """K and V of padding are NaN: before, behind, on both sides, the whole row."""
    ranges = [(0, 29), (11, 29), (0, 29), (28, 29)]
    if queries > 1:
        ranges += [(3, 25), (0, 0), (29 - queries, 28)]
    q, k, v = make_qkv(device, batch=len(ranges), queries=queries)
    mask = torch.zeros(len(ranges), 29, dtype=torch.bool)
    for row, (begin, end) in enumerate(ranges):
        mask[row, begin:end] = True
    for x in (k, v):
        x[~mask.to(device)[:, None, :, None].expand_as(x)] = torch.nan
    sinks = torch.randn(6, device=device, dtype=torch.bfloat16) if with_sinks else None
    out, _ = transformers_attention.attention_forward(
        Layer(), q, k, v, mask.to(device), scaling=0.3, softcap=cap, s_aux=sinks, is_causal=causal
    )
    seen = seen_by(queries, 29, causal, None, ranges, len(ranges))
    clean = (x.nan_to_num(0) for x in (k, v))
    assert_close(out, reference(q, *clean, seen, 0.3, cap, sinks), device)


@pytest.mark.parametrize("window", [1, 4, 29, 100])
@pytest.mark.parametrize("queries", [1, 6])
def test_window(device, queries, window):
    q, k, v = make_qkv(device, queries=queries)
    out, _ = transformers_attention.attention_forward(
        Layer(), q, k, v, None, scaling=0.2, sliding_window=window
    )
    assert_close(out, reference(q, k, v, seen_by(queries, 29, True, window), 0.2), device)


def packed(q, k, v, qo, kv, **kwargs):
    return transformers_attention.attention_forward(
        Layer(), q, k, v, None, scaling=0.2, cu_seq_lens_q=qo, cu_seq_lens_k=kv, **kwargs
    )[0]


def test_packed_batch(device):
    """Requests in one row; then other lengths written into the same tensors."""
    q, k, v = make_qkv(device, batch=1, queries=12, keys=31)
    qo = torch.tensor([0, 3, 4, 4, 10], dtype=torch.int32, device=device)
    kv = torch.tensor([0, 9, 22, 22, 31], dtype=torch.int32, device=device)
    for _ in range(2):
        out = packed(q, k, v, qo, kv)
        for i in range(4):
            rows, cols = slice(int(qo[i]), int(qo[i + 1])), slice(int(kv[i]), int(kv[i + 1]))
            if rows.start < rows.stop:
                one = q[:, :, rows], k[:, :, cols], v[:, :, cols]
                seen = seen_by(one[0].shape[2], one[1].shape[2], batch=1)
                assert_close(out[:, rows], reference(*one, seen, 0.2), device)
        assert (out[:, int(qo[-1]) :] == 0).all()  # rows that pad the batch
        qo += torch.tensor([0, 1, 1, 1, 2], dtype=torch.int32, device=device)
        kv -= torch.tensor([0, 2, 3, 3, 3], dtype=torch.int32, device=device)


def test_packed_lengths_of_inference_mode(device):
    """Tensors whose writes torch does not count: the layer's number tells that a step began."""
    with torch.inference_mode():
        test_packed_batch(device)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(dropout=0.1), "dropout"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(position_bias=torch.zeros(1)), "position_bias"),
        (dict(mask=torch.zeros(2, 1, 5, 29)), "attention_mask"),
        (dict(mask=torch.tensor([[1] * 29, [1, 0] * 14 + [1]]).bool()), "request 1 has padding"),
        (dict(is_causal=False, sliding_window=4), "sliding_window"),
    ],
)
def test_refusals(kwargs, match):
    with pytest.raises(UnsupportedError, match=match):
        call(**kwargs)


def test_mask_of_too_few_columns():
    from raddle.integrations.transformers_mask import build_mask

    with pytest.raises(ValueError, match="7 columns, expected at least 29"):
        build_mask(2, 29, attention_mask=torch.ones(2, 7).bool(), q_length=5, q_offset=24)
