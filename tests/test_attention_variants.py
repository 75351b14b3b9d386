"""Built-in attention variants and float8 K/V against float64 NumPy, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle.attention import BatchDecode
from raddle.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

from tests.attention_cases import FLOAT8, Batch, assert_close
from tests.variant_cases import KINDS, check


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


SINKS = np.linspace(-3, 4, 8, dtype=np.float32)
K_SCALES = np.array([0.25, 3.0], np.float32)
V_SCALES = np.array([-2.0, 0.5], np.float32)

# name: keywords of the plan, of run(), of the reference
BUILT_IN = {
    "soft cap": (dict(logits_soft_cap=2.5), {}, dict(soft_cap=2.5)),
    "alibi": (dict(pos_encoding="ALIBI"), {}, dict(alibi=True)),
    "rope": (dict(pos_encoding="ROPE"), {}, dict(rope=(1e4, 1.0))),
    "scaled rope": (
        dict(pos_encoding="ROPE", rope_theta=5e5, rope_scale=4.0),
        {},
        dict(rope=(5e5, 4.0)),
    ),
    "sinks": (dict(sinks=True), dict(sinks=SINKS), dict(sinks=SINKS)),
    "sigmoid": (dict(weights="sigmoid"), {}, dict(sigmoid=True)),
    "scales": ({}, dict(k_scale=0.7, v_scale=3.0), dict(k_scale=0.7, v_scale=3.0)),
    "scales per head": (
        {},
        dict(k_scale=K_SCALES, v_scale=V_SCALES),
        dict(k_scale=K_SCALES, v_scale=V_SCALES),
    ),
    "all with alibi": (
        dict(logits_soft_cap=4.0, pos_encoding="ALIBI", sinks=True),
        dict(sinks=SINKS, k_scale=K_SCALES, v_scale=0.5),
        dict(soft_cap=4.0, alibi=True, sinks=SINKS, k_scale=K_SCALES, v_scale=0.5),
    ),
    "all with rope": (
        dict(logits_soft_cap=4.0, pos_encoding="ROPE", sinks=True),
        dict(sinks=SINKS, k_scale=2.0, v_scale=V_SCALES),
        dict(soft_cap=4.0, rope=(1e4, 1.0), sinks=SINKS, k_scale=2.0, v_scale=V_SCALES),
    ),
    "sigmoid of all": (
        dict(logits_soft_cap=4.0, pos_encoding="ALIBI", weights="sigmoid"),
        dict(k_scale=K_SCALES, v_scale=V_SCALES),
        dict(soft_cap=4.0, alibi=True, sigmoid=True, k_scale=K_SCALES, v_scale=V_SCALES),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(rng, device, name, kind):
    spec, run, variant = BUILT_IN[name]
    check(rng, kind, device, variant, spec=spec, run=run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["decode", "few tokens", "prefill"])
@pytest.mark.parametrize("name", ["all with alibi", "all with rope", "sigmoid of all"])
def test_16_bit(rng, device, name, kind, dtype):
    spec, run, variant = BUILT_IN[name]
    check(rng, kind, device, variant, spec=spec, run=run, dtype=dtype)


@pytest.mark.parametrize("kind", ["decode", "few tokens", "prefill"])
@pytest.mark.parametrize("name", ["all with alibi", "all with rope", "sigmoid of all"])
def test_with_a_window(rng, device, name, kind):
    spec, run, variant = BUILT_IN[name]
    check(rng, kind, device, variant, spec=spec, run=run, window_left=20, lse_base="e")


@pytest.mark.parametrize("group_size", [1, 4, 5, 7, 12])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kind", ["decode", "few tokens"])
def test_groups_and_head_dims(rng, device, kind, head_dim, group_size):
    heads = (2 * group_size, 2)
    sinks = rng.standard_normal(heads[0]).astype(np.float32)
    for spec, variant in (
        (dict(pos_encoding="ROPE"), dict(rope=(1e4, 1.0))),
        (dict(pos_encoding="ALIBI"), dict(alibi=True)),
    ):
        check(
            rng,
            kind,
            device,
            dict(variant, soft_cap=3.0, sinks=sinks),
            spec=dict(spec, logits_soft_cap=3.0, sinks=True),
            run=dict(sinks=sinks),
            heads=heads,
            head_dim=head_dim,
            page_size=16,
        )


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float8(rng, device, dtype, kind, kv_dtype):
    if device == "cuda" and dtype == "float32":
        pytest.skip("the CUDA kernels take float16 or bfloat16")
    scales = dict(k_scale=K_SCALES, v_scale=V_SCALES)
    check(rng, kind, device, scales, spec=dict(kv_dtype=kv_dtype), run=scales, dtype=dtype)


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("group_size", [1, 4, 5, 7, 12])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_float8_groups_and_head_dims(rng, device, head_dim, group_size, kv_dtype):
    if device == "cuda" and head_dim % 16:
        with pytest.raises(UnsupportedError, match="expected a multiple of 16"):
            BatchDecode(
                num_qo_heads=2,
                num_kv_heads=2,
                head_dim=head_dim,
                page_size=16,
                max_batch=1,
                max_pages=1,
                kv_dtype=kv_dtype,
                device=device,
            )
        return
    heads = (2 * group_size, 2)
    scales = dict(k_scale=0.3, v_scale=1.7)
    for kind in ("decode", "few tokens"):
        check(
            rng,
            kind,
            device,
            scales,
            spec=dict(kv_dtype=kv_dtype),
            run=scales,
            heads=heads,
            head_dim=head_dim,
            dtype="bfloat16",
            page_size=16,
        )


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("name", ["all with alibi", "all with rope", "sigmoid of all"])
def test_float8_with_built_ins(rng, device, name, kv_dtype):
    spec, run, variant = BUILT_IN[name]
    spec = dict(spec, kv_dtype=kv_dtype)
    for kind in ("decode", "few tokens", "prefill"):
        check(rng, kind, device, variant, spec=spec, run=run, dtype="bfloat16")


def test_float8_of_torch(rng, device):
    torch = pytest.importorskip("torch", reason="needs torch")
    kind = KINDS["decode"]
    for name in FLOAT8:
        batch = Batch(rng, kind.kv_lens, num_qo_heads=8, dtype="bfloat16", kv_dtype=name)
        plan = BatchDecode(
            num_qo_heads=8,
            num_kv_heads=2,
            head_dim=64,
            page_size=16,
            max_batch=8,
            max_pages=40,
            kv_dtype=getattr(torch, name),
            device=device,
        )
        plan.plan(batch.indptr, batch.indices, batch.last_page_len)
        cache = torch.from_numpy(batch.kv_cache).to(device).view(getattr(torch, name))
        q = torch.from_numpy(batch.q.view(np.int16)).to(device).view(torch.bfloat16)
        out = plan.run(q, cache)
        assert_close(out.double().cpu().numpy(), batch.expected()[0], "bfloat16")


def test_a_negative_scale_finds_the_largest_logit(rng, device):
    """Of logits in the thousands: a wrong maximum overflows."""
    scales = np.array([-100.0, 100.0], np.float32)
    run = dict(k_scale=scales)
    check(rng, "decode", device, run, run=run, sm_scale=1.0, dtype="float16")


def test_sinks_of_rows_that_see_nothing(device):
    """0, and the lse is the sink's own; -inf is no sink."""
    sinks = np.array([1.5, -np.inf, 0.0, -2.0], np.float32)
    heads = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64)
    plan = BatchDecode(
        page_size=16, max_batch=2, max_pages=1, dtype="float16", sinks=True, device=device, **heads
    )
    plan.plan(np.zeros(3, np.int32), np.zeros(0, np.int32), np.zeros(2, np.int32))
    q = raddle.tensor(np.ones((2, 4, 64), np.float16), device=device)
    cache = raddle.tensor(np.full((1, 2, 16, 2, 64), np.nan, np.float16), device=device)
    sinks_there = raddle.tensor(sinks, device=device)
    out, lse = plan.run(q, cache, sinks=sinks_there, return_lse=True)
    assert (out.to("cpu").numpy() == 0).all()
    lse = lse.to("cpu").numpy()
    np.testing.assert_allclose(lse, np.tile(sinks / np.log(2), (2, 1)), rtol=1e-6)


