"""What the engine refuses: bad requests, options, model files; a right call works afterwards.

Needs: numpy, safetensors; tokenizers for the tests that open a whole folder.
"""

import json
import sys
import warnings

import numpy as np
import pytest
from raddle.engine import Engine, ModelConfig, SamplingParams
from raddle.engine.weights import open_weights
from raddle.errors import (
    ArgumentError,
    CapacityError,
    RaddleIOError,
    ShapeError,
    UnsupportedError,
)

from tests.engine_cases import GREEDY, folders, make_engine, nothing_held, run
from tests.reference import llama

__all__ = ["folders"]  # a fixture

# ---- bad requests, and a good one afterwards

BAD_REQUESTS = {
    "empty": ([], {}, ArgumentError, "prompt: is empty"),
    "no prompt": (None, {}, ArgumentError, "prompt: expected"),
    "float ids": ([1.5], {}, ArgumentError, "1.5 at position 0"),
    "bool ids": ([True], {}, ArgumentError, "True at position 0"),
    "id too large": ([5, 320], {}, ArgumentError, "320 at position 1 .* 319"),
    "id below 0": ([-1], {}, ArgumentError, "-1 at position 0"),
    "too long": ([5] * 512, {}, CapacityError, "512 tokens .* 512"),
    "n over max_batch": ([5], {"n": 9}, CapacityError, "n: 9 .* 8"),
    "text": ("text", {}, UnsupportedError, "without tokenizer"),
    "chat": ([{"role": "user", "content": "x"}], {}, UnsupportedError, "without tokenizer"),
    "stop text": ([5], {"stop": "x"}, UnsupportedError, "stop: .* without tokenizer"),
    "max_tokens": ([5], {"max_tokens": 0}, ArgumentError, "max_tokens: .* got 0"),
    "temperature": ([5], {"temperature": float("nan")}, ArgumentError, "temperature: .* nan"),
    "temperature type": ([5], {"temperature": "1"}, ArgumentError, "temperature: .* '1'"),
    "top_p": ([5], {"top_p": 1.5}, ArgumentError, "top_p: .* 1.5"),
    "top_k": ([5], {"top_k": -2}, ArgumentError, "top_k: .* -2"),
    "min_p": ([5], {"min_p": -0.1}, ArgumentError, "min_p: .* -0.1"),
    "seed": ([5], {"seed": 1 << 63}, ArgumentError, "seed: "),
    "n": ([5], {"n": 0}, ArgumentError, "n: .* got 0"),
    "logprobs": ([5], {"logprobs": 21}, ArgumentError, "logprobs: .* 21"),
    "stop empty": ([5], {"stop": [""]}, ArgumentError, "stop: "),
    "stop ids": ([5], {"stop_token_ids": ["5"]}, ArgumentError, "stop_token_ids: "),
    "ignore_eos": ([5], {"ignore_eos": 1}, ArgumentError, "ignore_eos: "),
}


@pytest.mark.parametrize("name", list(BAD_REQUESTS))
def test_bad_requests(folders, name):
    prompt, settings, error, message = BAD_REQUESTS[name]
    engine = make_engine(folders("llama")[0])
    with pytest.raises(error, match=message):
        engine.add_request(prompt, SamplingParams(**settings))
    assert not engine.has_work and nothing_held(engine)
    assert len(engine.generate([[5, 6]], GREEDY)[0][0].token_ids) == GREEDY.max_tokens


BAD_OPTIONS = {
    "dtype": ({"dtype": "int8"}, ArgumentError, "dtype: .* 'int8'"),
    "max_batch": ({"max_batch": 0}, ArgumentError, "max_batch: .* 0"),
    "page_size": ({"page_size": 0}, ArgumentError, "page_size: .* 0"),
    "steps": ({"max_tokens_per_step": -1}, ArgumentError, "max_tokens_per_step: .* -1"),
    "context": ({"max_model_len": 513}, CapacityError, "max_model_len: 513 .* 512"),
    "memory": ({"kv_memory_bytes": 1000}, CapacityError, "kv_memory_bytes: 1000 .* 2"),
    "memory type": ({"kv_memory_bytes": 1.5}, ArgumentError, "kv_memory_bytes: .* 1.5"),
}


