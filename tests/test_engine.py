"""The engine answers: logits against a float64 model, schedules that must not change an answer.

Needs: numpy, safetensors (weights are made here); tokenizers for the tests with text.
"""

import dataclasses

import numpy as np
import pytest
from raddle.engine import Engine, SamplingParams
from raddle.engine.weights import DummyWeights, open_weights

from tests.engine_cases import (
    GREEDY,
    folders,
    make_engine,
    nothing_held,
    prompts_of,
    run,
    text_engine,
    token_ids,
)
from tests.reference import llama

__all__ = ["folders"]  # a fixture


# ---- the model


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", list(llama.KINDS))
def test_logits_equal_float64(folders, kind, page_size):
    folder, config, weights = folders(kind)
    ids = prompts_of([90])[0]
    engine = make_engine(folder, page_size=page_size)
    got, expected = engine.logits(ids), llama.logits(config, weights, ids)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()
    assert nothing_held(engine)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.006)])
def test_logits_in_16_bits(folders, dtype, tolerance):
    folder, config, weights = folders("llama")
    ids = prompts_of([60])[0]
    got = make_engine(folder, dtype=dtype).logits(ids)
    expected = llama.logits(config, weights, ids)
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 1e-5 < error < tolerance


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_weights_are_converted(tmp_path, stored):
    config = llama.config_of("qwen3")
    weights = llama.write_model(tmp_path, config, dtype=stored)
    ids = prompts_of([20])[0]
    got = make_engine(tmp_path).logits(ids)
    expected = llama.logits(config, weights, ids)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def greedy_reference(config, weights, prompt, count, tolerance=1e-4):
    """(tokens, positions where the best two logits lie within tolerance) by the float64 model."""
    ids, ties = list(prompt), []
    for i in range(count):
        row = llama.logits(config, weights, ids)[-1]
        second, best = np.sort(row)[-2:]
        if best - second <= tolerance * np.abs(row).max():
            ties.append(i)
        ids.append(int(row.argmax()))
    return ids[len(prompt) :], ties


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_equals_float64(folders, kind):
    folder, config, weights = folders(kind)
    prompts = prompts_of([1, 7, 40])
    answers = make_engine(folder, page_size=4).generate(prompts, GREEDY)
    for prompt, (answer,) in zip(prompts, answers):
        expected, ties = greedy_reference(config, weights, prompt, GREEDY.max_tokens)
        differ = [i for i, pair in enumerate(zip(expected, answer.token_ids)) if len(set(pair)) > 1]
        assert not differ or differ[0] in ties


