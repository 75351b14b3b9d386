"""Batch jobs: OpenAI's format in and out, and what becomes of lines that are wrong.

Needs: safetensors, tokenizers, jinja2.
"""

import json
import re

import pytest
from raddle.engine import SamplingParams
from raddle.engine.batch import BatchJob

from tests.batch_cases import CHAT, GOOD, answer, line, make_engine, model, write
from tests.reference import llama

pytest.importorskip("safetensors", reason="needs safetensors: not installed")
pytest.importorskip("tokenizers", reason="needs tokenizers: not installed")
pytest.importorskip("jinja2", reason="needs jinja2: not installed")

__all__ = ["model"]  # a fixture


# ---- the format


def test_completions(model, tmp_path):
    (row,) = answer(model, tmp_path, [line("a", prompt="the cat", n=2, temperature=0)])
    assert set(row) == {"id", "custom_id", "response", "error"}
    assert (row["custom_id"], row["error"]) == ("a", None)
    response = row["response"]
    assert set(response) == {"status_code", "request_id", "body"}
    assert response["status_code"] == 200
    body = response["body"]
    assert (body["object"], body["model"]) == ("text_completion", "small")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    engine = make_engine(model)
    expected = engine.generate(["the cat"], SamplingParams(max_tokens=8, temperature=0))[0][0]
    assert {choice["text"] for choice in body["choices"]} == {expected.text}
    assert body["choices"][0]["finish_reason"] == expected.finish_reason
    prompt, output = len(engine.tokenizer.encode("the cat")), 2 * len(expected.token_ids)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def test_all_forms_of_prompts(model, tmp_path):
    engine = make_engine(model)
    ids = [engine.tokenizer.encode(text) for text in ("the cat", "a dog")]
    forms = ["the cat", ["the cat"], ids[0], ["the cat", "a dog"], ids]
    lines = [line(str(i), prompt=p, temperature=0) for i, p in enumerate(forms)]
    rows = answer(model, tmp_path, lines)
    texts = [[c["text"] for c in row["response"]["body"]["choices"]] for row in rows]
    assert texts[0] == texts[1] == texts[2] == texts[3][:1]
    assert texts[3] == texts[4] and len(texts[4]) == 2


