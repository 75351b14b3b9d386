"""Small random models of each architecture that raddle serves in transformers, and their text.

Needs: torch, transformers.
"""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")

from raddle.integrations import transformers_attention, transformers_plans  # noqa: E402

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


def generate_batch(model, prompts, tokens=20):
    """Texts in the order of prompts."""
    out = model.generate_batch(prompts, **batch_options(tokens))
    texts = {tuple(one.prompt_ids): one.generated_tokens for one in out.values()}
    return [texts[tuple(prompt)] for prompt in prompts]


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


def call(mask=None, **kwargs):
    q, k, v = make_qkv("cpu")
    return transformers_attention.attention_forward(Layer(), q, k, v, mask, **kwargs)
