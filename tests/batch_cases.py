"""What the tests of batch jobs share: a small model, lines of input, a job run to its end."""

import json

import pytest
from raddle.blend import CostModel
from raddle.engine import Engine
from raddle.engine.batch import BatchJob

from tests.reference import llama

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

COST = CostModel(
    flops_per_token=1e6,
    flops_per_score=1e3,
    kv_bytes_per_token=1e3,
    weight_bytes=1e6,
    attention_flops_rate=1e11,
    read_rate=1e10,
    gemm_rate=1e11,
    alpha=0.5,
)


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


def make_job(folder, tmp_path, lines, engine=None, **options):
    source = write(tmp_path / "in.jsonl", lines)
    engine = engine or make_engine(folder)
    return BatchJob(engine, source, tmp_path / "out.jsonl", ["small"], **options)


def run(job):
    """Its Summary."""
    try:
        return job.run()
    finally:
        job.close()


def answer(folder, tmp_path, lines, engine=None, **options):
    """Results in the order of the input lines."""
    run(make_job(folder, tmp_path, lines, engine, **options))
    return sorted(read(tmp_path / "out.jsonl"), key=lambda row: int(row["id"].rsplit("_", 1)[1]))


def texts(rows):
    return [[choice["text"] for choice in row["response"]["body"]["choices"]] for row in rows]


def without_times(rows):
    for row in rows:
        row["response"]["body"].pop("created", None)
    return rows


GOOD = line("good", temperature=0)
