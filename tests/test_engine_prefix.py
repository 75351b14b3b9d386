"""The prefix cache: the pool against what slots and cache hold, cached K and V against a forward
pass from the tokens, answers that must be the same with and without, and what is computed once.

Needs: numpy, safetensors; tokenizers for tiny-llama.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from raddle.engine import Engine, SamplingParams
from raddle.engine.pages import PagePool
from raddle.engine.scheduler import Sequence
from raddle.errors import ArgumentError

from tests.engine_cases import GREEDY, folders, make_engine, nothing_held, prompts_of, token_ids
from tests.prefix_cases import Truth, Watch, break_off, rows_of, shared_prompts, windows_first

__all__ = ["folders"]  # a fixture
KINDS = ["llama", "qwen2", "mistral"]  # no window; a window of 24 on two of three layers; 20 on all
TOKEN_BYTES = 3 * 2 * 2 * 16 * 4  # K and V of one token in all layers
TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"


# ---- at random


@pytest.mark.parametrize("page_size", [2, 5])
@pytest.mark.parametrize("kind", [*KINDS, "windows first"])
def test_pool_and_content_at_random(folders, tmp_path, kind, page_size):
    folder = windows_first(tmp_path) if kind == "windows first" else folders(kind)[0]
    truth, num_preemptions = Truth(folder, page_size), 0
    for seed in range(6):
        rng = np.random.default_rng([seed, page_size])
        num_preemptions += at_random(rng, folder, page_size, truth)
    assert num_preemptions > 0 or kind == "mistral"  # whose layers hold a window each, no more


def at_random(rng, folder, page_size, truth):
    engine = make_engine(
        folder,
        page_size=page_size,
        max_batch=5,
        max_model_len=16 * page_size,
        max_tokens_per_step=int(rng.integers(6, 60)),
        kv_memory_bytes=int(rng.integers(17, 40)) * page_size * TOKEN_BYTES,
    )
    engine._runner.runs_ahead = bool(rng.integers(0, 2))  # as it does on a GPU
    watch, prompts, added = Watch(engine, truth), shared_prompts(rng, 24, page_size), 0
    while added < len(prompts) or engine.has_work:
        action = rng.random()
        if added < len(prompts) and action < 0.4:
            params = SamplingParams(
                max_tokens=int(rng.integers(1, 30)),
                n=int(rng.integers(1, 3)),
                temperature=float(rng.choice([0.0, 1.0])),
                ignore_eos=True,
            )
            prompt = prompts[added][: engine.max_model_len - 1]
            engine.add_request(prompt, params, request_id=added)
            added += 1
        elif action < 0.47 and added:
            engine.abort(int(rng.integers(0, added)))
        elif action < 0.5 and engine._requests:
            break_off(engine, runs=bool(rng.integers(0, 2)))
        else:
            engine.step()
        if not engine._is_interrupted:
            watch.check()
    assert nothing_held(engine) and engine.num_hit_tokens > 0
    return engine.num_preemptions


# ---- answers with and without


OPTIONS = {
    "default": {},
    "page_size=1": {"page_size": 1},
    "page_size=4, short steps": {"page_size": 4, "max_tokens_per_step": 9},
    "page_size=5, few slots": {"page_size": 5, "max_batch": 3},
    "tiny pool": {"page_size": 4, "kv_memory_bytes": 24 * 4 * TOKEN_BYTES, "max_model_len": 80},
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same(folders, kind, options):
    folder, _, _ = folders(kind)
    rng = np.random.default_rng(3)
    prompts = [prompt[:60] for prompt in shared_prompts(rng, 14, 5, vocab=300)]
    prompts += prompts[:4]
    params = []
    for i, _ in enumerate(prompts):
        one = dataclasses.replace(GREEDY, max_tokens=int(rng.integers(1, 18)))
        if i % 3 == 1:
            one = dataclasses.replace(one, n=3, temperature=0.9, seed=i)
        if i % 4 == 2:
            one = dataclasses.replace(one, stop_token_ids=list(range(100, 140)))
        params.append(one)
    expected = token_ids(make_engine(folder, prefix_cache=False).generate(prompts, params))
    engine = make_engine(folder, **OPTIONS[options])
    watch = Watch(engine)
    answers = engine.generate(prompts, params, progress=lambda done: watch.check())
    assert token_ids(answers) == expected
    assert engine.num_hit_tokens > 0 and nothing_held(engine)
    cached = [group[0].num_cached_tokens for group in answers]
    assert sum(cached) == engine.num_hit_tokens < engine.num_prompt_tokens
    assert all(one.num_cached_tokens == c for c, g in zip(cached, answers) for one in g)
    again = engine.generate(prompts, params)  # from a warm cache
    assert token_ids(again) == expected


@pytest.mark.parametrize("page_size", [4, 16])
def test_tiny_llama_writes_the_same_text(page_size):
    pytest.importorskip("safetensors", reason="needs safetensors: not installed")
    pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
    options = {"dtype": "float32", "kv_memory_bytes": 32 << 20, "page_size": page_size}
    head = "import os\nimport sys\n\n\ndef main(path):\n    with open(path) as file:\n        "
    tails = [
        "",
        "for line in file:",
        "data = file.read()",
        "return",
        "text = ",
        "for line in file:",
    ]
    params = SamplingParams(max_tokens=48, temperature=0)
    texts = []
    for prefix_cache in (False, True):
        engine = Engine.from_folder(TINY_LLAMA, prefix_cache=prefix_cache, **options)
        answers = [engine.generate([head + tail for tail in tails], params) for _ in range(2)]
        texts.append([group[0].text for part in answers for group in part])
        assert (engine.num_hit_tokens > 0) == prefix_cache
    assert texts[0] == texts[1] and texts[1][:6] == texts[1][6:]


# ---- what is computed


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prefix_is_computed_once_within_a_step(folders, kind):
    engine = make_engine(folders(kind)[0], page_size=4)
    rows = rows_of(engine)
    (head,), tails = prompts_of([43]), prompts_of([7] * 5, seed=1)
    params = dataclasses.replace(GREEDY, max_tokens=1)
    answers = engine.generate([head + tail for tail in tails], params)
    assert rows == [43 + 7 + 4 * (3 + 7)]  # 40 of 43 are whole pages
    assert [group[0].num_cached_tokens for group in answers] == [0] + [40] * 4
    assert engine.num_hit_tokens == 160


def test_a_long_prefix_is_read_in_chunks_by_one(folders):
    engine = make_engine(folders("llama")[0], page_size=4, max_tokens_per_step=16)
    rows = rows_of(engine)
    (head,) = prompts_of([60])
    engine.generate([[*head, i] for i in range(3, 9)], dataclasses.replace(GREEDY, max_tokens=1))
    assert sum(rows) == 61 + 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_finds_the_answer(folders, kind):
    engine = make_engine(folders(kind)[0], page_size=4)
    rows = rows_of(engine)
    (prompt,) = prompts_of([30])
    (answer,) = engine.generate([prompt], GREEDY)[0]
    del rows[:]
    (second,) = engine.generate([[*prompt, *answer.token_ids, 9]], GREEDY)[0]
    assert second.num_cached_tokens == (30 + 24 - 1) // 4 * 4  # K and V of the last are not there
    assert rows[0] == 55 - second.num_cached_tokens


def test_one_token_is_always_computed(folders):
    engine = make_engine(folders("llama")[0], page_size=4)
    (prompt,) = prompts_of([16])
    expected = engine.generate([prompt], GREEDY)
    (again,) = engine.generate([prompt], GREEDY)
    assert again[0].num_cached_tokens == 12
    assert token_ids([again]) == token_ids(expected)
    assert len(engine.cache.groups[0].pool._published) == (16 + 23) // 4  # the double is merged


def test_a_hit_of_a_window_needs_the_window_only(folders):
    """Window 20, pages of 4: 52 tokens are read on with the pages of tokens 32..51."""
    engine = make_engine(folders("mistral")[0], page_size=4, max_tokens_per_step=8)
    (group,), (prompt,) = engine.cache.groups, prompts_of([53])
    scheduler, params = engine._scheduler, dataclasses.replace(GREEDY, max_tokens=1)
    expected = token_ids(engine.generate([prompt], params))

    def cached(length):
        sequence = Sequence(None, 0, None, prompt[:length], 0, 99)
        return 4 * len(scheduler.prefix.match(sequence))

    assert [cached(n) for n in (53, 52, 30, 5)] == [52, 48, 28, 4]
    digests = scheduler.prefix._digests(Sequence(None, 0, None, prompt, 0, 99), 53)
    lost = group.pool.find(digests[9])  # tokens 36..39
    group.pool._unread.move_to_end(lost, last=False)
    group.pool._evict()
    # 36 tokens need 16..35; from 60 on the page is out of the window again.
    assert [cached(n) for n in (53, 49, 40, 37)] == [36, 36, 36, 36]
    group.pool.clear()
    assert cached(53) == 0
    assert token_ids(engine.generate([prompt], params)) == expected


def test_a_hit_is_one_that_every_group_can_supply(tmp_path):
    engine = make_engine(windows_first(tmp_path), page_size=4, max_tokens_per_step=8)
    windowed, full = (group.pool for group in engine.cache.groups)
    (prompt,) = prompts_of([61])
    engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=1))
    for pool, count in ((windowed, 9), (full, 3)):  # blocks 0..8 there, the last 3 here
        for _ in range(count):
            pool._evict()
    # The window of 60 tokens, 37.., is there, but not that of the 48 which are left, 25..
    assert engine._scheduler.prefix.match(Sequence(None, 0, None, prompt, 0, 99)) == []


def test_a_preempted_sequence_finds_its_pages(folders):
    prompts = prompts_of([20, 30, 10, 25, 15, 40])
    params = dataclasses.replace(GREEDY, max_tokens=40)
    memory = 30 * 4 * TOKEN_BYTES
    counts = {}
    for prefix_cache in (False, True):
        engine = make_engine(
            folders("llama")[0], page_size=4, kv_memory_bytes=memory, prefix_cache=prefix_cache
        )
        rows = rows_of(engine)
        engine.generate(prompts, params)
        assert engine.num_preemptions > 0 and engine.num_hit_tokens == 0
        counts[prefix_cache] = sum(rows)
    assert counts[True] < counts[False]


def test_pages_that_a_waiting_request_reads_are_evicted_last(folders):
    engine = make_engine(folders("llama")[0], page_size=4, max_batch=1, max_model_len=64,
                         kv_memory_bytes=16 * 4 * TOKEN_BYTES)  # fmt: skip
    watch = Watch(engine)
    old, young = prompts_of([25, 25])
    params = dataclasses.replace(GREEDY, max_tokens=1)
    engine.generate([old, young], params)  # 6 blocks each stay, 4 pages are free
    engine.add_request(prompts_of([33], seed=5)[0], params, request_id="other")
    engine.add_request(old, params, request_id="old")
    cached = {}
    while engine.has_work:
        for output in engine.step():
            cached[output.request_id] = output.num_cached_tokens
        watch.check()
    assert cached == {"other": 0, "old": 24}
    (answer,) = engine.generate([young], params)[0]
    assert answer.num_cached_tokens == 4  # its last blocks went first


def test_shared_pages_take_no_room(folders):
    """Two of 48 tokens and more do not fit 17 pages of 4, unless they share 40."""
    for prefix_cache, num_waiting in ((True, 0), (False, 1)):
        options = {"page_size": 4, "max_model_len": 64, "prefix_cache": prefix_cache}
        engine = make_engine(folders("llama")[0], kv_memory_bytes=17 * 4 * TOKEN_BYTES, **options)
        (head,) = prompts_of([40])
        for tail in (5, 6):
            engine.add_request([*head, *[tail] * 7], dataclasses.replace(GREEDY, max_tokens=3))
        engine.step()
        assert engine.num_waiting == num_waiting


def test_logits_beside_a_cache(folders):
    engine = make_engine(folders("llama")[0], page_size=4, max_model_len=64,
                         kv_memory_bytes=16 * 4 * TOKEN_BYTES)  # fmt: skip
    (prompt,) = prompts_of([41])
    expected = engine.logits(prompt)
    watch = Watch(engine)
    engine.generate([prompt], GREEDY)
    assert engine.cache.groups[0].pool.num_free < 11
    assert np.array_equal(engine.logits(prompt), expected)
    watch.check()


# ---- steps that are broken off


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("then", ["step", "abort", "logits"])
def test_a_step_that_is_broken_off_leaves_no_page(folders, runs, then):
    """What it promised to write may not be there: the same prompt computes all of it."""
    engine = make_engine(folders("llama")[0], page_size=4)
    (prompt,) = prompts_of([41])
    expected = token_ids(make_engine(folders("llama")[0]).generate([prompt], GREEDY))
    watch = Watch(engine)
    request_id = engine.add_request(prompt, GREEDY)
    break_off(engine, runs)
    if then == "abort":
        assert engine.abort(request_id)
        watch.check()
    if then == "logits":
        engine.logits(prompt)
        assert not engine._is_interrupted
    rows = rows_of(engine)
    (again,) = engine.generate([prompt], GREEDY)
    assert token_ids([again]) == expected
    assert rows[0] >= 41 and nothing_held(engine)


@pytest.mark.parametrize("then", ["step", "abort"])
@pytest.mark.parametrize("name", ["allocate", "release", "share", "publish", "remove_reader"])
def test_scheduling_that_is_broken_off_loses_nothing(folders, monkeypatch, name, then):
    """Ctrl-C between two changes of the pool, inside a step, wherever that is."""
    prompts = [[*prompt, 7] for prompt in shared_prompts(np.random.default_rng(0), 6, 4)]
    params = dataclasses.replace(GREEDY, max_tokens=12)
    options = {"page_size": 4, "kv_memory_bytes": 20 * 4 * TOKEN_BYTES, "max_model_len": 72}
    expected = token_ids(make_engine(folders("llama")[0], **options).generate(prompts, params))
    method, left = getattr(PagePool, name), [0]

    def interrupted(pool, *args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return method(pool, *args)

    monkeypatch.setattr(PagePool, name, interrupted)
    for left[0] in (1, 3, 6):
        engine, answers = make_engine(folders("llama")[0], **options), {}
        watch = Watch(engine)
        for i, prompt in enumerate(prompts):
            engine.add_request(prompt, params, request_id=i)
        while engine.has_work:
            try:
                for output in engine.step():
                    answers.setdefault(output.request_id, []).extend(output.token_ids)
                watch.check()
            except KeyboardInterrupt:
                if then == "abort":
                    assert engine.abort(5)
                    watch.check()
        assert left[0] < 0
        count = 5 if then == "abort" else 6
        assert [[answers[i]] for i in range(count)] == expected[:count]
        assert nothing_held(engine)


# ---- decisions of ranks, the pool by itself, options


def test_digests_do_not_depend_on_the_process():
    """Ranks hash alike, whatever PYTHONHASHSEED is."""
    script = (
        "from raddle.engine.pages import KVCache\n"
        "from raddle.engine.prefix import PrefixCache\n"
        "from raddle.engine.scheduler import Sequence\n"
        "sequence = Sequence(('a', 1), 0, None, list(range(40)), 0, 99)\n"
        "prefix = PrefixCache(KVCache([], 16, 1))\n"
        "print([digest.hex() for digest in prefix._digests(sequence, 40)])"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1 and len(json.loads(results.pop().replace("'", '"'))) == 2


def test_pool_evicts_by_age_and_readers():
    pool = PagePool(4)
    pages = pool.allocate(4)
    for page, digest in zip(pages, "abcd"):
        pool.publish(page, digest)
    pool.add_reader("a")
    pool.release(pages)
    assert (pool.num_free, pool.num_evictable, pool.num_available, pool.num_used) == (0, 4, 4, 0)
    assert pool.allocate(1) == [pages[1]] and pool.find("b") is None
    pool.share([pages[2]])
    assert pool.is_held("c") and not pool.is_held("a") and not pool.is_held("b")
    assert pool.allocate(1) == [pages[3]]
    assert pool.allocate(1) == [pages[0]]  # nothing else is left
    pool.remove_reader("a")
    assert pool.num_available == 0 and pool.peak_used == 4


def test_prefix_cache_is_an_option(folders):
    with pytest.raises(ArgumentError, match="prefix_cache: expected True or False, got 1"):
        make_engine(folders("llama")[0], prefix_cache=1)
    engine = make_engine(folders("llama")[0], prefix_cache=False, page_size=4)
    for _ in range(2):
        engine.generate(prompts_of([30]), GREEDY)
    pool = engine.cache.groups[0].pool
    assert engine.num_hit_tokens == 0 and pool.num_free == pool.num_pages
