"""Steps that are launched before the tokens of the step ahead of them are known: the same answers.

On a GPU the engine does so by itself; here it is made to on the CPU, where it is of no use.
Needs: numpy, safetensors.
"""

import numpy as np
import pytest
from raddle import _core
from raddle.engine import Engine, SamplingParams
from raddle.errors import ArgumentError, CapacityError, DTypeError, ShapeError, StateError

from tests.engine_cases import folders, make_engine, nothing_held, prompts_of, run
from tests.reference import llama

__all__ = ["folders"]  # a fixture


def ahead_engine(folder, **options):
    """(engine, list of the steps that it launched ahead)."""
    engine, launched = make_engine(folder, **options), []
    engine._runner.runs_ahead = True
    follow = engine._scheduler.follow

    def note(step):
        following = follow(step)
        launched.append(following)
        return following

    engine._scheduler.follow = note
    return engine, launched


def mixed_params(count, **options):
    """Answers of 1 to 40 tokens, greedy and drawn ones."""
    return [
        SamplingParams(max_tokens=1 + 7 * i % 40, temperature=i % 2, seed=i, **options)
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", list(llama.KINDS))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 3},
        {"page_size": 1, "max_batch": 4},
        {"max_batch": 8, "kv_memory_bytes": 300_000},
    ],
)
def test_same_answers(folders, kind, options):
    folder = folders(kind)[0]
    prompts = prompts_of([1, 3, 16, 17, 33, 70, 5, 64, 2, 40])
    params = mixed_params(len(prompts), ignore_eos=True)
    expected = make_engine(folder, **options).generate(prompts, params)
    engine, launched = ahead_engine(folder, **options)
    got = engine.generate(prompts, params)
    assert [[a.token_ids for a in group] for group in got] == [
        [a.token_ids for a in group] for group in expected
    ]
    assert [a[0].finish_reason for a in got] == [a[0].finish_reason for a in expected]
    assert sum(step is not None for step in launched) > 10
    assert nothing_held(engine) and not engine.has_work


def test_who_ends_by_a_token_is_in_the_next_step_for_nothing(folders):
    folder = folders("llama")[0]
    prompts = prompts_of([5, 9, 30, 12])
    free = make_engine(folder).generate(prompts, SamplingParams(max_tokens=30, temperature=0))
    stops = [answer[0].token_ids[4 + 3 * i] for i, answer in enumerate(free)]
    params = [
        SamplingParams(max_tokens=30, temperature=0, stop_token_ids=(stop,), n=1 + i % 2)
        for i, stop in enumerate(stops)
    ]
    expected = make_engine(folder).generate(prompts, params)
    engine, launched = ahead_engine(folder)
    got = engine.generate(prompts, params)
    assert [[a.token_ids for a in g] for g in got] == [[a.token_ids for a in g] for g in expected]
    assert all(a[0].finish_reason == "stop" for a in got)
    assert any(step is not None for step in launched) and nothing_held(engine)


def test_output_tokens_are_counted_once(folders):
    folder = folders("llama")[0]
    prompts = prompts_of([5, 9])
    counts = []
    for make in (make_engine, lambda folder: ahead_engine(folder)[0]):
        engine = make(folder)
        first = engine.generate(prompts, SamplingParams(max_tokens=30, temperature=0))
        stop = first[0][0].token_ids[6]
        engine.generate(prompts, SamplingParams(temperature=0, stop_token_ids=(stop,)))
        counts.append(engine.num_output_tokens)
    assert counts[0] == counts[1]


def test_abort_and_arrival_while_a_step_is_under_way(folders):
    folder = folders("llama")[0]
    first, second, third = prompts_of([20, 30, 25])
    params = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True)
    alone = [make_engine(folder).generate([p], params)[0][0].token_ids for p in (second, third)]
    engine, _ = ahead_engine(folder)
    engine.add_request(first, params, request_id="first")
    engine.add_request(second, params, request_id="second")
    for _ in range(5):
        engine.step()
    assert engine._ahead is not None
    engine.abort("first")
    engine.add_request(third, params, request_id="third")
    ids = run(engine)[1]
    assert ids["third", 0] == alone[1] and ids["second", 0] == alone[0][-len(ids["second", 0]) :]
    assert nothing_held(engine)