@pytest.mark.parametrize("name", list(BAD_OPTIONS))
def test_bad_options(folders, name):
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        make_engine(folders("llama")[0], **options)


def test_a_request_id_twice(folders):
    engine = make_engine(folders("llama")[0])
    engine.add_request([5], GREEDY, request_id="a")
    with pytest.raises(ArgumentError, match="request_id: 'a'"):
        engine.add_request([6], GREEDY, request_id="a")
    run(engine)
    engine.add_request([5], GREEDY, request_id="a")


# ---- config.json

BAD_CONFIGS = {
    "kind": ({"architectures": ["BertModel"]}, UnsupportedError, "BertModel"),
    "no kind": ({"architectures": None, "model_type": "gpt2"}, UnsupportedError, "'gpt2'"),
    "missing": ({"hidden_size": None}, ArgumentError, "hidden_size is missing"),
    "type": ({"hidden_size": "64"}, ArgumentError, "hidden_size is '64'"),
    "zero": ({"num_hidden_layers": 0}, ArgumentError, "num_hidden_layers is 0"),
    "groups": ({"num_key_value_heads": 3}, ArgumentError, "4 is not a multiple .* 3"),
    "heads": ({"num_attention_heads": 6, "head_dim": None}, ArgumentError, "64 .* 6"),
    "activation": ({"hidden_act": "relu"}, UnsupportedError, "hidden_act 'relu'"),
    "rope": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, UnsupportedError, "'dynamic'"),
    "rope type": ({"rope_scaling": "linear"}, ArgumentError, "rope_scaling is 'linear'"),
    "theta": ({"rope_theta": -1}, ArgumentError, "rope_theta is -1"),
    "partial": ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "awq"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, UnsupportedError, "float8_e4m3fn"),
    "eps": ({"rms_norm_eps": 0}, ArgumentError, "rms_norm_eps is 0"),
    "flag": ({"tie_word_embeddings": 1}, ArgumentError, "tie_word_embeddings is 1"),
    "end": ({"eos_token_id": [1, "x"]}, ArgumentError, "eos_token_id is"),
}


@pytest.mark.parametrize("name", list(BAD_CONFIGS))
def test_bad_configs(name):
    changes, error, message = BAD_CONFIGS[name]
    config = llama.config_of("llama")
    ModelConfig.from_dict(config)
    with pytest.raises(error, match=message):
        ModelConfig.from_dict({**config, **changes})


def test_sliding_layers_are_read():
    config = llama.config_of("qwen2", num_hidden_layers=4)
    assert ModelConfig.from_dict(config).windows == (-1, 23, 23, 23)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert ModelConfig.from_dict(config | {"layer_types": kinds}).windows == (23, -1, 23, -1)
    off = config | {"use_sliding_window": False}
    assert ModelConfig.from_dict(off).windows == (-1,) * 4
    none = llama.config_of("mistral", sliding_window=None)
    assert set(ModelConfig.from_dict(none).windows) == {-1}
    with pytest.raises(ArgumentError, match="3 entries for 4"):
        ModelConfig.from_dict(config | {"layer_types": kinds[:3]})
    with pytest.raises(UnsupportedError, match="linear_attention"):
        ModelConfig.from_dict(config | {"layer_types": ["linear_attention"] * 4})


def test_both_generations_of_rope_are_read():
    scaling = {"factor": 4.0, "type": "linear"}
    old = llama.config_of("llama", rope_theta=500.0, rope_scaling=scaling)
    new = llama.config_of("llama", rope_theta=None)
    new["rope_parameters"] = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    for config in (old, new):
        read = ModelConfig.from_dict(config)
        assert read.rope_theta == 500.0
        assert read.rope_scaling == {"rope_type": "linear", "factor": 4.0}


# ---- weight files


