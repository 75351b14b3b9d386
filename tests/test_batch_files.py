"""Batch jobs and their files: jobs that were stopped or killed, full disks, the two commands.

Needs: safetensors, tokenizers, jinja2. RLIMIT_FSIZE stands in for a full disk.
"""

import collections
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import raddle
from raddle.engine import SamplingParams
from raddle.engine.batch import BatchJob
from raddle.engine.results import DiskFullError, ResultsFile
from raddle.errors import ArgumentError, RaddleIOError

from tests.batch_cases import GOOD, answer, line, make_engine, model, read, without_times, write

pytest.importorskip("safetensors", reason="needs safetensors: not installed")
pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
pytest.importorskip("jinja2", reason="needs jinja2: not installed")

__all__ = ["model"]  # a fixture


# ---- files


def test_a_finished_job_does_nothing_more(model, tmp_path):
    lines = [line(str(i)) for i in range(4)] + ["bad"]
    rows = answer(model, tmp_path, lines)
    data = (tmp_path / "out.jsonl").read_bytes()
    engine = make_engine(model)
    assert answer(model, tmp_path, lines, engine) == rows
    assert (tmp_path / "out.jsonl").read_bytes() == data and engine.num_steps == 0


def test_a_cut_line_is_written_again(model, tmp_path):
    lines = [line(str(i), temperature=0) for i in range(5)]
    rows = without_times(answer(model, tmp_path, lines))
    path = tmp_path / "out.jsonl"
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for size in (0, 1, ends[0] - 1, ends[0], ends[2] + 7, len(data) - 1):
        path.write_bytes(data[:size])
        assert without_times(answer(model, tmp_path, lines)) == rows
        kept = max((end for end in ends if end <= size), default=0)
        assert path.read_bytes()[:kept] == data[:kept]


def test_results_of_another_job_are_refused(model, tmp_path):
    answer(model, tmp_path, [line("a")])
    before = (tmp_path / "out.jsonl").read_bytes()
    for lines in ([line("a", prompt="other")], [line("b"), line("a")], []):
        with pytest.raises(ArgumentError, match="answers line 1 of another input file or for"):
            answer(model, tmp_path, lines)
        assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "out.jsonl").write_bytes(before + before)
    with pytest.raises(RaddleIOError, match="line 2 is a second result of input line 1"):
        answer(model, tmp_path, [line("a")])
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(RaddleIOError, match="line 1 is no result line"):
        answer(model, tmp_path, [line("a")])
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"
    (tmp_path / "out.jsonl").write_bytes(before)
    assert len(answer(model, tmp_path, [line("a")])) == 1


def test_lines_that_were_added_are_answered(model, tmp_path):
    answer(model, tmp_path, [line("a"), "bad"])
    before = (tmp_path / "out.jsonl").read_bytes()
    rows = answer(model, tmp_path, [line("a"), "bad", line("b")])
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    assert [row["custom_id"] for row in rows] == ["a", None, "b"]


def test_two_jobs_on_one_file(model, tmp_path):
    first = ResultsFile(tmp_path / "out.jsonl")
    with pytest.raises(RaddleIOError, match="another job is writing"):
        ResultsFile(tmp_path / "out.jsonl")
    first.close()
    ResultsFile(tmp_path / "out.jsonl").close()


def test_bad_paths(model, tmp_path):
    engine = make_engine(model)
    path = write(tmp_path / "in.jsonl", [GOOD])
    for source, target, error, message in (
        (tmp_path / "none.jsonl", tmp_path / "out", RaddleIOError, "none.jsonl: cannot be read"),
        (path, tmp_path / "no" / "out", RaddleIOError, "cannot be written: No such file"),
        (path, path, ArgumentError, "--output: is the input file"),
        (tmp_path, tmp_path / "out", RaddleIOError, "cannot be read"),
    ):
        with pytest.raises(error, match=message):
            BatchJob(engine, source, target, ["small"])
    assert read(path) == [GOOD]


def test_a_full_disk_keeps_whole_lines(model, tmp_path, monkeypatch):
    lines = [line(str(i), temperature=0) for i in range(12)]
    expected = without_times(answer(model, tmp_path, lines))
    path = tmp_path / "out.jsonl"
    path.unlink()
    room = [2000]

    def full_write(fd, data, write=os.write):
        if room[0] < len(data):
            if room[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: room[0]]  # a disk takes what fits, then nothing
        room[0] -= len(data)
        return write(fd, data)

    monkeypatch.setattr("raddle.engine.results.os.write", full_write)
    with pytest.raises(DiskFullError, match="out.jsonl: No space left"):
        answer(model, tmp_path, lines)
    kept = read(path)
    assert path.stat().st_size <= 2000
    room[0] = 1 << 30
    assert without_times(answer(model, tmp_path, lines)) == expected
    assert read(path)[: len(kept)] == kept


# ---- the command


