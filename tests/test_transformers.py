"""raddle.integrations.transformers: the attention implementation "raddle" against sdpa and eager.

Small random models of each architecture, with tokens, logits and cached K and V of their own.
On the CPU all is float32 and the text must be the same; on CUDA raddle runs float16, and text may
differ where the float32 model itself wavers. Needs: torch, transformers; a GPU for device cuda.
"""

import contextlib
import inspect
import threading

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from raddle.errors import StateError, UnsupportedError  # noqa: E402
from raddle.integrations.transformers import clear, disable, enable, register  # noqa: E402

from tests.transformers_cases import (  # noqa: E402
    MODELS,
    SMALL,
    TINY_LLAMA,
    assert_same_text,
    call,
    count_plans,
    generate,
    generate_batch,
    logits_of,
    make_model,
    make_prompts,
    unpadded,
)


@pytest.fixture(autouse=True)
def no_plans_left():
    yield
    clear()


@pytest.fixture(scope="module")
def models():
    """(name, device) -> a model in float32 on the CPU, float16 on CUDA."""
    made = {}

    def get(name, device):
        if (name, device) not in made:
            made[name, device] = make_model(name).to(device)
            if device == "cuda":
                made[name, device].half()
        return made[name, device]

    return get


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_same(models, device, name):
    model = models(name, device)
    ids, mask = make_prompts(device)
    want, alone = generate(model, ids, mask), generate(model, ids[1:2])
    enable(model)
    got, got_alone = generate(model, ids, mask), generate(model, ids[1:2])
    disable(model)
    assert_same_text(model, unpadded(ids, mask), want, got)
    assert_same_text(model, ids[1:2].tolist(), alone, got_alone)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_with_padding(models, device, name, side):
    model = models(name, device)
    ids, mask = make_prompts(device, seed=1, side=side)
    want = logits_of(model, ids, mask)[mask.bool()]
    enable(model)
    got = logits_of(model, ids, mask)[mask.bool()]
    disable(model)
    tolerance = 2e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "mistral", "gemma2"])
def test_static_cache(models, device, name):
    model = models(name, device)
    ids, mask = make_prompts(device, seed=2)
    want = generate(model, ids, mask, cache_implementation="static")
    enable(model)
    got = generate(model, ids, mask, cache_implementation="static")
    disable(model)
    assert_same_text(model, unpadded(ids, mask), want, got)


def test_static_cache_without_a_mask(models, device):
    """K of a static cache has room behind its tokens, which only the mask function can tell."""
    model = models("llama", device)
    ids, _ = make_prompts(device)
    want = logits_of(model, ids[1:2])
    enable(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    given = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in given else "past_key_values"
    with torch.no_grad():
        first = model(ids[1:2, :15], **{name: cache}, use_cache=True).logits
        rest = model(
            ids[1:2, 15:],
            **{name: cache},
            use_cache=True,
            cache_position=torch.arange(15, 20, device=device),
        ).logits
    disable(model)
    tolerance = 2e-5 if device == "cpu" else 2e-2
    got = torch.cat([first, rest], 1).float()
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_beams(models, device):
    model = models("qwen3", device)
    ids, mask = make_prompts(device)
    want = generate(model, ids, mask, num_beams=3, tokens=10)
    enable(model)
    got = generate(model, ids, mask, num_beams=3, tokens=10)
    disable(model)
    if device == "cpu":
        assert torch.equal(got, want)
    else:
        assert got.shape == want.shape  # a beam that float16 turns changes all that follows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_of_half_types_is_that_of_sdpa(device, dtype):
    ids, mask = make_prompts(device, lengths=(40, 33))
    model = make_model("qwen2").to(device)
    exact = logits_of(model, ids, mask)[mask.bool()]
    model.to(getattr(torch, dtype))
    theirs = logits_of(model, ids, mask)[mask.bool()] - exact
    enable(model)
    ours = logits_of(model, ids, mask)[mask.bool()] - exact
    assert ours.norm() < 1.2 * theirs.norm()


def test_tiny_llama(device):
    if not (TINY_LLAMA / "model.safetensors").exists():
        pytest.skip("needs tiny-llama: examples/tiny-llama/model.safetensors is not here")
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=dtype).to(device)
    words = tokenizers.Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    prompt = words.encode("def fibonacci(n):\n").ids
    ids = torch.tensor([prompt], device=device)
    want = generate(model, ids, tokens=60)
    enable(model)
    got = generate(model, ids, tokens=60)
    batch = generate_batch(model, [prompt], tokens=60)
    disable(model)
    assert_same_text(model, [prompt], want, got)
    assert_same_text(model, [prompt], want, batch)


