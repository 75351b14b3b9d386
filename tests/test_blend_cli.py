"""Files of requests, and `python -m raddle schedule`.

Needs: numpy; tokenizers and jinja2 for OpenAI files, matplotlib for the plot.
"""

import json
import sys
from pathlib import Path

import pytest
from raddle.__main__ import main
from raddle.blend import CostModel, Requests, policy_names
from raddle.blend.cost import LLAMA_3_8B
from raddle.errors import ArgumentError, RaddleIOError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = EXAMPLES / "tiny-llama"


def need(name):
    try:
        return __import__(name)
    except ImportError:
        pytest.skip(f"needs {name}: it is not installed")


# -- files --------------------------------------------------------------------------------------

TRACE = [
    {"input_length": 1100, "output_length": 30, "hash_ids": [7, 8, 9], "source": "a", "time": 5},
    {"input_length": 1024, "output_length": 3, "hash_ids": [7, 8]},
    {"input_length": 600, "output_length": 500, "hash_ids": [7], "source": "b"},
    {"input_length": 100, "output_length": 1, "source": "a"},
]  # fmt: skip


def write_lines(path, rows):
    path.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def test_trace(tmp_path):
    requests = Requests.from_trace(write_lines(tmp_path / "trace", TRACE))
    assert (requests.num_requests, requests.prompt_tokens) == (4, 2824)
    assert (requests.num_blocks, requests.distinct_blocks) == (5, 2)  # 9 is of a partial block
    assert requests.output_lengths.tolist() == [30, 3, 500, 1]
    assert requests.source_names == ["a", None, "b"] and requests.num_sources == 3
    unknown = [{**TRACE[0], "output_length": None}, {"input_length": 9, "output_length": -1}]
    requests = Requests.from_trace(write_lines(tmp_path / "trace", unknown))
    assert requests.output_lengths.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('"\\ud800', "not JSON"),
        ({"output_length": 3}, "input_length: .*got None"),
        ({"input_length": 0, "output_length": 3}, "input_length: .*got 0"),
        ({"input_length": 1.5, "output_length": 3}, "input_length"),
        ({"input_length": True, "output_length": 3}, "input_length"),
        ({"input_length": 2**31, "output_length": 3}, "input_length"),
        ({"input_length": 5, "output_length": 0}, "output_length"),
        ({"input_length": 5, "output_length": 2**31 - 5}, "output_length"),
        ({"input_length": 513, "output_length": 5, "hash_ids": [1, 2, 3]}, "hash_ids.*at most 2"),
        ({"input_length": 512, "output_length": 5, "hash_ids": [-1]}, "hash_ids"),
        ({"input_length": 512, "output_length": 5, "hash_ids": ["a"]}, "hash_ids"),
        ({"input_length": 512, "output_length": 5, "hash_ids": [2**64]}, "hash_ids"),
        ({"input_length": 512, "output_length": 5, "hash_ids": 5}, "hash_ids"),
        ({"input_length": 512, "output_length": 5, "source": [1]}, "source"),
    ],
)
def test_malformed_traces(tmp_path, line, words):
    path = write_lines(tmp_path / "trace.jsonl", [TRACE[0], line])
    with pytest.raises(ArgumentError, match=f"trace.jsonl:3: {words}"):
        Requests.from_trace(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(RaddleIOError, match="no-file"):
        Requests.from_trace(tmp_path / "no-file")
    with pytest.raises(ArgumentError, match="block_size"):
        Requests.from_trace(write_lines(tmp_path / "trace", TRACE), 0)


def line(custom_id="a", **body):
    body = {"model": "m", "prompt": "def main(", "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def test_openai(tmp_path):
    need("tokenizers")
    need("jinja2")
    chat = {"model": "n", "messages": [{"role": "user", "content": "hello"}]}
    rows = [
        line("a", n=2),
        line("b", prompt=[[5, 6, 7], [5, 6, 8]], max_tokens=9),
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat},
    ]
    path = write_lines(tmp_path / "batch", rows)
    requests = Requests.from_openai(path, TINY, block_size=2, context=100)
    assert requests.custom_ids == ["a", "a", "b", "b", "c"]
    lengths = requests.output_lengths.tolist()
    assert lengths[:4] == [5, 5, 9, 9] and 0 < lengths[4] < 100
    assert requests.shared_tokens >= 2 + 2  # the prompt that is asked twice, and 5, 6
    with pytest.raises(ArgumentError, match="batch:5: max_tokens"):
        Requests.from_openai(path, TINY)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (line("first"), "custom_id: 'first' is also that of line 1"),
        (line(""), "custom_id"),
        ({**line(), "url": "/v1/embeddings"}, "url"),
        ({**line(), "body": 5}, "body"),
        (line(prompt=[]), "prompt: expected"),
        (line(prompt=[-1]), "prompt: expected token ids"),
        (line(prompt=[5] * 100), "prompt: 100 tokens leave no room"),
        (line(max_tokens=0), "max_tokens"),
        (line(model=None), "model"),
        (line(tools=[{}]), "tools"),
    ],
)
def test_malformed_openai_lines(tmp_path, row, words):
    need("tokenizers")
    path = write_lines(tmp_path / "batch.jsonl", [line("first"), row])
    with pytest.raises(ArgumentError, match=f"batch.jsonl:3: {words}"):
        Requests.from_openai(path, TINY, context=100)


# -- the command --------------------------------------------------------------------------------


