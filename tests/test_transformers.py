"""raddle.integrations.transformers: the attention implementation "raddle" against sdpa and eager.

Small random models of each architecture, with tokens, logits and cached K and V of their own.
On the CPU all is float32 and the text must be the same; on CUDA raddle runs float16, and text may
differ where the float32 model itself wavers. Needs: torch, transformers; a GPU for device cuda.
"""

import contextlib
import inspect
import re
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from raddle.errors import StateError, UnsupportedError  # noqa: E402
from raddle.integrations import (  # noqa: E402
    transformers_attention,
    transformers_paged,
    transformers_plans,
)
from raddle.integrations.transformers import clear, disable, enable, register  # noqa: E402

TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
SMALL = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "mistral": ("Mistral", dict(sliding_window=8)),
    # Soft cap: logits of up to 20 are capped at 5.
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
                              attn_logit_softcapping=5.0)),
    "gpt-oss": ("GptOss", dict(head_dim=16, sliding_window=8, num_local_experts=2,
                               num_experts_per_tok=1)),
}  # fmt: skip
EAGER = ("gemma2", "gpt-oss")  # which sdpa cannot do
WINDOWS = ("qwen2-window", "mistral", "gemma2", "gpt-oss")


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


def make_model(name):
    kind, changes = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind + "Config")(**(SMALL | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or "sinks" in str(type(parameter)):
                parameter.normal_(0, 0.15)
        for module in model.modules():
            if hasattr(module, "sinks"):
                module.sinks.normal_(0, 2)
    model.set_attn_implementation("eager" if name in EAGER else "sdpa")
    return model


def make_prompts(device, lengths=(13, 20, 7), seed=0, side="left"):
    """ids and mask [len(lengths), max(lengths)]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 128, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        begin = dict(left=width - length, right=0, both=(width - length) // 2)[side]
        mask[row, begin : begin + length] = 1
    return (ids * mask).to(device), mask.to(device)


def generate(model, ids, mask=None, tokens=24, **kwargs):
    kwargs.setdefault("do_sample", False)
    if "cache_implementation" in kwargs:
        kwargs["disable_compile"] = True
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **kwargs)
    return out[:, ids.shape[1] :]


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits.float()


def assert_same_text(model, prompts, want, got):
    """Token by token, up to the first place where float16 may have turned a near tie."""
    for prompt, one, other in zip(prompts, want, got, strict=True):
        one, other = list(map(int, one)), list(map(int, other))
        if one == other:
            continue
        assert model.dtype == torch.float16, (one, other)
        at = next(i for i in range(len(one)) if one[i] != other[i])
        ids = torch.tensor([list(prompt) + one[:at]], device=model.device)
        logits = logits_of(model, ids)[0, -1]
        assert (logits[one[at]] - logits[other[at]]).abs() < 0.02 * logits.abs().max(), (one, other)


def unpadded(ids, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]


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


# ------------------------------------------------------------------ continuous batching


def batch_options(tokens):
    """Keyword arguments of generate_batch(): a small cache, greedy."""
    config = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    options = dict(generation_config=config, progress_bar=False)
    sizes = dict(num_blocks=64, max_batch_tokens=256)
    if hasattr(transformers, "ContinuousBatchingConfig"):
        known = transformers.ContinuousBatchingConfig.__dataclass_fields__
        sizes["page_size" if "page_size" in known else "block_size"] = 16
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**sizes)
    else:
        vars(config).update(sizes)
    return options


@pytest.fixture(autouse=True)
def memory_to_report(monkeypatch, request):
    """Some versions cannot size a cache on the CPU, or not without psutil."""
    name = "get_device_and_memory_breakdown"
    if "cuda" not in request.node.name:
        with contextlib.suppress(ImportError):
            from transformers.generation.continuous_batching import cache

            monkeypatch.setattr(cache, name, lambda: (torch.device("cpu"), 2**30, 0, 0))


def generate_batch(model, prompts, tokens=20):
    """Texts in the order of prompts."""
    out = model.generate_batch(prompts, **batch_options(tokens))
    texts = {tuple(one.prompt_ids): one.generated_tokens for one in out.values()}
    return [texts[tuple(prompt)] for prompt in prompts]


def test_readme_program(models):
    """The README's own lines."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    lines = re.search(r"```py\n(from raddle.integrations.transf.*?)```", readme.read_text(), re.S)
    model = models("llama", "cpu")
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    given = dict(model=model, prompts=prompts, ids=torch.tensor(prompts[:1]))
    exec(lines[1], given | dict(options=batch_options(5)))
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def their_paging():
    """Name of transformers' own paged implementation where its windows differ from generate(), as
    those of 4.5x and 5.0 do; else None."""
    reason = "needs transformers 4.57: an earlier one has another continuous batching"
    continuous_api = pytest.importorskip(
        "transformers.generation.continuous_batching.continuous_api", reason=reason
    )
    manager = continuous_api.ContinuousBatchingManager
    if hasattr(manager, "switch_to_cb_friendly_attn"):
        return None
    names = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
    return "paged|sdpa" if "paged|sdpa" in names else "sdpa_paged"


@pytest.mark.parametrize("name", MODELS)
def test_continuous_batching(models, device, name, their_paging, monkeypatch):
    model = models(name, device)
    prompts = [make_prompts("cpu", lengths=(n,), seed=n)[0][0].tolist() for n in (5, 17, 33, 2, 60)]
    if name in WINDOWS and their_paging:
        if name in EAGER:
            pytest.skip("needs transformers 5.17: paged windows with caps or sinks in earlier ones")
        model.set_attn_implementation(their_paging)
        want = generate_batch(model, prompts)
        model.set_attn_implementation("sdpa")
    else:
        want = [generate(model, torch.tensor([p], device=device), tokens=20)[0] for p in prompts]
    runs, plans = count(monkeypatch, transformers_paged, "run"), count_plans(monkeypatch)
    steps = count(monkeypatch, type(model), "forward")
    enable(model)
    got = generate_batch(model, prompts)
    disable(model)
    assert_same_text(model, prompts, want, got)
    # K and V stay in the cache; planned once per step and kind of layer, not for each layer.
    kinds = 2 if name in WINDOWS and name != "mistral" else 1
    assert len(plans) <= kinds * len(steps)
    assert (len(runs) > 0) == (name != "mistral")


def count(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def count_plans(monkeypatch):
    calls = []
    for kind in (transformers_plans.BatchPrefill, transformers_plans.BatchRaggedPrefill):
        original = kind.plan

        def plan(*args, _original=original, **kwargs):
            calls.append(None)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kind, "plan", plan)
    return calls


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


# ------------------------------------------------------------------ the function itself


class Layer(torch.nn.Module):
    is_causal = True
    layer_idx = 0


def make_qkv(device, batch=2, heads=6, kv_heads=2, queries=5, keys=29, dim=32, dim_v=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if device == "cpu" else torch.float16

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return (
        make(batch, heads, queries, dim),
        make(batch, kv_heads, keys, dim),
        make(batch, kv_heads, keys, dim_v or dim),
    )


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


def call(mask=None, **kwargs):
    q, k, v = make_qkv("cpu")
    return transformers_attention.attention_forward(Layer(), q, k, v, mask, **kwargs)


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


def test_mask_of_too_few_columns():
    from raddle.integrations.transformers_mask import build_mask

    with pytest.raises(ValueError, match="7 columns, expected at least 29"):
        build_mask(2, 29, attention_mask=torch.ones(2, 7).bool(), q_length=5, q_offset=24)