def damage(path, name, edit):
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


NORM = "model.norm.weight"


def _overwrite(data):
    return lambda path: path.write_bytes(data)


def _rename(path):
    damage(path, NORM, lambda header: header.update({"other": header.pop(NORM)}))


def _shape(path):
    damage(path, NORM, lambda header: header[NORM].update(shape=[32, 2]))


def _dtype(path, dtype):
    damage(path, NORM, lambda header: header[NORM].update(dtype=dtype))


def _offsets(path):
    damage(path, NORM, lambda header: header[NORM].update(data_offsets=[0, 1 << 40]))


def _negative(path):
    damage(path, NORM, lambda header: header[NORM].update(data_offsets=[-4, 252]))


def _no_shape(path):
    damage(path, NORM, lambda header: header[NORM].pop("shape"))


def _overlap(path):
    """Two tensors in one place, and a gap where one was."""
    damage(path, NORM, lambda header: header.update({NORM: {**header[NORM], **_first(header)}}))


def _first(header):
    end = min(entry["data_offsets"][1] for entry in header.values() if "shape" in entry)
    return {"data_offsets": [end - 256, end]}


def _folder(path):
    path.unlink()
    path.mkdir()


# What the library finds; its words differ from version to version, ours follow.
FOUND = r"model.safetensors: .+ .the file has \d+ bytes.: it is truncated, .* copy it again"

BAD_FILES = {
    "truncated": (lambda path: cut(path, 100), RaddleIOError, FOUND),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), RaddleIOError, FOUND),
    "empty": (_overwrite(b""), RaddleIOError, FOUND.replace(r"\d+", "0")),
    "short": (_overwrite(b"abc"), RaddleIOError, FOUND.replace(r"\d+", "3")),
    "huge header": (_overwrite(b"\xff" * 64), RaddleIOError, FOUND.replace(r"\d+", "64")),
    "no JSON": (_overwrite((8).to_bytes(8, "little") + b"notjson!"), RaddleIOError, FOUND),
    "a list": (_overwrite((2).to_bytes(8, "little") + b"[]"), RaddleIOError, FOUND),
    "missing tensor": (_rename, RaddleIOError, f"{NORM} is missing, expected .64"),
    "shape": (_shape, ShapeError, rf"{NORM}: expected shape .64. .* got .32, 2"),
    "dtype": (lambda path: _dtype(path, "I32"), UnsupportedError, f"{NORM}: dtype I32; this"),
    "dtype of another size": (lambda path: _dtype(path, "F8_E4M3"), RaddleIOError, FOUND),
    "no dtype": (lambda path: _dtype(path, "Q4_K"), RaddleIOError, FOUND),
    "offsets": (_offsets, RaddleIOError, FOUND),
    "negative": (_negative, RaddleIOError, FOUND),
    "overlap": (_overlap, RaddleIOError, FOUND),
    "no shape": (_no_shape, RaddleIOError, FOUND),
    "a folder": (_folder, RaddleIOError, FOUND),
    "removed": (lambda path: path.unlink(), RaddleIOError, "model.safetensors: no such file"),
}


@pytest.mark.parametrize("name", list(BAD_FILES))
def test_bad_weight_files(tmp_path, name):
    edit, error, message = BAD_FILES[name]
    path = tmp_path / "model.safetensors"
    llama.write_model(tmp_path, llama.config_of("llama"))
    whole = path.read_bytes()
    edit(path)
    with pytest.raises(error, match=message):
        make_engine(tmp_path)
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    assert len(make_engine(tmp_path).generate([[5, 6]], GREEDY)[0][0].token_ids) == 24


