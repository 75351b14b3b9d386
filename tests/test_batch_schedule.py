"""Batch jobs by plan: order of lines, ETA, deadlines, lines named before anything runs, memory.

Needs: safetensors, tokenizers, jinja2; a checkout, for examples/tiny-llama. No time is measured:
the clocks are ours.
"""

import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from raddle.blend import Requests, policy_names
from raddle.engine import Engine
from raddle.engine.lines import Lines
from raddle.errors import ArgumentError, RaddleIOError

from tests.batch_cases import (
    CHAT,
    COST,
    answer,
    line,
    make_engine,
    make_job,
    model,
    read,
    run,
    texts,
    without_times,
    write,
)
from tests.reference import llama

pytest.importorskip("safetensors", reason="needs safetensors: not installed")
pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
pytest.importorskip("jinja2", reason="needs jinja2: not installed")

__all__ = ["model"]  # a fixture
TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"


def submitted(model, tmp_path, lines, **options):
    """Lines, from 0, in the order in which an engine got them."""
    engine, seen = make_engine(model), []
    add = engine.add_request

    def note(prompt, params, *, request_id):
        seen.append(request_id[0])
        return add(prompt, params, request_id=request_id)

    engine.add_request = note
    run(make_job(model, tmp_path, lines, engine, **options))
    return list(dict.fromkeys(seen))


# ---- orders


def families(count):
    """Prompts of two long beginnings in turn; lengths differ."""
    beginnings = (
        "once upon a time there was a king " * 2,
        "the weather of today will be fine " * 2,
    )
    return [
        line(f"r{i}", prompt=beginnings[i % 2] + f"{i}", max_tokens=2 + 3 * (i % 7), temperature=0)
        for i in range(count)
    ]


def test_orders(model, tmp_path):
    lines = families(40)
    found = {}
    for name in ("fcfs", "dfs", "random"):
        (tmp_path / name).mkdir()
        found[name] = submitted(model, tmp_path / name, lines, schedule=name)
        assert sorted(found[name]) == list(range(40))
    assert found["fcfs"] == list(range(40)) != found["random"]
    kinds = [i % 2 for i in found["dfs"]]
    assert sum(a != b for a, b in zip(kinds, kinds[1:])) == 1


def test_the_plan_is_that_of_blend(model, tmp_path):
    """What a pass notes of lines is what raddle.blend reads from the file; the sample leads, in the
    order of a policy that knows no more than max_tokens."""
    lines = [*families(100), line("two", prompt=["once", "upon a time"], n=2)]
    engine = make_engine(model)
    job = make_job(model, tmp_path, lines, engine, sample_rate=0.01)
    path = tmp_path / "in.jsonl"
    whole = Requests.from_openai(path, engine.tokenizer, context=engine.max_model_len)
    arrays = job._lines.requests()
    ours = Requests(**arrays, output_lengths=arrays["max_tokens"])
    assert (ours.num_requests, ours.num_blocks) == (104, whole.num_blocks)
    assert ours.distinct_blocks == whole.distinct_blocks < whole.num_blocks
    assert ours.output_lengths.tolist() == whole.output_lengths.tolist()
    assert job._plan.hit_ratio == whole.shared_tokens / whole.prompt_tokens
    sample = {min(i, 100) for i in whole.sample(0.01).tolist()}
    given = [job._plan.next() for _ in range(101)]
    assert set(given[: len(sample)]) == sample and 60 < len(sample) <= 64
    assert sorted(given) == list(range(101)) and job._plan.next() is None
    job.close()


def test_every_schedule_gives_the_same_text(tmp_path):
    if not (TINY / "model.safetensors").exists():
        pytest.skip("needs a checkout: examples/tiny-llama is not here")
    words = ["def main(", "import os\n", "class Node", "return x + ", "for i in range("]
    lines = [
        line(f"r{i}", prompt=words[i % 5] * (1 + i % 3), max_tokens=3 + 5 * (i % 4), temperature=0,
             n=1 + (i % 6 == 0))
        for i in range(30)
    ]  # fmt: skip
    lines.append(line("several", prompt=words, max_tokens=4, temperature=0, n=2))
    found = {}
    for name in policy_names():
        folder = tmp_path / name
        folder.mkdir()
        engine = Engine.from_folder(TINY, dtype="float32", max_batch=4, kv_memory_bytes=8 << 20)
        found[name] = answer(TINY, folder, lines, engine, schedule=name)
    assert len(texts(found["fcfs"])[-1]) == 10
    for name, rows in found.items():
        assert texts(rows) == texts(found["fcfs"]), name


def test_several_prompts_and_answers_are_those_of_lines_of_their_own(model, tmp_path):
    prompts = ["the cat", "a dog sleeps", "once"]
    greedy = {"temperature": 0, "max_tokens": 9}
    lines = [line("all", prompt=prompts, n=2, **greedy)]
    lines += [line(text, prompt=text, **greedy) for text in prompts]
    all_of_them, *each = texts(answer(model, tmp_path, lines))
    assert all_of_them == [text for (text,) in each for _ in range(2)]


