"""What the ops family takes and refuses. Needs: numpy; torch for the test that says so."""

import numpy as np
import pytest
from raddle import ops
from raddle.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError

from tests.ops_cases import to_bits


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
    (
        lambda: ops.apply_rope(Q, None, POSITIONS, CACHE.astype(np.float16)),
        DTypeError,
        "cos_sin_cache",
    ),
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
    (lambda: ops.sample(X, out=np.ones(4, np.float32)), DTypeError, "out: .*float32"),
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
