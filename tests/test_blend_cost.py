"""Cost models for the offline scheduler: parameters of models, rates of machines, files.

Needs: a checkout, for examples/tiny-llama.
"""

import json
from pathlib import Path

import pytest
from raddle.blend import CostModel
from raddle.blend.cost import HARDWARE, LLAMA_3_8B
from raddle.blend.shape import Shape
from raddle.errors import ArgumentError, DTypeError, RaddleIOError, UnsupportedError

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"


# -- models -------------------------------------------------------------------------------------


def config(architecture, hidden, inner, layers, heads, kv_heads, vocab, **more):
    return {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        **more,
    }


MIXTRAL = config(
    "MixtralForCausalLM", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
)
QWEN3_MOE = config(
    "Qwen3MoeForCausalLM", 2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
QWEN2_MOE = config(
    "Qwen2MoeForCausalLM", 2048, 5632, 24, 16, 16, 151936, num_experts=60, num_experts_per_tok=4,
    moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
)  # fmt: skip
TIED = dict(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("content", "parameters"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (config("LlamaForCausalLM", 2048, 5632, 22, 32, 4, 32000), 1_100_048_384),
        (
            config("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000, sliding_window=None),
            7_241_732_096,
        ),
        (config("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
        (config("Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936, **TIED), 494_032_768),
        (config("Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 151936, **TIED), 596_049_920),
        (MIXTRAL, 46_702_792_704),
        (QWEN3_MOE, 30_532_122_624),
        (QWEN2_MOE, 14_315_784_192),
    ],
)
def test_parameters_as_published(content, parameters):
    """Counts that the models' own pages give."""
    assert Shape.from_dict(content).parameters == parameters


def test_tiny_llama_has_what_its_file_holds():
    """A safetensors file begins with the length of a header that has every tensor's shape."""
    data = (TINY / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for extent in tensor["shape"]:
                size *= extent
            count += size
    assert Shape.from_dict(json.loads((TINY / "config.json").read_text())).parameters == count


def test_experts_in_use():
    for content, unused in ((MIXTRAL, 6 / 8), (QWEN3_MOE, 120 / 128), (QWEN2_MOE, 56 / 60)):
        shape = Shape.from_dict(content)
        width = content.get("moe_intermediate_size", content["intermediate_size"])
        experts = content.get("num_local_experts", content.get("num_experts"))
        everything = 3 * content["hidden_size"] * width * experts * content["num_hidden_layers"]
        assert shape.parameters - shape.active_parameters == everything * unused
    dense = Shape.from_dict({**QWEN3_MOE, "mlp_only_layers": list(range(48))})
    assert dense.parameters == dense.active_parameters
    half = Shape.from_dict({**QWEN3_MOE, "decoder_sparse_step": 2})
    assert dense.parameters < half.parameters < Shape.from_dict(QWEN3_MOE).parameters


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (config("DeepseekV3ForCausalLM", 8, 8, 1, 1, 1, 8), UnsupportedError, "Deepseek"),
        (config("JambaForCausalLM", 8, 8, 1, 1, 1, 8), UnsupportedError, "Jamba"),
        ({"hidden_size": 8}, UnsupportedError, "architectures is missing"),
        ({**LLAMA_3_8B, "num_local_experts": 16}, UnsupportedError, "with experts"),
        ({**LLAMA_3_8B, "layer_types": ["linear_attention"]}, UnsupportedError, "linear_attention"),
        ({**LLAMA_3_8B, "quantization_config": {"quant_method": "awq"}}, UnsupportedError, "awq"),
        (config("MistralForCausalLM", 64, 64, 1, 4, 1, 8), UnsupportedError, "sliding_window"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, ArgumentError, "num_experts_per_tok"),
        ({**MIXTRAL, "num_local_experts": None}, ArgumentError, "num_local_experts"),
        ({**QWEN3_MOE, "decoder_sparse_step": 0}, ArgumentError, "decoder_sparse_step"),
        ({**QWEN2_MOE, "qkv_bias": False}, UnsupportedError, "qkv_bias"),
        ({**LLAMA_3_8B, "hidden_size": -1}, ArgumentError, "hidden_size"),
    ],
)
def test_models_that_are_refused(content, error, words):
    with pytest.raises(error, match=words):
        CostModel.from_config(content, "a100")


# -- cost models --------------------------------------------------------------------------------


def test_llama_on_an_a100(tmp_path):
    cost = CostModel.from_config(LLAMA_3_8B, "a100")
    assert cost.flops_per_token == 2 * 8_030_261_248 == cost.weight_bytes
    assert cost.flops_per_score == 4 * 32 * 128 * 32
    assert cost.kv_bytes_per_token == 131_072
    assert (cost.gemm_rate, cost.rate_tokens, cost.alpha) == ((225e12,), (1.0,), 0.45)
    assert (cost.attention_flops_rate, cost.read_rate, cost.overhead) == (225e12, 1.73e12, 0)
    assert cost.memory_tokens(cost.weight_bytes + 60e9) == 457_763
    with pytest.raises(ArgumentError, match="memory_bytes"):
        cost.memory_tokens(16e9)
    path = tmp_path / "cost.json"
    cost.save(path)
    assert CostModel.load(path) == cost
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    for source in (tmp_path, str(tmp_path / "config.json")):
        assert CostModel.from_config(source, "a100") == cost
    assert CostModel.from_config(LLAMA_3_8B, "h100").alpha == 0.3


def test_hardware(tmp_path):
    table = {**HARDWARE["a100"], "gemm_rate": [100e12, 200e12], "rate_tokens": [64, 512]}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({**table, "overhead": 1e-4}))
    cost = CostModel.from_config(LLAMA_3_8B, path)
    assert cost == CostModel.from_config(LLAMA_3_8B, {**table, "overhead": 1e-4})
    assert (cost.attention_flops_rate, cost.overhead) == (200e12, 1e-4)
    for hardware, error, words in (
        ("b100", ArgumentError, "neither one of a100, h100 nor a file"),
        (tmp_path / "none.json", RaddleIOError, "none.json"),
        ({**table, "speed": 1}, ArgumentError, "speed: unknown"),
        ({"gemm_rate": 1e12, "alpha": 0}, ArgumentError, "read_rate: is missing"),
        ({**table, "alpha": 2}, ArgumentError, "alpha"),
        ({**table, "alpha": "half"}, DTypeError, "alpha"),
        ({**table, "gemm_rate": [1e12] * 17}, ArgumentError, "gemm_rate"),
        ({**table, "gemm_rate": [], "rate_tokens": [], "attention_flops_rate": 1}, ArgumentError,
         "gemm_rate"),
        ({**table, "rate_tokens": [64]}, ArgumentError, "rate_tokens"),
        ({**table, "rate_tokens": [512, 64]}, ArgumentError, "rate_tokens"),
        ({**table, "gemm_rate": "fast"}, DTypeError, "gemm_rate"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            CostModel.from_config(LLAMA_3_8B, hardware)
    for text in ("{", "[]", '{"alpha": 1}'):
        path.write_text(text)
        with pytest.raises((RaddleIOError, ArgumentError), match="gpu.json"):
            CostModel.load(path)
    with pytest.raises(RaddleIOError):
        cost.save(tmp_path / "none" / "cost.json")
