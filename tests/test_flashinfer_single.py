"""raddle.flashinfer's calls for one request do as FlashInfer's documentation says.

On torch tensors, against float64. Needs: torch; a GPU for device cuda.
"""

import numpy as np
import pytest
from raddle import flashinfer
from raddle.flashinfer import _plans

from tests.attention_cases import assert_close, from_bits, to_bits
from tests.flashinfer_cases import VARIANTS, to_torch, value
from tests.reference.attention import Variant, attend

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.skipif(torch is None, reason="needs torch: it is not installed")


@pytest.fixture(autouse=True)
def no_kept_plans():
    yield
    _plans.clear_single_plans()


# -- single requests ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_decode(device, layout):
    rng = np.random.default_rng(1)
    for kv_len in (1, 33, 33, 700, 2):
        q, k, v = (
            to_bits(rng.standard_normal(shape), "bfloat16")
            for shape in ((6, 64), (kv_len, 2, 64), (kv_len, 2, 64))
        )
        want_out, want_lse = attend(*(from_bits(x, "bfloat16") for x in (q[None], k, v)))
        if layout == "HND":
            k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))
        q, k, v = (to_torch(x, "bfloat16", device) for x in (q, k, v))
        out, lse = flashinfer.single_decode_with_kv_cache(q, k, v, layout, return_lse=True)
        assert out.shape == q.shape and lse.shape == (6,)
        assert_close(value(out), want_out[0], "bfloat16")
        assert_close(value(lse), want_lse[0], "float16")
        assert torch.equal(flashinfer.single_decode_with_kv_cache(q, k, v, layout), out)


@pytest.mark.parametrize("name", VARIANTS)
def test_single_variants(device, name):
    given, expected = VARIANTS[name]
    rng = np.random.default_rng(2)
    q, k, v = (
        to_bits(rng.standard_normal(shape), "float16")
        for shape in ((7, 6, 64), (90, 2, 64), (90, 2, 64))
    )
    want_out, want_lse = attend(
        *(from_bits(x, "float16") for x in (q, k, v)), causal=True, **expected
    )
    q, k, v = (to_torch(x, "float16", device) for x in (q, k, v))
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True, **given)
    assert_close(value(out), want_out, "float16")
    assert_close(value(lse), want_lse, "float16")
    # The last token of a causal prefill is a decode.
    out, lse = flashinfer.single_decode_with_kv_cache(q[-1], k, v, **given, return_lse=True)
    assert_close(value(out), want_out[-1], "float16")
    assert_close(value(lse), want_lse[-1], "float16")


def test_single_scales(device):
    rng = np.random.default_rng(4)
    q, k, v = (to_bits(rng.standard_normal(s), "float16") for s in ((6, 64), *[(90, 2, 64)] * 2))
    want, _ = attend(
        *(from_bits(x, "float16") for x in (q[None], k, v)),
        variant=Variant(k_scale=0.4, v_scale=2.0),
    )
    q, k, v = (to_torch(x, "float16", device) for x in (q, k, v))
    out = flashinfer.single_decode_with_kv_cache(q, k, v, q_scale=0.5, k_scale=0.8, v_scale=2.0)
    assert_close(value(out), want[0], "float16")