def test_table_json_and_order(tmp_path, capsys):
    trace = write_lines(tmp_path / "trace.jsonl", TRACE * 5)
    report, order = tmp_path / "report.json", tmp_path / "order"
    assert main(["schedule", trace, "--json", str(report), "--order", str(order)]) == 0
    printed = capsys.readouterr().out
    for name in policy_names():
        assert any(text.startswith(f"{name} ") for text in printed.splitlines()), printed
    found = json.loads(report.read_text())
    assert found["requests"] == 20 and found["pool_tokens"] == 457_763
    assert CostModel(**found["cost_model"]) == CostModel.from_config(LLAMA_3_8B, "a100")
    assert [p["policy"] for p in found["policies"]] == list(policy_names())
    dfs = next(p for p in found["policies"] if p["policy"] == "dfs")
    for row in found["policies"]:
        assert row.keys() == {
            "policy", "seconds", "tokens_per_s", "ratio_to_dfs", "hit_ratio", "share_of_bound",
            "peak_kv_tokens", "preemptions", "planning_s",
        }  # fmt: skip
        assert 0 < found["bound_s"] <= row["seconds"] * (1 + 1e-9)
        assert row["ratio_to_dfs"] == pytest.approx(dfs["seconds"] / row["seconds"])
        assert row["share_of_bound"] == pytest.approx(found["bound_s"] / row["seconds"])
        assert row["tokens_per_s"] == pytest.approx((5 * 2824 + 5 * 534) / row["seconds"])
    assert sorted(map(int, order.read_text().split())) == list(range(20))


def test_dfs_is_what_others_are_compared_with(tmp_path, capsys):
    trace = write_lines(tmp_path / "trace.jsonl", TRACE)
    report = tmp_path / "report.json"
    words = ["--policies", "random,fcfs,random", "--lengths", "sample", "--sample-rate", "0.5"]
    more = ["--seed", "3", "--step-tokens", "256", "--memory-bytes", "1e9", "--hardware", "h100"]
    assert main(["schedule", trace, *words, *more, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert [p["policy"] for p in found["policies"]] == ["random", "fcfs"]
    assert all(p["ratio_to_dfs"] > 0 for p in found["policies"])
    assert (found["lengths"], found["sample_rate"], found["seed"]) == ("sample", 0.5, 3)
    assert (found["step_tokens"], found["pool_tokens"]) == (256, 7629)
    assert "dfs" not in [text.split()[0] for text in capsys.readouterr().out.splitlines()]


def test_openai_file(tmp_path, capsys):
    need("tokenizers")
    need("jinja2")
    path, order = EXAMPLES / "requests.jsonl", tmp_path / "order"
    words = ["--model", str(TINY), "--config", str(TINY / "config.json"), "--order", str(order)]
    assert main(["schedule", str(path), *words]) == 0
    assert "max_tokens, taken as output lengths" in capsys.readouterr().out
    ids = [json.loads(text)["custom_id"] for text in path.read_text().splitlines()]
    assert sorted(order.read_text().splitlines()) == sorted(ids)


def test_names_that_are_no_lines(tmp_path):
    """They stand in the file of the order as JSON: a line each, and none is taken for another."""
    need("tokenizers")
    ids = ["a\nb", "a", "\ud800", '"a"', "\u2028", "\x00", "é", " "]
    path, order = write_lines(tmp_path / "batch", [line(i) for i in ids]), tmp_path / "order"
    words = ["--model", str(TINY), "--policies", "fcfs", "--order", str(order)]
    assert main(["schedule", path, *words]) == 0
    rows = order.read_bytes().decode().removesuffix("\n").split("\n")
    assert [json.loads(row) if row[0] == '"' else row for row in rows] == ids


def test_plot(tmp_path):
    need("matplotlib")
    trace, path = write_lines(tmp_path / "trace.jsonl", TRACE * 20), tmp_path / "runs.png"
    assert main(["schedule", trace, "--plot", str(path)]) == 0
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    assert main(["schedule", trace, "--plot", str(tmp_path / "none" / "runs.png")]) == 1


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    trace, report = write_lines(tmp_path / "trace.jsonl", TRACE), tmp_path / "report.json"
    words = ["--plot", str(tmp_path / "runs.png"), "--json", str(report)]
    assert main(["schedule", trace, *words]) == 1
    assert "pip install 'raddle[bench]'" in capsys.readouterr().err
    assert not report.exists()  # said before any work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "dfs,best"], "--policies: 'best'"),
        (["--policies", ""], "--policies"),
        (["--sample-rate", "0.1"], "--sample-rate: needs --lengths sample"),
        (["--model", "somewhere"], "--model: a trace has no text"),
        (["--memory-bytes", "0"], "--memory-bytes"),
        (["--memory-bytes", "nan"], "--memory-bytes"),
        (["--memory-bytes", "1e8"], "memory: request"),
        (["--hardware", "b100"], "b100"),
        (["--config", "no-config.json"], "no-config.json"),
        (["--block-size", "0"], "block_size"),
        (["--step-tokens", "0"], "step_tokens"),
        (["--seed", "-1"], "seed"),
        (["--json", "no-folder/file"], "no-folder/file"),
        (["--order", "no-folder/file"], "no-folder/file"),
    ],
)
def test_what_cannot_be_done(tmp_path, capsys, words, message):
    trace = write_lines(tmp_path / "trace.jsonl", TRACE)
    assert main(["schedule", trace, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("raddle schedule: ") and message in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no request"),
        (["no"], "file:1: not JSON"),
        ([{"prompt": "x"}], "file:1: neither a trace"),
        ([{"input_length": 5}], "output_length: a simulation needs all of them"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, capsys, rows, message):
    assert main(["schedule", write_lines(tmp_path / "file", rows)]) == 1
    assert message in capsys.readouterr().err
