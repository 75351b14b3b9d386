"""raddle.flashinfer.sampling: whose random numbers, whose parameters, which errors.

Needs: torch; a GPU for device cuda.
"""

from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

from raddle.errors import ArgumentError  # noqa: E402
from raddle.flashinfer import sampling  # noqa: E402


def make_probs(device, n=4, vocab=257, seed=42):
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)).to(device)
    return logits, torch.softmax(logits, -1)


def samplers(device, indices=None):
    logits, probs = make_probs(device)
    both = partial(
        sampling.top_k_top_p_sampling_from_probs, probs, 100, 0.8, filter_apply_order="joint"
    )
    calls = {
        "logits": partial(sampling.sampling_from_logits, logits),
        "probs": partial(sampling.sampling_from_probs, probs),
        "top_k": partial(sampling.top_k_sampling_from_probs, probs, 100),
        "top_p": partial(sampling.top_p_sampling_from_probs, probs, 0.8),
        "min_p": partial(sampling.min_p_sampling_from_probs, probs, 0.1),
        "joint": both,
        "both": partial(sampling.top_k_top_p_sampling_from_logits, logits, 100, 0.8),
    }
    return {name: partial(call, indices=indices) for name, call in calls.items()}


NAMES = ["logits", "probs", "top_k", "top_p", "min_p", "joint", "both"]


# ------------------------------------------------------------------ seed, offset, generator


@pytest.mark.parametrize("name", NAMES)
def test_generators_give_the_numbers_and_move_on(device, name):
    indices = torch.zeros(64, dtype=torch.int32, device=device)
    call = samplers(device, indices)[name]
    first = torch.Generator(device).manual_seed(7)
    second = first.clone_state()
    a, b, c = call(generator=first), call(generator=second), call(generator=first)
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(3)
    d, e = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), d) and torch.equal(call(), e) and not torch.equal(d, e)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_seeds_of_one_or_of_each(device, name, dtype):
    """One pair: numbers by place. One each: as that output alone, wherever it stands."""
    indices = torch.tensor([2, 0, 2, 1, 3, 3], dtype=torch.int32, device=device)
    call = samplers(device, indices)[name]
    seeds = torch.tensor([17, 324, 907, 1049, 1049, 1049], device=device)
    seeds[0] += 2**62
    offsets = torch.tensor([0, 128, 512, 1024, 4, 4], device=device)

    def as_dtype(x):
        return x.view(dtype)

    one = call(seed=as_dtype(seeds[1:2]), offset=as_dtype(offsets[1:2]))
    assert torch.equal(one, call(seed=324, offset=128))
    for seed, offset in ((seeds, offsets), (seeds, offsets[:1]), (seeds[:1], offsets)):
        whole = call(seed=as_dtype(seed), offset=as_dtype(offset))
        assert whole[4] == whole[5] or len(seed) == 1
        rows = [5, 1, 3]
        part = samplers(device, indices[rows])[name](
            seed=as_dtype(seed[rows] if len(seed) > 1 else seed),
            offset=as_dtype(offset[rows] if len(offset) > 1 else offset),
        )
        assert torch.equal(part, whole[rows])
        alone = samplers(device, indices[3:4])[name](
            seed=as_dtype(seed[3:4] if len(seed) > 1 else seed),
            offset=as_dtype(offset[3:4] if len(offset) > 1 else offset),
        )
        assert alone[0] == whole[3]


def test_seed_errors(device):
    call = samplers(device)["probs"]
    four = torch.arange(4, device=device)
    for seed, offset, match in (
        (four, 0, "both be tensors"),
        (1, four, "both be tensors"),
        (four[:3], four, "seed tensor length must be 1 or 4"),
        (four, four[:0], "offset tensor length must be 1 or 4"),
        (four.int(), four, "seed tensor must be int64"),
        (four, four[None], "offset tensor must be 1D"),
    ):
        with pytest.raises(ValueError, match=match):
            call(seed=seed, offset=offset)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_seeds_are_read_at_replay(name):
    indices = torch.tensor([2, 0, 2, 1], dtype=torch.int32, device="cuda")
    call = samplers("cuda", indices)[name]
    seed, offset = torch.arange(4, device="cuda"), torch.arange(4, device="cuda") * 4
    call(seed=seed, offset=offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(seed=seed, offset=offset)
    for _ in range(3):
        seed += 12345
        graph.replay()
        assert torch.equal(out, call(seed=seed, offset=offset))


# ------------------------------------------------------------------ parameters


def test_parameters_belong_to_outputs(device):
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], device=device)
    trials = 200
    indices = torch.zeros(3 * trials, dtype=torch.int32, device=device)
    indices[1::3] = 1

    def supports(tokens):
        return [sorted(set(tokens[i::3].tolist())) for i in range(3)]

    def repeat(*values):
        return torch.tensor(values, device=device).repeat(trials)

    cases = {
        sampling.top_k_sampling_from_probs: repeat(1, 2, 3),
        sampling.top_p_sampling_from_probs: repeat(0.4, 0.79, 1.0),
        sampling.min_p_sampling_from_probs: repeat(0.9, 0.5, 0.0),
    }
    for function, parameter in cases.items():
        tokens = function(probs, parameter, indices=indices)
        assert supports(tokens) == [[0], [1, 2], [0, 1, 2]]
    tokens = sampling.top_k_top_p_sampling_from_probs(
        probs, torch.tensor([1, 2], device=device), 1.0, indices=indices
    )  # one top_k for each row, as FlashInfer's top_k_first takes it
    assert supports(tokens) == [[0], [1, 2], [0]]