def test_all_aborted_while_a_step_is_under_way(folders):
    folder = folders("llama")[0]
    params = SamplingParams(max_tokens=25, temperature=0, ignore_eos=True)
    prompt, other = prompts_of([20, 31])
    alone = make_engine(folder).generate([other], params)[0][0].token_ids
    engine, _ = ahead_engine(folder)
    engine.add_request(prompt, params, request_id=0)
    for _ in range(4):
        engine.step()
    assert engine._ahead is not None and engine.abort(0) and not engine.has_work
    assert np.isfinite(engine.logits(prompt)).all()
    assert engine.generate([other], params)[0][0].token_ids == alone
    assert nothing_held(engine)


@pytest.mark.parametrize("where", ["run", "wait"])
def test_a_broken_step_loses_nothing(folders, where):
    folder = folders("llama")[0]
    prompts = prompts_of([20, 7, 33])
    params = mixed_params(3, ignore_eos=True, stream=False)
    expected = make_engine(folder).generate(prompts, params)
    engine, _ = ahead_engine(folder)
    for i, (prompt, one) in enumerate(zip(prompts, params)):
        engine.add_request(prompt, one, request_id=i)
    calls, run_step, finish = [0], engine._runner.run, engine._finish_step

    def broken(function):
        def call(*args, **options):
            calls[0] += 1
            if calls[0] % 5 == 0:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    if where == "run":
        engine._runner.run = broken(run_step)
    else:
        engine._finish_step = broken(finish)
    got = {}
    while engine.has_work:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            continue
        for output in outputs:
            got[output.request_id] = output
    assert [got[i].token_ids for i in range(3)] == [a[0].token_ids for a in expected]
    assert nothing_held(engine)


def test_logprobs_wait_for_their_logits(folders):
    engine, launched = ahead_engine(folders("llama")[0])
    engine.generate(prompts_of([5]), SamplingParams(max_tokens=8, logprobs=2, ignore_eos=True))
    assert launched == []


# ---- the copies


def test_upload_and_readback(device):
    upload, readback = _core.Upload(8, device), _core.Readback(8, device)
    where = upload.tensor
    for round in range(10):
        upload.slot().numpy()[:] = np.arange(8) + 10 * round
        upload.send(0, 8)
        readback.start(where)
        upload.slot().numpy()[:] = -1
        upload.send(2, 4)
        readback.start(where[1:5])
        assert readback.wait().numpy().tolist() == (np.arange(8) + 10 * round).tolist()
        assert readback.wait().numpy().tolist() == [10 * round + 1, -1, -1, 10 * round + 4]


def test_upload_and_readback_refuse():
    upload, readback = _core.Upload(8, "cpu"), _core.Readback(4, "cpu")
    for begin, end in [(-1, 3), (3, 2), (0, 9)]:
        with pytest.raises(ArgumentError, match=r"begin, end: expected 0 <= begin <= end <= 8"):
            upload.send(begin, end)
    for count in (0, -1, 1 << 31):
        with pytest.raises(ArgumentError, match="count: expected 1 to"):
            _core.Upload(count, "cpu")
        with pytest.raises(ArgumentError, match="count: expected 1 to"):
            _core.Readback(count, "cpu")
    with pytest.raises(StateError, match="no copy was started"):
        readback.wait()
    with pytest.raises(CapacityError, match="32 bytes do not fit its 16"):
        readback.start(upload.tensor)
    with pytest.raises(DTypeError):
        readback.start(np.zeros(4, np.int64))
    with pytest.raises(ShapeError, match="contiguous"):
        readback.start(np.zeros(8, np.int32)[::2])
    readback.start(np.arange(4, dtype=np.int32))
    readback.start(np.arange(3, dtype=np.int32))
    with pytest.raises(StateError, match="2 copies were started"):
        readback.start(np.arange(2, dtype=np.int32))
    kept = readback.wait()
    del readback
    assert kept.numpy().tolist() == [0, 1, 2, 3]


def test_engines_on_the_cpu_do_not_run_ahead():
    engine = Engine.with_dummy_weights(llama.config_of("llama"), kv_memory_bytes=1 << 20)
    engine.add_request([5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    assert engine._ahead is None


def test_a_prefix_cache_is_emptied_between_requests(folders):
    engine = make_engine(folders("llama")[0], page_size=4)
    (prompt,) = prompts_of([30])
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    first = engine.generate([prompt], params)[0][0].token_ids
    engine.add_request(prompt, params)
    with pytest.raises(StateError, match="reset_prefix_cache: requests are unfinished"):
        engine.reset_prefix_cache()
    run(engine)
    assert engine.num_hit_tokens == 28
    engine.reset_prefix_cache()
    pool = engine.cache.groups[0].pool
    assert pool.num_free == pool.num_pages
    assert engine.generate([prompt], params)[0][0].token_ids == first
    assert engine.num_hit_tokens == 28
