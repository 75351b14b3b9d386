"""What the engine hands to a GPU each step, on the stub driver: padded batches, plans, graphs.

Needs: gcc or clang for the stubs. No kernel runs, so tokens are chosen here.
"""

import pytest

from tests.stub_driver import build_stubs, check_script

SCRIPT = """
import numpy as np
from raddle import tensor
from raddle.engine import Engine, SamplingParams
from tests.reference import llama

kind, options = {kind!r}, {options!r}
config = llama.config_of(kind, torch_dtype="bfloat16")
engine = Engine.with_dummy_weights(config, device="cuda", kv_memory_bytes=1 << 20, **options)
assert engine.device == "cuda:0"
runner, cache, launches, captures, ahead = engine._runner, engine.cache, [], [], []

def sample(logits, settings, offsets, out):
    ids = np.full(len(offsets), 7, np.int32)
    return tensor(ids, device="cuda") if out is None else out.copy_(ids)

engine._sampling._sample = sample

def look(size):
    is_new = size not in runner._graphs
    decodes = engine._scheduler._get_decodes()[0]
    n, slots = len(decodes), engine._scheduler._get_decodes()[1]
    assert runner.num_tokens == runner.num_rows == size >= n
    ids = runner.ids.to("cpu").numpy()
    known = [len(s.tokens) > cache.lengths[s.slot] for s in decodes]
    assert all(known) or not any(known)
    ahead.append(not all(known))
    tokens = [s.tokens[-1] if is_known else 7 for s, is_known in zip(decodes, known)]
    assert ids.tolist() == tokens + [0] * (size - n)
    positions = runner.positions.to("cpu").numpy()
    assert positions.tolist() == cache.lengths[slots].tolist() + [0] * (size - n)
    for plans in runner.plans:
        group, requests = plans.group, plans.decode.schedule().requests
        dropped = group.dropped[slots] * group.page_size
        kv_lens = (cache.lengths[slots] + 1 - dropped).tolist() + [0] * (size - n)
        assert requests["kv_len"].tolist() == kv_lens
        rows = plans.rows.to("cpu").numpy()
        assert rows.tolist() == group.rows(slots, positions[:n]).tolist() + [-1] * (size - n)
        assert len(set(rows[:n].tolist())) == n
    logits = run_graph(size)
    assert logits.shape == (size, 320)
    (captures if is_new else launches).append(size)
    assert runner._graphs[size].state == "ready"
    return logits

run_graph, runner._run_graph = runner._run_graph, look
rng = np.random.default_rng(0)
prompts = [rng.integers(3, 320, n).tolist() for n in (1, 3, 16, 17, 33, 70, 100, 5, 64, 2, 40)]
params = [SamplingParams(max_tokens=6 + 3 * i, ignore_eos=True) for i in range(len(prompts))]
params[3] = SamplingParams(max_tokens=9, n=min(2, engine.max_batch), ignore_eos=True)
answers = engine.generate(prompts, params)
for group, one in zip(answers, params):
    assert [a.token_ids for a in group] == [[7] * one.max_tokens] * one.n
assert len(captures) == len(set(captures)) and set(launches) <= set(captures), captures
assert set(captures) == {sizes!r}, captures
assert sum(launches) > 3 * sum(captures)
assert sum(ahead) > len(ahead) / 2
assert all(group.pool.num_used == 0 for group in cache.groups)
engine.logits(prompts[5])
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("stubs"), blas=True)


@pytest.mark.parametrize(
    ("kind", "options", "sizes"),
    [
        ("llama", {"max_batch": 12}, {1, 2, 4, 8, 16}),
        ("qwen2", {"max_batch": 3, "max_tokens_per_step": 8, "page_size": 4}, {1, 2, 4}),
        ("mistral", {"max_batch": 1, "max_tokens_per_step": 5}, {1}),
    ],
)
def test_decode_steps_are_padded_graphs(stubs, tmp_path, kind, options, sizes):
    # Loaded first, a library is taken before those of wheels.
    loaded = f"import ctypes; ctypes.CDLL({str(stubs / 'libcublasLt.so.13')!r})\n"
    script = loaded + SCRIPT.format(kind=kind, options=options, sizes=sizes)
    check_script(script, stubs, RADDLE_CACHE_DIR=str(tmp_path))