# ---- schedules that must not change an answer


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    "options",
    [
        {"page_size": 1},
        {"page_size": 5, "max_tokens_per_step": 16},
        {"max_tokens_per_step": 8, "max_batch": 3},
        {"max_batch": 1},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_chunks_pages_and_batches_do_not_matter(folders, kind, options):
    folder, _, _ = folders(kind)
    prompts = prompts_of([1, 3, 16, 17, 33, 70, 100, 5, 64, 2])
    expected = token_ids(make_engine(folder).generate(prompts, GREEDY))
    engine = make_engine(folder, **options)
    assert token_ids(engine.generate(prompts, GREEDY)) == expected
    assert nothing_held(engine)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_preempted_sequences_give_the_same_answer(folders, kind):
    folder, _, _ = folders(kind)
    prompts = prompts_of([20, 30, 10, 25, 15, 40])
    params = dataclasses.replace(GREEDY, max_tokens=40)
    expected = token_ids(make_engine(folder).generate(prompts, params))
    engine = make_engine(folder, page_size=4, kv_memory_bytes=30 * 3 * 4 * 2 * 2 * 16 * 4)
    assert token_ids(engine.generate(prompts, params)) == expected
    assert engine.num_preemptions > 0
    assert nothing_held(engine)


def test_windowed_layers_hold_only_what_they_see(folders):
    folder, _, _ = folders("mistral")  # window 20
    engine = make_engine(folder, page_size=4, max_tokens_per_step=8)
    engine.generate(prompts_of([200]), dataclasses.replace(GREEDY, max_tokens=100))
    (group,) = engine.cache.groups
    assert group.pool.peak_used <= (20 + 8) // 4 + 2


def test_abort(folders):
    folder, _, _ = folders("llama")
    engine = make_engine(folder, max_batch=2)
    prompts = prompts_of([10, 20, 30])
    expected = token_ids(engine.generate(prompts[:1], GREEDY))[0][0]
    ids = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    engine.step()
    assert engine.abort(ids[1]) and engine.abort(ids[2])  # one runs, one waits
    assert not engine.abort(ids[1]) and not engine.abort("never heard of")
    _, got, _ = run(engine)
    assert set(got) == {(ids[0], 0)}
    assert engine.abort(ids[0]) is False
    assert nothing_held(engine) and len(got[ids[0], 0]) == len(expected) - 1


def test_requests_may_come_between_steps(folders):
    folder, _, _ = folders("llama")
    engine = make_engine(folder)
    prompts = prompts_of([12, 30, 7])
    expected = token_ids(engine.generate(prompts, GREEDY))
    ids, tokens = [], {}
    for prompt in [*prompts, None, None]:
        if prompt is not None:
            ids.append(engine.add_request(prompt, GREEDY))
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    for (request_id, _), more in run(engine)[1].items():
        tokens[request_id] += more
    assert [[tokens[i]] for i in ids] == expected


class Interrupting:
    """Raises KeyboardInterrupt at one call of a function, then calls it as it is."""

    def __init__(self, function, at):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("where", ["runner", "reply", "retire"])
def test_a_step_that_is_broken_off_loses_nothing(folders, monkeypatch, where):
    folder, _, _ = folders("llama")
    engine = make_engine(folder, page_size=4)
    prompts = prompts_of([9, 21, 30, 4])
    params = dataclasses.replace(GREEDY, n=2, temperature=0.8, seed=5, max_tokens=12)
    expected = token_ids(make_engine(folder, page_size=4).generate(prompts, params))
    if where == "runner":
        engine._runner.run = Interrupting(engine._runner.run, 6)
    elif where == "reply":
        from raddle.engine.reply import Reply

        monkeypatch.setattr(Reply, "advance", _method(Interrupting(Reply.advance, 30)))
    else:
        engine._retire = Interrupting(engine._retire, 3)
    ids, got, interrupts = [engine.add_request(prompt, params) for prompt in prompts], {}, 0
    while engine.has_work:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            interrupts += 1
            continue
        for output in outputs:
            got.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    assert interrupts == 1
    assert [[got[i, k] for k in range(2)] for i in ids] == expected
    assert nothing_held(engine)


def _method(call):
    return lambda self, *args: call(self, *args)


# ---- several answers, seeds, log-probabilities


def test_n_shares_the_prompts_pages(folders):
    folder, _, _ = folders("llama")
    engine = make_engine(folder, page_size=8)
    prompt = prompts_of([37])[0]  # 4 full pages and a partly filled one
    params = dataclasses.replace(GREEDY, n=6, temperature=1.0, seed=3, max_tokens=3)
    answers = engine.generate([prompt], params)[0]
    assert len({tuple(a.token_ids) for a in answers}) > 1
    assert engine.cache.groups[0].pool.peak_used == 4 + 6
    assert nothing_held(engine)


def test_n_greedy_answers_are_one_answer(folders):
    folder, _, _ = folders("qwen2")
    prompt = prompts_of([21])[0]
    single = token_ids(make_engine(folder).generate([prompt], GREEDY))[0]
    for options in ({}, {"page_size": 4, "max_tokens_per_step": 5, "max_batch": 5}):
        engine = make_engine(folder, **options)
        several = token_ids(engine.generate([prompt], dataclasses.replace(GREEDY, n=5)))[0]
        assert several == single * 5
        assert nothing_held(engine)


def test_seeds(folders):
    folder, _, _ = folders("llama")
    prompts = prompts_of([9, 9, 14])
    params = [
        dataclasses.replace(GREEDY, temperature=1.0, seed=seed, n=n)
        for seed, n in ((1, 1), (2, 3), (-7, 1))
    ]
    alone = [make_engine(folder).generate([p], q)[0] for p, q in zip(prompts, params)]
    together = make_engine(folder, max_tokens_per_step=8).generate(prompts, params)
    assert token_ids(alone) == token_ids(together)
    other = make_engine(folder).generate(prompts[:1], dataclasses.replace(params[0], seed=9))
    assert token_ids(other) != token_ids(alone[:1])
    first, second = (
        make_engine(folder, seed=s).generate(prompts, dataclasses.replace(params[0], seed=None))
        for s in (4, 4)
    )
    assert token_ids(first) == token_ids(second)


def test_logprobs(folders):
    folder, config, weights = folders("llama")
    prompts = prompts_of([9, 14])
    params = [dataclasses.replace(GREEDY, logprobs=k, max_tokens=5) for k in (3, None)]
    (with_logprobs,), (without,) = make_engine(folder).generate(prompts, params)
    assert without.logprobs == [] and len(with_logprobs.logprobs) == 5
    ids = list(prompts[0])
    for entry in with_logprobs.logprobs:
        row = llama.logits(config, weights, ids)[-1]
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        best = np.argsort(-expected)[:3]
        assert [i for i, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], expected[best], atol=1e-3)
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-3)
        ids.append(entry.token_id)