def command(model, *args):
    return [sys.executable, "-m", "raddle", "batch", "--model", str(model), "--device", "cpu",
            "--max-batch", "8", "--kv-memory", "4M", *map(str, args)]  # fmt: skip


def test_the_command(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD, "bad"])
    out = tmp_path / "out.jsonl"
    done = subprocess.run(command(model, source, "-o", out), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "2 results (1 errors)" in done.stdout and "tokens/s" in done.stdout
    assert "KV cache" in done.stdout and done.stderr == ""
    assert len(read(out)) == 2
    again = subprocess.run(command(model, source, "-o", out), text=True, capture_output=True)
    assert again.returncode == 0 and "2 of 2 lines are in" in again.stderr
    wrong = subprocess.run(
        command(tmp_path / "no", source, "-o", out), text=True, capture_output=True
    )
    assert wrong.returncode == 1 and "no such folder" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_the_command_on_a_full_disk(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [line(str(i)) for i in range(40)])
    out = tmp_path / "out.jsonl"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        command(model, source, "-o", out), text=True, capture_output=True, preexec_fn=limit
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = read(out)
    assert f"keeps {len(rows)} of 40 results; make room" in done.stderr
    done = subprocess.run(command(model, source, "-o", out), text=True, capture_output=True)
    assert done.returncode == 0
    assert len(read(out)) == 40 and read(out)[: len(rows)] == rows


def kill_after(process, path, size, seconds):
    """kill -9 once the file has so many bytes, or the command ran so long."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.stat().st_size >= size:
            break
        time.sleep(0.0005)
    process.kill()
    process.wait()


def test_kill_9_at_any_point(model, tmp_path):
    """Every line has exactly one result in the end, and what was written is never touched again.

    While the command begins, reads its input, or a few results later. RADDLE_TEST_KILLS: how
    often."""
    num_kills = int(os.environ.get("RADDLE_TEST_KILLS", 16))
    lines = [line(f"r{i}", max_tokens=4 + i % 29) for i in range(600)]
    lines[7] = "not JSON"
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    rng, before, num_written = random.Random(5), b"", 0
    for _ in range(num_kills):
        process = subprocess.Popen(
            command(model, source, "-o", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        size = len(before) + rng.randrange(1, 2000)
        kill_after(process, out, size, rng.choice([60, rng.uniform(0, 0.5)]))
        process.communicate()
        data = out.read_bytes() if out.exists() else b""
        assert data.startswith(before[: before.rfind(b"\n") + 1])
        num_written += len(data) > len(before)
        before = data
    num_left = 600 - before.count(b"\n")
    assert num_left > 0 and num_written >= 0.3 * num_kills
    done = subprocess.run(command(model, source, "-o", out), text=True, capture_output=True)
    assert done.returncode == 0 and f"{600 - num_left} of 600 lines are in" in done.stderr
    rows = read(out)
    counts = collections.Counter(row["custom_id"] for row in rows)
    assert len(rows) == 600 and set(counts.values()) == {1}
    (tmp_path / "whole").mkdir()
    expected = without_times(answer(model, tmp_path / "whole", lines))
    rows.sort(key=lambda row: int(row["id"].rsplit("_", 1)[1]))
    assert without_times(rows) == expected


def test_ctrl_c(model, tmp_path):
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", max_tokens=200) for i in range(400)])
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command(model, source, "-o", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job inherits an ignored SIGINT, and Python then leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        threading.Event().wait(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"keeps {len(read(out))} of 400 results; run the same command" in errors


def test_generate_command(model):
    base = [sys.executable, "-m", "raddle", "generate", "--model", str(model), "--device", "cpu",
            "--kv-memory", "4M", "--max-tokens", "5", "--temperature", "0"]  # fmt: skip
    engine = make_engine(model)
    params = SamplingParams(max_tokens=5, temperature=0)
    for extra, prompt in (
        (["the cat"], "the cat"),
        (["--chat", "hello"], [{"role": "user", "content": "hello"}]),
    ):
        done = subprocess.run(base + extra, capture_output=True)
        assert done.returncode == 0, done.stderr
        expected = engine.generate([prompt], params)[0][0].text
        assert done.stdout.decode() == expected + "\n"
    two = subprocess.run([*base, "-n", "2", "the cat"], text=True, capture_output=True)
    assert two.returncode == 0 and two.stdout.count("---") == 2
    bad = subprocess.run([*base, "--top-p", "3", "x"], text=True, capture_output=True)
    assert bad.returncode == 1 and bad.stderr.startswith("raddle generate: top_p")


def test_without_a_model(tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    args = [sys.executable, "-m", "raddle", "batch", str(source), "-o", str(tmp_path / "out")]
    checkout = Path(raddle.__file__).resolve().parents[2]
    if (checkout / "examples" / "tiny-llama" / "model.safetensors").exists():
        pytest.skip("needs an installed raddle: beside its source, tiny-llama is found")
    done = subprocess.run(args, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "--model" in done.stderr and "examples/tiny-llama" in done.stderr