# ---- the clock


class Clock:
    """Stands in for the module time; steps take `factor` times what is predicted."""

    def __init__(self, engine, cost, factor):
        self.now, self.time = 0.0, time.time
        self.num_steps, step = 0, engine.step

        def timed():
            outputs = step()
            self.now += factor * cost.step_seconds(*engine.last_work)
            self.num_steps += 1
            return outputs

        engine.step = timed

    def monotonic(self):
        return self.now


def with_clock(monkeypatch, model, factor):
    engine = make_engine(model)
    clock = Clock(engine, COST, factor)
    monkeypatch.setattr("raddle.engine.batch.time", clock)
    return engine, clock


def test_eta_follows_the_pace_of_steps(model, tmp_path, monkeypatch):
    engine, clock = with_clock(monkeypatch, model, 3.0)
    lines = [line(f"r{i}", max_tokens=1 + 4 * (i % 20), ignore_eos=True) for i in range(300)]
    told = []

    def note(summary):
        told.append((clock.now, summary.seconds_left, summary.num_done))

    summary = run(make_job(model, tmp_path, lines, engine, cost=COST, progress=note))
    assert summary.pace == pytest.approx(3.0)
    assert summary.step_seconds == pytest.approx(3 * summary.predicted_seconds)
    assert summary.seconds == pytest.approx(summary.step_seconds)
    assert summary.num_plans >= 3
    assert told[-1][1] == 0 and told[-1][2] == 300
    now, left, _ = next(entry for entry in told if entry[2] >= 150)
    assert now + left == pytest.approx(clock.now, rel=0.1)  # half way, to a tenth
    assert 0.3 < summary.share_of_bound <= 1


def test_a_job_of_bad_lines_has_no_pace(model, tmp_path):
    told = []
    summary = run(make_job(model, tmp_path, ["bad"] * 3, progress=lambda s: told.append(s.pace)))
    assert (summary.num_errors, summary.num_plans, summary.seconds_left) == (3, 1, None)
    assert told == [None] and summary.share_of_bound is None


# ---- deadlines


def test_a_deadline_leaves_the_rest_to_the_next_job(model, tmp_path, monkeypatch):
    lines = [line(f"r{i}", max_tokens=2 + i % 20) for i in range(60)]
    (tmp_path / "whole").mkdir()
    expected = without_times(answer(model, tmp_path / "whole", lines))
    lines_left = 60
    for deadline in (0.0, 0.05, 0.1):
        engine, clock = with_clock(monkeypatch, model, 10.0)
        summary = run(make_job(model, tmp_path, lines, engine, cost=COST, deadline=deadline))
        assert summary.is_late and len(read(tmp_path / "out.jsonl")) == summary.num_done
        assert not engine.has_work
        if deadline == 0:
            assert summary.num_done == engine.num_steps == 0
        else:
            assert 0 < 60 - summary.num_done < lines_left
            assert deadline <= summary.seconds < deadline + 0.01
        lines_left = 60 - summary.num_done
    summary = run(make_job(model, tmp_path, lines, deadline=1e9))
    assert not summary.is_late and summary.num_resumed == 60 - lines_left
    rows = read(tmp_path / "out.jsonl")
    rows.sort(key=lambda row: int(row["id"].rsplit("_", 1)[1]))
    assert without_times(rows) == expected


def command(model, *args):
    args = [sys.executable, "-m", "raddle", "batch", "--model", str(model), "--device", "cpu",
            "--max-batch", "8", "--kv-memory", "4M", *map(str, args)]  # fmt: skip
    return subprocess.run(args, text=True, capture_output=True)


