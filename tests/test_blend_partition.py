"""Requests for several replicas: each once, the work even, prefixes whole. Needs: numpy."""

import json

import numpy as np
import pytest
from raddle import __main__ as cli
from raddle.blend import CostModel, Requests, partition
from raddle.blend.cost import LLAMA_3_8B
from raddle.errors import RaddleError

BLOCK = 16


@pytest.fixture
def cost():
    return CostModel.from_config(LLAMA_3_8B, "a100")


def families(rng, count, fan):
    """Requests of 12 blocks of which `fan` share 10, shuffled; outputs of 1 to 300."""
    family = rng.permutation(np.arange(count) // fan)
    blocks = np.empty((count, 12), np.int64)
    blocks[:, :10] = 1000 * family[:, None] + np.arange(10)
    blocks[:, 10:] = 10**12 + 2 * np.arange(count)[:, None] + np.arange(2)
    return family, Requests(
        block_size=BLOCK,
        input_lengths=np.full(count, 12 * BLOCK + 3, np.int32),
        output_lengths=rng.integers(1, 300, count).astype(np.int32),
        hash_ids=blocks.ravel(),
        indptr=np.arange(count + 1) * 12,
    )


@pytest.mark.parametrize("replicas", [1, 2, 7])
def test_each_once_and_families_whole(cost, replicas):
    family, requests = families(np.random.default_rng(replicas), 6000, 20)
    dealt = partition(requests, cost, replicas)
    assert len(dealt.parts) == replicas and dealt.tail.size == 0
    assert sorted(np.concatenate(dealt.parts)) == list(range(6000))
    homes = [set(family[part]) for part in dealt.parts]
    assert sum(map(len, homes)) <= 1.02 * 300  # nearly all families have one home
    for part in dealt.parts:  # and lie together there
        assert np.count_nonzero(np.diff(family[part])) < 1.02 * len(set(family[part]))
    tokens = [requests.output_lengths[part].sum() for part in dealt.parts]
    assert max(tokens) < 1.1 * np.mean(tokens)
    assert 0.95 * replicas < dealt.speedup <= replicas * (1 + 1e-9)
    assert 0 <= dealt.duplicated < 0.02 and (replicas > 1 or dealt.duplicated == 0)


def test_a_tail_belongs_to_all(cost):
    _, requests = families(np.random.default_rng(0), 6000, 20)
    dealt = partition(requests, cost, 3, tail=0.15)
    assert sorted(np.concatenate([*dealt.parts, dealt.tail])) == list(range(6000))
    assert 0.05 < dealt.tail.size / 6000 < 0.3


def test_unknown_outputs_and_refusals(cost):
    requests = Requests(
        block_size=16, input_lengths=np.full(50, 40, np.int32), max_tokens=np.full(50, 9, np.int32)
    )
    assert sum(map(len, partition(requests, cost, 4).parts)) == 50
    for replicas, tail, message in ((0, 0, "replicas"), (2, 1.5, "tail"), (2, "x", "number")):
        with pytest.raises((RaddleError, TypeError), match=message):
            partition(requests, cost, replicas, tail=tail)
    with pytest.raises((RaddleError, TypeError), match="replicas"):
        partition(requests, cost, 2.5)


def test_command_line(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    line = {"input_length": 600, "output_length": 5, "hash_ids": [1]}
    trace.write_text("".join(json.dumps(line | {"output_length": i}) + "\n" for i in range(1, 40)))
    report = tmp_path / "report.json"
    assert cli.main(["schedule", str(trace), "--replicas", "3", "--json", str(report)]) == 0
    assert "3 replicas" in capsys.readouterr().out
    found = json.loads(report.read_text())["replicas"]
    assert found["count"] == 3 and sum(found["requests"]) == 39
    assert cli.main(["schedule", str(trace), "--replicas", "0"]) == 1
    assert "replicas" in capsys.readouterr().err