def test_soft_cap_and_rope_far_out(rng, device):
    """Logits far past the cap, positions past 10^6: the angle is as exact as a near one's."""
    check(
        rng, "decode", device, dict(soft_cap=30.0), spec=dict(logits_soft_cap=30.0), sm_scale=50.0
    )
    heads = dict(num_qo_heads=1, num_kv_heads=1, head_dim=64)
    tokens, page_size = 1_200_001, 65536
    pages = -(-tokens // page_size)
    plan = BatchDecode(
        page_size=page_size,
        max_batch=1,
        max_pages=pages,
        dtype="float16",
        pos_encoding="ROPE",
        window_left=3,
        device=device,
        **heads,
    )
    plan.plan(
        np.array([0, pages], np.int32),
        np.array([0] * (pages - 1) + [1], np.int32),
        np.array([tokens - (pages - 1) * page_size], np.int32),
    )
    cache = np.full((2, 2, page_size, 1, 64), np.nan, np.float16)
    last = np.arange(tokens - 4, tokens) % page_size
    cache[1, :, last] = rng.standard_normal((4, 2, 1, 64))
    q = rng.standard_normal((1, 1, 64)).astype(np.float16)
    out = plan.run(raddle.tensor(q, device=device), raddle.tensor(cache, device=device))
    # Only distances matter: the same four tokens at the start.
    from tests.reference.attention import Variant, attend

    want, _ = attend(q, cache[1, 0, last], cache[1, 1, last], variant=Variant(rope=(1e4, 1.0)))
    np.testing.assert_allclose(out.to("cpu").numpy(), want, rtol=2e-3, atol=2e-3)


SPEC = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=1, max_pages=4)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (dict(logits_soft_cap=-1.0), ArgumentError, "logits_soft_cap"),
        (dict(logits_soft_cap=float("nan")), ArgumentError, "logits_soft_cap"),
        (dict(pos_encoding="ROPE_LLAMA"), ArgumentError, "pos_encoding"),
        (dict(pos_encoding="ROPE", rope_theta=-2.0), ArgumentError, "rope_theta"),
        (dict(pos_encoding="ROPE", rope_scale=float("inf")), ArgumentError, "rope_scale"),
        (dict(pos_encoding="ROPE", head_dim=72), ShapeError, "multiple of 16"),
        (dict(weights="relu"), ArgumentError, "weights"),
        (dict(weights="sigmoid", sinks=True), ArgumentError, "sinks"),
        (dict(dtype="float8_e4m3fn"), DTypeError, "dtype"),
        (dict(kv_dtype="int8"), DTypeError, "kv_dtype"),
    ],
)
def test_plans_refuse(device, words, error, message):
    with pytest.raises(error, match=message):
        BatchDecode(**{**SPEC, "device": device, **words})


