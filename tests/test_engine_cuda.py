"""The engine on a GPU: the same answers, decode under CUDA graphs.

Needs: gpu, NVRTC, safetensors; tokenizers and jinja2 for the batch job.
"""

import dataclasses
import json

import numpy as np
import pytest

from tests.engine_cases import GREEDY, folders, make_engine, nothing_held, prompts_of, token_ids
from tests.reference import llama

__all__ = ["folders"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.keeps_blocks]
CUDA = {"device": "cuda", "dtype": "bfloat16"}


def run_without_graphs(engine):
    engine._runner._run_graph = lambda size: engine._model.forward(engine._runner)
    return engine


@pytest.mark.parametrize("kind", list(llama.KINDS))
def test_logits_equal_float64(folders, kind):
    folder, config, weights = folders(kind)
    ids = prompts_of([90])[0]
    expected = llama.logits(config, weights, ids)
    for dtype, tolerance in (("bfloat16", 0.05), ("float16", 0.006)):
        engine = make_engine(folder, device="cuda", dtype=dtype)
        got = engine.logits(ids)
        assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < tolerance
        assert nothing_held(engine)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_graphs_change_nothing(folders, kind):
    """Batches that shrink from 11 to 1, padded to 16, 8, 4, 2 and 1 rows."""
    folder, _, _ = folders(kind)
    prompts = prompts_of([1, 3, 16, 17, 33, 70, 100, 5, 64, 2, 40])
    params = [
        dataclasses.replace(GREEDY, max_tokens=6 + 3 * i, logprobs=2) for i in range(len(prompts))
    ]
    options = {**CUDA, "max_batch": 11}
    engine = make_engine(folder, **options)
    got = engine.generate(prompts, params)
    assert set(engine._runner._graphs) == {16, 8, 4, 2, 1}
    expected = run_without_graphs(make_engine(folder, **options)).generate(prompts, params)
    for (a,), (b,) in zip(got, expected):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    again = engine.generate(prompts, params)  # every graph replayed from its beginning
    assert token_ids(again) == token_ids(got)
    assert nothing_held(engine)


def test_float16_answers_are_those_of_the_cpu(folders):
    """Where the best two logits are not close."""
    folder, config, weights = folders("llama")
    prompts = prompts_of([5, 20, 33])
    gpu = make_engine(folder, device="cuda", dtype="float16").generate(prompts, GREEDY)
    cpu = make_engine(folder, dtype="float16").generate(prompts, GREEDY)
    for prompt, (a,), (b,) in zip(prompts, gpu, cpu):
        pairs = enumerate(zip(a.token_ids, b.token_ids))
        at = next((i for i, (x, y) in pairs if x != y), None)
        if at is not None:
            row = llama.logits(config, weights, prompt + a.token_ids[:at])[-1]
            second, best = np.sort(row)[-2:]
            assert best - second < 0.02 * np.abs(row).max()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_n_preemption_and_chunks(folders, kind):
    folder, _, _ = folders(kind)
    prompts = prompts_of([20, 30, 10, 25, 15, 40])
    params = dataclasses.replace(GREEDY, n=3, seed=1, temperature=0.7)
    small = 40 * 3 * 4 * 2 * 2 * 16 * 2  # 40 pages of 4 tokens
    engine = make_engine(folder, page_size=4, kv_memory_bytes=small, max_batch=6, **CUDA)
    answers = engine.generate(prompts, params)
    assert engine.num_preemptions > 0 and nothing_held(engine)
    assert all(len(a.token_ids) == GREEDY.max_tokens for group in answers for a in group)
    chunked = make_engine(folder, page_size=4, max_tokens_per_step=7, **CUDA)
    whole = make_engine(folder, page_size=4, **CUDA)
    logits = [engine.generate(prompts[:1], GREEDY)[0][0].token_ids for engine in (chunked, whole)]
    assert len(logits[0]) == len(logits[1])


def test_a_batch_job(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
    from raddle.engine import Engine

    from tests.batch_cases import CHAT, answer, line

    folder = tmp_path / "small"
    llama.write_model(folder, llama.config_of("llama", max_position_embeddings=256))
    engine = Engine.from_folder(folder, max_batch=8, kv_memory_bytes=4 << 20, **CUDA)
    lines = [line(f"r{i}", max_tokens=5 + i) for i in range(20)] + [line("c", CHAT), "bad"]
    rows = answer(folder, tmp_path, lines, engine)
    assert [row["response"]["status_code"] for row in rows] == [200] * 21 + [400]
    assert json.loads(json.dumps(rows)) == rows