# ------------------------------------------------------------------ plans


def test_one_plan_per_step(models, device, monkeypatch):
    model = models("llama", device)
    ids, mask = make_prompts(device)
    plans = count_plans(monkeypatch)
    enable(model)
    generate(model, ids, mask, tokens=10)
    disable(model)
    assert len(plans) == 10


def test_threads_have_their_own_plans(models, device):
    name = "llama"
    ids, mask = make_prompts(device)
    model, other = models(name, device), make_model(name).to(device, models(name, device).dtype)
    want = generate(model, ids, mask)
    results = {}

    def work(one):
        results[one] = [generate(one, ids, mask) for _ in range(3)]

    for one in (model, other):
        enable(one)
    threads = [threading.Thread(target=work, args=(one,)) for one in (model, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in (model, other):
        disable(one)
        for got in results[one]:
            assert_same_text(model, unpadded(ids, mask), want, got)


# ------------------------------------------------------------------ switching


def test_disable_restores(models, device):
    model = models("llama", device)
    assert enable(model) is model and enable(model) is model
    assert model.config._attn_implementation == "raddle"
    assert disable(model) is model
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(StateError, match="enable"):
        disable(model)


def test_enable_refuses_other_modules():
    with pytest.raises(UnsupportedError, match="transformers model, got Linear"):
        enable(torch.nn.Linear(2, 2))


def test_bidirectional_and_cross_attention():
    """Whisper: an encoder without mask, a decoder that looks at it."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder")
             for name, n in dict(layers=2, attention_heads=4, ffn_dim=64).items()}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=100, d_model=64, max_source_positions=50, num_mel_bins=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    given = dict(
        input_features=torch.randn(2, 8, 100), decoder_input_ids=torch.randint(3, 100, (2, 9))
    )
    with torch.no_grad():
        want = model(**given).logits
        got = enable(model)(**given).logits
    assert model.config._attn_implementation == "raddle"
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_position_biases_are_refused():
    """T5: by enable() where it does its attention itself, else by the attention."""
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    before = model.config._attn_implementation
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad(), pytest.raises(UnsupportedError, match="position_bias|itself"):
        enable(model)(input_ids=ids, decoder_input_ids=ids)
    with contextlib.suppress(StateError):
        disable(model)
    assert model.config._attn_implementation == before


def test_register_twice_and_load_by_name():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register()
    for name in ("raddle", "paged|raddle"):
        assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
        assert name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
    config = transformers.LlamaConfig(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="raddle")
    assert model.config._attn_implementation == "raddle"
    logits_of(model, torch.tensor([[5, 6, 7]]))


def test_gradients_are_refused(models):
    model = models("llama", "cpu")
    enable(model)
    try:
        with pytest.raises(UnsupportedError, match="no gradient"):
            model(torch.tensor([[5, 6, 7]]))
    finally:
        disable(model)


def test_other_patterns_are_refused(models):
    """A custom mask function, and packed positions, through a whole model."""
    from transformers import masking_utils

    model = models("llama", "cpu")
    enable(model)
    packed_positions = torch.tensor([[0, 1, 2, 0, 1]])
    try:
        with torch.no_grad(), pytest.raises(UnsupportedError, match="cu_seq_lens"):
            model(torch.tensor([[5, 6, 7, 8, 9]]), position_ids=packed_positions, use_cache=False)
    finally:
        disable(model)

    def custom(batch, head, q, k):
        return k % 2 == 0

    pattern = masking_utils.and_masks(masking_utils.causal_mask_function, custom)
    from raddle.integrations.transformers_mask import build_mask

    mask = build_mask(2, 29, pattern, q_length=5, q_offset=24)
    with pytest.raises(UnsupportedError, match="and_mask"):
        call(mask)
    del mask.raddle_step  # as a framework that copies tensors would lose it
    with pytest.raises(UnsupportedError, match="attention_mask"):
        call(mask)
