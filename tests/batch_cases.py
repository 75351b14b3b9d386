"""What the tests of batch jobs share: a small model, lines of input, a job run to its end."""

import json

import pytest
from raddle.engine import Engine
from raddle.engine.batch import BatchJob

from tests.reference import llama

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    llama.write_model(folder, llama.config_of("llama", max_position_embeddings=256))
    return folder


def make_engine(folder):
    return Engine.from_folder(folder, max_batch=8, kv_memory_bytes=4 << 20)


def line(custom_id, url=COMPLETIONS, **body):
    body = {"model": "small", "max_tokens": 8, **body}
    if url == COMPLETIONS:
        body.setdefault("prompt", f"once upon {custom_id}")
    else:
        body.setdefault("messages", [{"role": "user", "content": f"hello {custom_id}"}])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path, lines):
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text)
    return path


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def answer(folder, tmp_path, lines, engine=None, **options):
    """Results in the order of the input lines."""
    job = BatchJob(
        engine or make_engine(folder),
        write(tmp_path / "in.jsonl", lines),
        tmp_path / "out.jsonl",
        ["small"],
        **options,
    )
    try:
        job.run()
    finally:
        job.close()
    return sorted(read(tmp_path / "out.jsonl"), key=lambda row: int(row["id"].rsplit("_", 1)[1]))


def without_times(rows):
    for row in rows:
        row["response"]["body"].pop("created", None)
    return rows


GOOD = line("good", temperature=0)