def test_a_name_given_twice_is_one_tensor(tmp_path):
    """The library and json keep the same one of the two: nothing is read that was not checked."""
    pytest.importorskip("safetensors", reason="needs safetensors: not installed")
    path, numbers = tmp_path / "model.safetensors", np.arange(8, dtype=np.float32)
    true = b'"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}'
    for lie in (b"[0, 4]", b"[1, 33]"):
        false = true.replace(b"[0, 32]", lie)
        for first, second in ((false, true), (true, false)):
            head = b"{" + first + b", " + second + b"}"
            path.write_bytes(len(head).to_bytes(8, "little") + head + numbers.tobytes())
            out = np.zeros(8, np.float32)
            if second is true:
                open_weights(tmp_path).read_into("a", out, "float32", (8,))
                np.testing.assert_array_equal(out, numbers)
            else:
                with pytest.raises(RaddleIOError, match=FOUND):
                    open_weights(tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    llama.write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(4, np.float32)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UnsupportedError, match="safetensors is not .* 'raddle.engine.'"):
        open_weights(tmp_path)


def test_shards(tmp_path):
    llama.write_model(tmp_path, llama.config_of("qwen2"), num_files=3)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = tmp_path / content["weight_map"][NORM]
    make_engine(tmp_path)
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(RaddleIOError, match=shard.name):
        make_engine(tmp_path)
    shard.write_bytes(whole)
    damage(shard, NORM, lambda header: header.update({"other": header.pop(NORM)}))
    with pytest.raises(RaddleIOError, match=f"{shard.name}: tensor {NORM} is missing"):
        make_engine(tmp_path)
    content["weight_map"][NORM] = "../" + shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(RaddleIOError, match="not a file name of this folder"):
        make_engine(tmp_path)
    index.write_text("{}")
    with pytest.raises(RaddleIOError, match="weight_map"):
        make_engine(tmp_path)


def test_tensors_without_a_use_are_refused(tmp_path):
    config = llama.config_of("llama")
    weights = llama.weights_of(config)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    llama.write_model(tmp_path, config, weights)
    make_engine(tmp_path)
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    llama.write_model(tmp_path, config, weights)
    with pytest.raises(UnsupportedError, match="layers.0.self_attn.q_norm.weight"):
        make_engine(tmp_path)


def test_bad_folders(tmp_path):
    for module in ("safetensors", "tokenizers"):
        pytest.importorskip(module, reason=f"needs {module}: not installed")
    with pytest.raises(RaddleIOError, match="config.json"):
        Engine.from_folder(tmp_path)
    config = llama.config_of("llama")
    llama.write_model(tmp_path, config)
    small = {"max_batch": 2, "kv_memory_bytes": 1 << 20}
    Engine.from_folder(tmp_path, **small)
    for name, text, message in (
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", "[]", "config.json: expected a JSON object"),
        ("tokenizer.json", "{}", "tokenizer.json: no tokenizer"),
        ("tokenizer_config.json", "x", "tokenizer_config.json: not JSON"),
        ("generation_config.json", "x", "generation_config.json: not JSON"),
    ):
        path = tmp_path / name
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        with pytest.raises(RaddleIOError, match=message):
            Engine.from_folder(tmp_path, **small)
        path.unlink()
        if name == "tokenizer.json":
            with pytest.raises(RaddleIOError, match="tokenizer.json: no such file"):
                Engine.from_folder(tmp_path, **small)
        if before is not None:
            path.write_text(before)
    llama.write_tokenizer(tmp_path, 340)
    with pytest.raises(ArgumentError, match="token ids up to 339, .* vocab_size of 320"):
        Engine.from_folder(tmp_path, **small)
    llama.write_tokenizer(tmp_path, 300)  # fewer than the model has is common
    Engine.from_folder(tmp_path, **small)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(RaddleIOError, match="pytorch_model.bin"):
        open_weights(tmp_path)


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.1}, {"no_repeat_ngram_size": 3}])
def test_recommended_settings_that_are_not_applied_are_said(setting):
    shape = llama.config_of("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ModelConfig.from_dict(shape, dict.fromkeys(setting, None))
        ModelConfig.from_dict(shape, {"repetition_penalty": 1.0})  # neutral: no word of it
    with pytest.warns(RuntimeWarning, match=f"{next(iter(setting))}.*is not applied"):
        assert ModelConfig.from_dict(shape, setting) == config