def test_the_command_with_a_deadline(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    done = command(model, source, "-o", out, "--deadline", 0)
    assert done.returncode == 3, done.stderr
    assert done.stderr == "deadline: 2 of 2 lines are left; run the same command to go on\n"
    done = command(model, source, "-o", out, "--schedule", "dfs", "--hardware", "h100")
    assert done.returncode == 0, done.stderr
    for text in (
        "could be found, of all",
        "predicted; 1 plans",
        "of the bound that no order beats",
    ):
        assert text in done.stdout


# ---- lines that are wrong


def test_errors_stop_names_all_lines_and_runs_nothing(model, tmp_path):
    lines = [
        line("a"),
        "not JSON",
        line("a"),
        "",
        line("b", prompt="x" * 300),
        line("c", n=9),
        line("d"),
        line("e", model="other"),
        line("a"),
    ]
    engine = make_engine(model)
    with pytest.raises(ArgumentError) as caught:
        make_job(model, tmp_path, lines, engine, errors="stop")
    first, *rest = str(caught.value).splitlines()
    assert first == "6 lines are wrong:"
    path = tmp_path / "in.jsonl"
    expected = [
        "2: line: not JSON",
        "3: custom_id: 'a' is also that of line 1",
        "5: prompt: 300",
        "6: n: 9 is more",
        "8: model: 'other'",
        "9: custom_id: 'a' is also that of line 1",
    ]
    assert len(rest) == len(expected)
    for found, text in zip(rest, expected):
        assert found.startswith(f"{path}:{text}"), found
    assert engine.num_steps == 0 and (tmp_path / "out.jsonl").read_text() == ""
    done = command(model, path, "-o", tmp_path / "out.jsonl", "--errors", "stop")
    assert done.returncode == 1 and f"{path}:9: custom_id" in done.stderr and not done.stdout
    run(make_job(model, tmp_path, [line("a"), line("d")], errors="stop"))
    assert len(read(tmp_path / "out.jsonl")) == 2


def test_duplicates_are_those_of_the_whole_file(model, tmp_path):
    """Also when the first of them has its result already, or is itself wrong."""
    lines = [line("a"), line("b"), line("c", n=0), line("a"), line("c"), line("b", CHAT)]
    rows = answer(model, tmp_path, lines)
    messages = [row["error"] and row["error"]["message"] for row in rows]
    assert messages[:2] == [None, None] and messages[2].startswith("n: expected")
    assert messages[3:] == [f"custom_id: {x!r} is also that of line {n}" for x, n in
                            (("a", 1), ("c", 3), ("b", 2))]  # fmt: skip
    out = tmp_path / "out.jsonl"
    kept = [row for row in read(out) if row["error"] is None]
    write(out, [json.dumps(row) for row in kept])
    assert without_times(answer(model, tmp_path, lines)) == without_times(rows)


def test_a_model_that_breaks_on_a_prompt_harms_no_other(tmp_path):
    config = llama.config_of("llama", max_position_embeddings=256)
    weights = llama.weights_of(config)
    poison = 7
    weights["model.embed_tokens.weight"][poison] = np.nan
    llama.write_model(tmp_path, config, weights)
    lines = [line(f"r{i}", prompt=[[40 + i % 90, 41, 42 + i % 50]], temperature=0, max_tokens=5)
             for i in range(90)]  # fmt: skip
    lines[5]["body"]["prompt"] = [[40, poison]]
    lines[40]["body"].update(prompt=[[40, 41], [poison, 40], [41]], n=2)
    rows = answer(tmp_path, tmp_path, lines)
    assert [i for i, row in enumerate(rows) if row["error"]] == [5, 40]
    assert {rows[i]["error"]["code"] for i in (5, 40)} == {"model_error"}


def test_a_file_that_changes_while_a_job_runs(model, tmp_path):
    job = make_job(model, tmp_path, [line(f"r{i}") for i in range(4)], schedule="fcfs")
    text = (tmp_path / "in.jsonl").read_text()
    with open(tmp_path / "in.jsonl", "r+") as file:
        file.write(text.replace("upon r2", "upon r9"))
    with pytest.raises(RaddleIOError, match=r"in.jsonl: line 3 has changed since the job began"):
        run(job)


def test_bad_arguments(model, tmp_path):
    for options, message in (
        ({"schedule": "best"}, "schedule: expected one of fcfs, .*paced, got 'best'"),
        ({"sample_rate": 2}, "sample_rate: expected a number from 0 to 1, got 2"),
        ({"sample_rate": float("nan")}, "sample_rate: expected"),
        ({"deadline": -1}, "deadline: expected seconds, 0 or more, got -1"),
        ({"deadline": "soon"}, "deadline: expected seconds"),
        ({"errors": "ignore"}, 'errors: expected "row" or "stop", got \'ignore\''),
    ):
        with pytest.raises(ArgumentError, match=message):
            make_job(model, tmp_path, [line("a")], **options)
        run(make_job(model, tmp_path, [line("a")]))  # nothing was left locked
        (tmp_path / "out.jsonl").unlink()


# ---- memory


class Counter:
    """An engine of which a pass asks no more than this: a token a byte."""

    max_model_len, max_batch = 1 << 20, 64
    cache = SimpleNamespace(page_size=16)
    config = SimpleNamespace(sampling_defaults={}, vocab_size=256)
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))


def test_memory_of_a_pass(tmp_path):
    """Bytes a line are few, and neither more lines nor longer bodies make them more."""
    found = {}
    for count, filler in ((2000, 10), (8000, 10), (2000, 4000)):
        path = tmp_path / f"{count}-{filler}"
        with open(path, "w") as file:
            for i in range(count):
                body = line(f"request-{i}", prompt="once upon a time " * 2, user="x" * filler)
                file.write(json.dumps(body) + "\n")
        tracemalloc.start()
        lines = Lines(path, Counter(), ["small"])
        lines.scan({})
        found[count, filler] = tracemalloc.get_traced_memory()[0] / count
        assert tracemalloc.get_traced_memory()[1] / count < 220
        tracemalloc.stop()
        assert len(lines) == len(lines.input_lengths) == count
        lines.close()
    assert max(found.values()) < 130, found
    assert max(found.values()) < 1.2 * min(found.values()), found