def test_parameter_errors_and_integers(device):
    _, probs = make_probs(device)

    def full(value, *shape):
        return torch.full(shape, value, dtype=torch.int32, device=device)

    for function in (
        sampling.top_k_sampling_from_probs,
        sampling.top_p_sampling_from_probs,
        sampling.min_p_sampling_from_probs,
        sampling.top_p_renorm_probs,
        sampling.top_k_renorm_probs,
        sampling.top_k_mask_logits,
    ):
        assert function(probs, full(1, 4)).shape[0] == 4
        with pytest.raises(ValueError, match=r"Expected a 1D tensor or scalar.*got a 2D tensor"):
            function(probs, full(1, 4, 4))
        with pytest.raises(ValueError, match=r"shape \(batch_size,\).*got a 0-dimensional tensor"):
            function(probs, full(1))
        with pytest.raises(ValueError, match="Sampling parameter tensor batch size mismatch"):
            function(probs, full(1, 1))
    for function in (sampling.top_p_sampling_from_probs, sampling.min_p_sampling_from_probs):
        assert function(probs, full(0, 4)).shape == (4,)
        assert function(probs, 0).shape == (4,)
    assert torch.equal(
        sampling.top_p_sampling_from_probs(probs, 0.0), probs.argmax(-1).to(torch.int32)
    )


def test_logits_and_probabilities_draw_alike(device):
    logits, probs = make_probs(device, 99, 5000)
    for order, top_k, top_p in (("joint", 500, 0.5), ("top_k_first", 100, 0.5)):
        options = {"filter_apply_order": order, "seed": 5, "offset": 8}
        a = sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p, **options)
        b = sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p, **options)
        assert torch.equal(a, b) if order == "joint" else (a != b).sum() <= 1


def test_filters(device):
    logits, probs = make_probs(device)
    for k in (3, torch.tensor([3, 1, 257, 9], device=device)):
        kept = sampling.top_k_renorm_probs(probs, k)
        masked = torch.softmax(sampling.top_k_mask_logits(logits, k), -1)
        torch.testing.assert_close(kept, masked, rtol=1e-4, atol=1e-6)
        counts = torch.as_tensor(k, device=device).expand(4)
        assert torch.equal((kept > 0).sum(-1), counts)
    kept = sampling.top_p_renorm_probs(probs.half(), 0.3)
    assert kept.dtype == torch.float16 and (kept > 0).sum(-1).max() < 100
    torch.testing.assert_close(
        kept.sum(-1).float(), torch.ones(4, device=device), rtol=0, atol=0.01
    )
    assert sampling.top_p_renorm_prob is sampling.top_p_renorm_probs
    assert sampling.top_k_renorm_prob is sampling.top_k_renorm_probs


def test_softmax(device):
    logits, probs = make_probs(device)
    torch.testing.assert_close(sampling.softmax(logits, enable_pdl=True), probs)
    cold = torch.tensor([0.5, 1, 2, 4], device=device)
    for temperature in (cold, cold.double(), cold.half()):
        want = torch.softmax(logits / cold[:, None], -1)
        torch.testing.assert_close(sampling.softmax(logits, temperature), want)
    torch.testing.assert_close(sampling.softmax(logits.double(), 2), torch.softmax(logits / 2, -1))
    for bad, error, reason in (
        (cold[:3], ValueError, "length must equal"),
        (cold[:, None], ValueError, "must be 1D"),
        (cold.int(), ValueError, "must have dtype"),
        (cold.to("meta"), ValueError, "same device as logits"),
        (True, TypeError, "a real scalar"),
    ):
        with pytest.raises(error, match=f"temperature .*{reason}"):
            sampling.softmax(logits, bad)


# ------------------------------------------------------------------ rows of nothing, drafts


def test_rows_of_nothing(device):
    probs = torch.tensor([[0.0, 1.0], [0.0, 0.0], [float("nan"), 1.0]], device=device)
    tokens, valid = sampling.sampling_from_probs(probs, return_valid=True)
    assert tokens.tolist() == [1, 0, 0] and valid.tolist() == [True, False, False]
    assert valid.dtype == torch.bool
    with pytest.raises(ValueError, match="Input probs contains NaN"):
        sampling.top_p_sampling_from_probs(probs, 0.5, check_nan=True)
    if device == "cpu":
        with pytest.raises(ArgumentError, match="probs: .*row 1"):
            sampling.sampling_from_probs(probs)
    else:
        assert sampling.sampling_from_probs(probs).tolist() == [1, 0, 0]


def test_chain_speculative_sampling(device):
    draft = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]], device=device)
    ids = torch.tensor([[2, 1]], dtype=torch.int32, device=device)
    target = [[[0.0, 0.1, 0.6, 0.3], [1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]]
    target = torch.tensor(target, device=device)
    tokens, accepted, emitted = sampling.chain_speculative_sampling(draft, ids, target)
    assert tokens.tolist() == [[2, 0, -1]] and tokens.dtype == torch.int32
    assert accepted.tolist() == [1] and emitted.tolist() == [1]
    again = sampling.chain_speculative_sampling(
        draft, ids.long(), target.double(), accepted, emitted, True, None, 3, 8
    )
    assert again[1] is accepted and accepted.tolist() == [2] and emitted.tolist() == [2]
    generator = torch.Generator(device).manual_seed(1)
    for options in ({"generator": generator}, {"seed": 1, "offset": 0}):
        sampling.chain_speculative_sampling(draft, ids, target, **options)
    two = torch.arange(2, device=device)
    with pytest.raises(ValueError, match="seed tensor length"):
        sampling.chain_speculative_sampling(draft, ids, target, seed=two, offset=two)
