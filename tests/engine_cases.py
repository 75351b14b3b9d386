"""What the engine's tests share: small models on disk, engines over them, prompts and answers."""

import numpy as np
import pytest
from raddle.engine import Engine, ModelConfig, SamplingParams
from raddle.engine.weights import open_weights

from tests.reference import llama

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (folder, config, weights)."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(kind):
        if kind not in made:
            config = llama.config_of(kind)
            weights = llama.write_model(root / kind, config, num_files=1 + (kind == "qwen2") * 3)
            made[kind] = root / kind, config, weights
        return made[kind]

    return get


def make_engine(folder, tokenizer=None, **options):
    pytest.importorskip("safetensors", reason="needs safetensors: not installed")
    options = {"dtype": "float32", "max_batch": 8, "kv_memory_bytes": 8 << 20} | options
    return Engine(ModelConfig.from_folder(folder), open_weights(folder), tokenizer, **options)


def text_engine(folder, **options):
    for module in ("safetensors", "tokenizers"):
        pytest.importorskip(module, reason=f"needs {module}: not installed")
    return Engine.from_folder(folder, **{"max_batch": 8, "kv_memory_bytes": 8 << 20} | options)


def prompts_of(lengths, seed=0, vocab=320):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).tolist() for n in lengths]


def token_ids(answers):
    return [[output.token_ids for output in group] for group in answers]


def run(engine):
    """All outputs until nothing is left, joined by (request, index): (text, ids, last Output)."""
    texts, ids, last = {}, {}, {}
    while engine.has_work:
        for output in engine.step():
            key = output.request_id, output.index
            texts[key] = texts.get(key, "") + output.text
            ids[key] = ids.get(key, []) + output.token_ids
            last[key] = output
    return texts, ids, last


def nothing_held(engine):
    """Every page and slot is free again."""
    pools = [group.pool for group in engine.cache.groups]
    return all(pool.num_used == 0 for pool in pools) and (
        engine.cache.num_free_slots == engine.max_batch
    )