@pytest.mark.parametrize(
    ("spec", "words", "error", "message"),
    [
        (dict(sinks=True), {}, ArgumentError, "sinks"),
        ({}, dict(sinks=np.zeros(4, np.float32)), ArgumentError, "sinks"),
        (dict(sinks=True), dict(sinks=np.zeros(5, np.float32)), ShapeError, "sinks"),
        (dict(sinks=True), dict(sinks=np.zeros(4, np.float16)), DTypeError, "sinks"),
        ({}, dict(k_scale=float("nan")), ArgumentError, "k_scale"),
        ({}, dict(v_scale=np.zeros(3, np.float32)), ShapeError, "v_scale"),
        ({}, dict(k_scale=np.zeros((2, 1), np.float32)), ShapeError, "k_scale"),
        (dict(weights="sigmoid"), dict(return_lse=True), UnsupportedError, "lse"),
        ({}, dict(variant_args={}), ArgumentError, "variant_args"),
    ],
)
def test_runs_refuse(device, spec, words, error, message):
    plan = BatchDecode(**{**SPEC, "device": device, "dtype": "float16", **spec})
    plan.plan(np.array([0, 1], np.int32), np.array([0], np.int32), np.array([3], np.int32))
    q = raddle.tensor(np.zeros((1, 4, 64), np.float16), device=device)
    cache = raddle.tensor(np.zeros((1, 2, 16, 2, 64), np.float16), device=device)
    words = {
        name: raddle.tensor(x, device=device) if isinstance(x, np.ndarray) else x
        for name, x in words.items()
    }
    with pytest.raises(error, match=message):
        plan.run(q, cache, **words)