# ---- text


def test_streamed_text_is_the_text(folders):
    folder, _, _ = folders("llama")
    engine = text_engine(folder)
    rng = np.random.default_rng(1)
    for prompt in ("hello there", "h\u00e9llo \u20ac \U0001f600", "a"):
        params = SamplingParams(max_tokens=60, temperature=1.5, seed=int(rng.integers(99)))
        engine.add_request(prompt, params)
        (text,), (ids,), _ = (list(part.values()) for part in run(engine))
        whole = engine.generate([prompt], params)[0][0]
        assert text == whole.text == engine.tokenizer.decode(ids)
        assert ids == whole.token_ids


def test_stop_strings_across_tokens(folders):
    folder, _, _ = folders("llama")
    engine = text_engine(folder)
    free = SamplingParams(max_tokens=60, temperature=1.0, seed=11)
    whole = engine.generate(["the"], free)[0][0].text
    for begin in range(0, len(whole) - 4, 5):
        stop = whole[begin : begin + 4]
        at = whole.index(stop)
        params = dataclasses.replace(free, stop=["\x00never", stop])
        engine.add_request("the", params)
        (text,), (ids,), (last,) = (list(part.values()) for part in run(engine))
        assert text == whole[:at]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
        assert engine.generate(["the"], params)[0][0].text == text
        assert whole.startswith(engine.tokenizer.decode(ids)[: at + 1])
    assert nothing_held(engine)


def test_stop_tokens_and_max_tokens(folders):
    folder, _, _ = folders("llama")
    engine = make_engine(folder)
    prompt = prompts_of([15])[0]
    free = engine.generate([prompt], GREEDY)[0][0]
    assert (free.finish_reason, len(free.token_ids)) == ("length", GREEDY.max_tokens)
    stop = free.token_ids[5]
    at = free.token_ids.index(stop)
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop])
    stopped = engine.generate([prompt], params)[0][0]
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    for is_ignored in (True, False):  # the same token as the model's own end
        config = dataclasses.replace(engine.config, eos_token_ids=(stop,))
        other = Engine(config, open_weights(folder), dtype="float32", kv_memory_bytes=1 << 20)
        params = dataclasses.replace(GREEDY, ignore_eos=is_ignored)
        got = other.generate([prompt], params)[0][0]
        assert got.token_ids == free.token_ids[: None if is_ignored else at + 1]


def test_the_context_ends_an_answer(folders):
    folder, _, _ = folders("llama")
    engine = make_engine(folder, max_model_len=30)
    params = dataclasses.replace(GREEDY, max_tokens=None)
    (answer,) = engine.generate(prompts_of([20]), params)[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 10)
    (answer,) = engine.generate(prompts_of([29]), params)[0]
    assert len(answer.token_ids) == 1


def test_logits_that_are_no_numbers_end_one_answer(folders, tmp_path):
    folder, config, weights = folders("llama")
    weights = {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"].copy()}
    weights["model.embed_tokens.weight"][7] = np.nan
    llama.write_model(tmp_path, config, weights)
    good, bad = [10, 11, 12], [10, 7, 12]
    engine = make_engine(tmp_path)
    answers = engine.generate([good, bad, good], GREEDY)
    assert [group[0].finish_reason for group in answers] == ["length", "error", "length"]
    assert token_ids(answers)[::2] == token_ids(make_engine(folder).generate([good] * 2, GREEDY))


# ---- dummy weights


def test_dummy_weights_are_seeded():
    config = llama.config_of("qwen3", max_position_embeddings=64)
    ids = prompts_of([10])[0]
    first, again, other = (
        Engine.with_dummy_weights(config, weights_seed=s, kv_memory_bytes=1 << 20).logits(ids)
        for s in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.isfinite(first).all() and first.std() > 0


def test_dummy_weights_by_pieces():
    """Rows and columns of a tensor are those of the whole: ranks see one model."""
    source, shape = DummyWeights(3), (70, 5000)
    whole = np.zeros(shape, np.float32)
    source.read_into("some.weight", whole, "float32", shape)
    rows, cols = np.zeros((20, 5000), np.float32), np.zeros((70, 100), np.float32)
    source.read_into("some.weight", rows, "float32", shape, rows=(30, 50))
    source.read_into("some.weight", cols, "float32", shape, cols=(200, 300))
    assert np.array_equal(rows, whole[30:50]) and np.array_equal(cols, whole[:, 200:300])
    assert len(np.unique(whole[:13])) == 65000 or len(np.unique(whole[:13])) > 60000