def test_chat(model, tmp_path):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rows = answer(
        model,
        tmp_path,
        [
            line("a", CHAT, messages=[{"role": "user", "content": "hello"}], temperature=0),
            line("b", CHAT, messages=[{"role": "user", "content": parts}], temperature=0),
            line("c", prompt="<|begin|>user: hello<|end|><|begin|>assistant: ", temperature=0),
            line("d", CHAT, max_tokens=None, max_completion_tokens=3),
        ],
    )
    first, second, third, fourth = (row["response"]["body"] for row in rows)
    assert first["object"] == "chat.completion"
    message = first["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == second["choices"][0]["message"]["content"]
    assert message["content"] == third["choices"][0]["text"]
    assert fourth["usage"]["completion_tokens"] <= 3


def test_logprobs(model, tmp_path):
    lines = [
        line("a", logprobs=2, temperature=0, max_tokens=4),
        line("b", CHAT, logprobs=True, top_logprobs=3, max_tokens=4),
        line("c", CHAT, logprobs=True, max_tokens=4),
    ]
    first, second, third = (
        row["response"]["body"]["choices"][0]["logprobs"] for row in answer(model, tmp_path, lines)
    )
    assert len(first["tokens"]) == len(first["token_logprobs"]) == len(first["text_offset"])
    assert all(len(top) == 2 for top in first["top_logprobs"])
    assert first["token_logprobs"] == [max(top.values()) for top in first["top_logprobs"]]
    for entry in second["content"]:
        assert len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    assert all(entry["top_logprobs"] == [] for entry in third["content"])


def test_unseeded_lines_are_the_same_in_every_run(model, tmp_path):
    lines = [line(str(i), prompt="the", temperature=1.0) for i in range(6)]
    texts = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        rows = answer(model, tmp_path / name, lines, seed=seed)
        texts.append([row["response"]["body"]["choices"][0]["text"] for row in rows])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 6


def test_the_summary_counts_what_the_prefix_cache_had(model, tmp_path):
    head = "once upon a time there was a"  # bytes are tokens: a page of 16 is shared
    path = write(tmp_path / "in.jsonl", [line(str(i), prompt=f"{head} {i}") for i in range(5)])
    engine = make_engine(model)
    job = BatchJob(engine, path, tmp_path / "out.jsonl", ["small"])
    summary = job.run()
    job.close()
    assert summary.hit_tokens == engine.num_hit_tokens == 4 * 16
    assert summary.hit_ratio == summary.hit_tokens / summary.prompt_tokens


# ---- error rows

BAD_LINES = {
    "not JSON": ("{", None, 400, "not JSON"),
    "not an object": ("[1]", None, 400, "expected a JSON object"),
    "not UTF-8": (b"\xff\xfe".decode("latin-1"), None, 400, "not JSON"),
    "deep": ("[" * 200000, None, 400, "not JSON"),
    "no custom_id": ({**line("x"), "custom_id": None}, None, 400, "custom_id: expected"),
    "custom_id type": ({**line("x"), "custom_id": 5}, None, 400, "custom_id: expected .* 5"),
    "duplicate": (line("good"), "good", 400, "custom_id: 'good' is also that of line 1"),
    "no method": ({k: v for k, v in line("x").items() if k != "method"}, "x", 400, "method"),
    "method": ({**line("x"), "method": "GET"}, "x", 400, "expected \"POST\", got 'GET'"),
    "no url": ({k: v for k, v in line("x").items() if k != "url"}, "x", 400, "url: is missing"),
    "url": (line("x", "/v1/embeddings"), "x", 404, "'/v1/embeddings' is not served"),
    "no body": ({k: v for k, v in line("x").items() if k != "body"}, "x", 400, "body"),
    "body type": ({**line("x"), "body": "text"}, "x", 400, "body: expected an object"),
    "field": ({**line("x"), "extra": 1}, "x", 400, "extra: unknown field"),
    "model": (line("x", model="gpt"), "x", 404, "'gpt' is not served; this job serves small"),
    "model type": (line("x", model=3), "x", 400, "model: expected a string"),
    "no prompt": (line("x", prompt=None), "x", 400, "prompt: expected"),
    "prompt type": (line("x", prompt=3.5), "x", 400, "prompt: expected"),
    "prompt mix": (line("x", prompt=["a", 3]), "x", 400, "prompt: expected"),
    "empty prompt": (line("x", prompt=""), "x", 400, "prompt: is empty"),
    "empty list": (line("x", prompt=[]), "x", 400, "prompt: expected"),
    "prompt ids": (line("x", prompt=[[5], [999]]), "x", 400, "999 at position 0"),
    "long prompt": (line("x", prompt="x" * 300), "x", 400, "300 tokens .* 256"),
    "surrogate": (line("x", prompt="\ud800"), "x", 400, "text: cannot be tokenised"),
    "max_tokens": (line("x", max_tokens=0), "x", 400, "max_tokens"),
    "max_tokens type": (line("x", max_tokens="5"), "x", 400, "max_tokens: .* '5'"),
    "temperature": (line("x", temperature=-1), "x", 400, "temperature: .* -1"),
    "temperature, huge": (line("x", temperature=10**400), "x", 400, "temperature: .* 1000"),
    "top_p": (line("x", top_p=2), "x", 400, "top_p"),
    "n": (line("x", n=1.0), "x", 400, "n: expected an integer"),
    "n too many": (line("x", n=9), "x", 400, "n: 9 is more than max_batch"),
    "stop": (line("x", stop=[1]), "x", 400, "stop"),
    "logprobs": (line("x", logprobs=True), "x", 400, "logprobs"),
    "stream": (line("x", stream=True), "x", 400, "stream: True is not supported"),
    "penalty": (line("x", frequency_penalty=0.5), "x", 400, "frequency_penalty: 0.5"),
    "echo": (line("x", echo=True), "x", 400, "echo: True"),
    "best_of": (line("x", best_of=3), "x", 400, "best_of: 3"),
    "unknown": (line("x", magic=1), "x", 400, "magic: unknown field"),
    "messages": (line("x", CHAT, messages=None), "x", 400, "messages: expected"),
    "no messages": (line("x", CHAT, messages=[]), "x", 400, "messages: expected"),
    "message": (line("x", CHAT, messages=["hi"]), "x", 400, r"messages\[0\]: expected"),
    "role": (line("x", CHAT, messages=[{"content": "x"}]), "x", 400, r"messages\[0\].role"),
    "content": (line("x", CHAT, messages=[{"role": "user"}]), "x", 400, r"\[0\].content"),
    "image": (
        line("x", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        "x",
        400,
        "only text parts .*, got .image_url",
    ),
    "tools": (line("x", CHAT, tools=[{"type": "function"}]), "x", 400, "tools: "),
    "format": (line("x", CHAT, response_format={"type": "json"}), "x", 400, "response_format"),
    "top_logprobs": (line("x", CHAT, top_logprobs=2), "x", 400, "needs logprobs: true"),
    "two limits": (line("x", CHAT, max_completion_tokens=9), "x", 400, "max_tokens: 8, but"),
}


def test_bad_lines_are_error_rows_and_harm_nobody(model, tmp_path):
    (tmp_path / "alone").mkdir()
    (alone,) = answer(model, tmp_path / "alone", [GOOD])
    bad = [
        {**bad, "custom_id": f"x {name}"} if custom_id == "x" else bad
        for name, (bad, custom_id, *_) in BAD_LINES.items()
    ]
    lines = [GOOD, *bad, line("last", temperature=0)]
    rows = answer(model, tmp_path, lines)
    assert len(rows) == len(lines)
    first, *bad, last = rows
    body, expected = first["response"]["body"], alone["response"]["body"]
    assert body["choices"] == expected["choices"]
    assert last["response"]["status_code"] == 200 and last["error"] is None
    for row, (name, (_, custom_id, status, message)) in zip(bad, BAD_LINES.items()):
        assert row["custom_id"] == (f"x {name}" if custom_id == "x" else custom_id), name
        assert row["response"]["status_code"] == status, name
        assert re.search(message, row["error"]["message"]), (name, row["error"])
        assert row["response"]["body"]["error"]["message"] == row["error"]["message"], name
        assert row["error"]["code"], name


def test_fields_that_ask_for_nothing_are_taken(model, tmp_path):
    plain = {"stream": False, "logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0}
    rows = answer(
        model,
        tmp_path,
        [
            line("a", **plain, user="me", best_of=1, echo=False, suffix=None, top_p=0, seed=3),
            line("b", CHAT, **plain, tools=[], tool_choice="none", metadata={"k": "v"}),
            line("c", top_k=5, min_p=0.1, ignore_eos=True, stop_token_ids=[4], stop=None),
        ],
    )
    assert [row["error"] for row in rows] == [None] * 3


def test_blank_lines_and_no_lines(model, tmp_path):
    assert len(answer(model, tmp_path, ["", GOOD, "   "])) == 1
    (tmp_path / "empty").mkdir()
    assert answer(model, tmp_path / "empty", []) == []


def test_a_template_that_fails_is_an_error_row(tmp_path):
    config = llama.config_of("llama", max_position_embeddings=128)
    for name, template, message in (
        ("refuses", "{{ raise_exception('no system role') }}", "says: no system role"),
        ("fails", "{{ messages[0].content + 1 }}", "failed"),
        ("attacks", "{{ ''.__class__.__mro__ }}", "failed"),
        ("changes", "{{ messages.append(1) }}", "failed"),
    ):
        folder = tmp_path / name
        llama.write_model(folder, config)
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_text()) | {"chat_template": template}
        path.write_text(json.dumps(content))
        bad, good = answer(folder, folder, [line("a", CHAT), line("b")])
        assert message in bad["error"]["message"], (name, bad)
        assert good["error"] is None
    folder = tmp_path / "none"
    llama.write_model(folder, config)
    (folder / "tokenizer_config.json").unlink()
    bad, good = answer(folder, folder, [line("a", CHAT), line("b")])
    assert "no chat_template" in bad["error"]["message"] and good["error"] is None
