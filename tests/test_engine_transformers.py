"""The engine against transformers on the same weights: logits, greedy text, chat prompts.

Needs: torch, transformers, safetensors, tokenizers. Small random models of every architecture, and
examples/tiny-llama.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from raddle.engine import Engine, ModelConfig, SamplingParams, Tokenizer
from raddle.engine.weights import open_weights

from tests.reference.llama import write_tokenizer

torch = pytest.importorskip("torch", reason="needs torch: not installed")
transformers = pytest.importorskip("transformers", reason="needs transformers: not installed")
pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")

TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
TOLERANCE = 1e-4
SMALL = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.1,
    eos_token_id=1,
    bos_token_id=0,
    pad_token_id=2,
)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 20}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (folder, transformers' model in float32)."""
    made = {}

    def get(name):
        if name not in made:
            folder = TINY_LLAMA
            if name != "tiny-llama":
                folder = tmp_path_factory.mktemp(name)
                _save(name, folder)
            elif not (folder / "model.safetensors").exists():
                pytest.skip("needs tiny-llama: examples/tiny-llama/model.safetensors is not here")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            made[name] = folder, model.eval()
        return made[name]

    return get


def _save(name, folder):
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**(SMALL | changes))
    model = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases as they are made would hide mistakes
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder, max_shard_size="150KB" if name == "qwen2" else "1GB")
    write_tokenizer(folder, SMALL["vocab_size"])


def make_engine(folder, **options):
    options = {"max_batch": 16, "kv_memory_bytes": 64 << 20, "dtype": "float32"} | options
    return Engine(ModelConfig.from_folder(folder), open_weights(folder), **options)


def prompts_of(lengths, vocab):
    rng = np.random.default_rng(7)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", [*MODELS, "tiny-llama"])
def test_logits(models, name):
    folder, model = models(name)
    ids = prompts_of([200], model.config.vocab_size)[0]
    got, expected = make_engine(folder).logits(ids), logits_of(model, ids)
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@torch.no_grad()
def greedy(model, prompts, count):
    """Tokens of the prompts, padded on the left and generated as one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None  # nothing ends early
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=2
    )
    return out[:, width:].tolist()


def is_a_tie(model, ids, first, second):
    """Whether these two are the best next tokens, within the tolerance of the logits."""
    row = logits_of(model, ids)[-1]
    limit = TOLERANCE * np.abs(row).max()
    return max(row.max() - row[first], row.max() - row[second]) <= limit


@pytest.mark.parametrize("name", ["tiny-llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_greedy_text_of_a_ragged_batch(models, name):
    """256 tokens of 16 prompts, at page sizes 1, 16 and 64."""
    folder, model = models(name)
    lengths = [1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 32, 33, 64, 90, 120, 200]
    count = 256
    prompts = prompts_of(lengths, model.config.vocab_size)
    expected = greedy(model, prompts, count)
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    ties = 0
    for page_size in (1, 16, 64):
        engine = make_engine(folder, page_size=page_size, max_tokens_per_step=256)
        answers = engine.generate(prompts, params)
        for prompt, (answer,), tokens in zip(prompts, answers, expected):
            pairs = zip(answer.token_ids, tokens)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            assert len(answer.token_ids) == count
            if at is not None:
                ties += 1
                assert is_a_tie(model, prompt + tokens[:at], answer.token_ids[at], tokens[at])
    assert ties <= len(prompts)


MESSAGES = [
    {"role": "system", "content": "Be brief. <b>\u20ac</b>"},
    {"role": "user", "content": "What is a list?\n"},
]


def test_chat_prompts_of_tiny_llama():
    if not (TINY_LLAMA / "tokenizer.json").exists():
        pytest.skip("needs tiny-llama: examples/tiny-llama/tokenizer.json is not here")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    ours = Tokenizer(TINY_LLAMA)
    assert ours.chat_template.render(MESSAGES) == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    for text in ("What is a list?", "\u20ac \U0001f600 \n\t", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]


TEMPLATES = [
    "{%- for m in messages -%}\n  {{ m['role'] | upper }}: {{ m.content | tojson }}\n{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson(indent=2) }}"
    "{% endfor %}{{ strftime_now('%Y') }}",
    "{% if tools is defined %}T{% endif %}{% if tools is none %}N{% endif %}{{ bos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{% generation %}{{ messages[-1].content }}{% endgeneration %}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_render_as_in_transformers(tmp_path, template):
    write_tokenizer(tmp_path, 320)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "chat_template": template,
        "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path.write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(tmp_path).chat_template.render(MESSAGES) == expected
