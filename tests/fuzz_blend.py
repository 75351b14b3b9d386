"""Lines of requests as nobody should write them: the trace reader and the batch file reader of
`python -m raddle schedule`, and the line parser of `python -m raddle batch`.

    python tests/fuzz_blend.py --cases 1000000 --seed 0
    python tests/fuzz_blend.py --seed 0 --only 4711

Each case is a line, made from a good one: values and fields that are wrong, bytes that are. A file
is refused by an ArgumentError that begins with its name and the line's number, a line of a job by a
RequestError from which an error row can be made; what is accepted has to be what the line says.
Anything else is a failure, which is printed with its seed and its line. Needs: numpy.
"""

import argparse
import copy
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from raddle.blend import Requests
from raddle.blend.files import kind_of
from raddle.engine.lines import _parse_line
from raddle.engine.openai import RequestError, error_body, error_code, error_status, parse_body
from raddle.engine.results import _encode
from raddle.engine.tokenizer import Tokenizer
from raddle.errors import ArgumentError

BLOCK, CONTEXT = 16, 4096
GOOD = {
    "trace": b'{"input_length": 40, "output_length": 3, "hash_ids": [1, 2]}\n',
    "openai": b'{"custom_id": "first", "method": "POST", "url": "/v1/completions", "body": '
    b'{"model": "m", "prompt": "x", "max_tokens": 2}}\n',
}
MOST_SHOWN = 10


class Raw(str):
    """Stands in the line as it is: what JSON has no value for, or Python no number."""


class Letters(Tokenizer):
    """A token for each byte; no library, no files."""

    def __init__(self):
        self.vocab_size = 256

    def encode(self, text, add_special_tokens=True):
        try:
            return list(text.encode())
        except UnicodeError as error:
            raise ArgumentError(f"text: cannot be tokenised: {error}") from None

    @property
    def chat_template(self):
        return self

    def render(self, messages):
        return "".join(message["role"] + message["content"] for message in messages)


# -- lines --------------------------------------------------------------------------------------

VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 2, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64 - 1,
    2**64, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, -1.0, 1e308, 5e-324, 1e16, Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), Raw("1E+2"), Raw("9" * 5000),
    Raw("01"), Raw("+1"), Raw("0x10"), Raw("1_000"), Raw("nul"), Raw("'a'"), Raw(""), Raw("{"),
    Raw('"\\ud800"'), Raw('"\\ud83d\\ude00"'), Raw('"\\u0000"'), Raw('"\\x"'), Raw('"\t"'),
    "", "x", "1", "POST", "/v1/completions", "/v1/chat/completions", "first", "é", "\U0001f600",
    [], {}, [[]], [{}], [None], [1], [1, 2, 3], [1.0], [True], [-1], [2**63], [2**64], ["a", ""],
    ["a", 1], [[1, 2], [3]], [[1], "a"], [[-1]], [[None]], {"a": 1}, {"type": "text"},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": 1, "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "image"}]}], [{"role": "user", "content": [[]]}],
)  # fmt: skip
NAMES = (
    "input_length", "output_length", "hash_ids", "source", "timestamp", "custom_id", "method",
    "url", "body", "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n",
    "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "ignore_eos", "skip_special_tokens", "logprobs", "top_logprobs", "stream", "stream_options",
    "echo", "suffix", "logit_bias", "tools", "tool_choice", "response_format", "user", "metadata",
    "frequency_penalty", "presence_penalty", "", "a", "\x00", "\ud800", "é",
)  # fmt: skip
BYTES = (
    b"\x00", b"\xff", b"\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf",
    b"\n", b"\r", b"\r\n", b"\x0b", b"\x85", b"\xe2\x80\xa8", b" ", b"\t", b'"', b"\\", b"{", b"}",
    b"[", b"]", b",", b":", b"-", b"e", b"0", b"null", b"\\u", b"\\ud800", b"//", b"/*", b"#",
)  # fmt: skip


def good_trace(rng):
    length = rng.choice((1, 15, 16, 17, 40, 700, 2**31 - 2))
    ids = [
        rng.choice((0, 1, 2**64 - 1, rng.getrandbits(64))) for _ in range(min(length // BLOCK, 5))
    ]
    line = {"input_length": length, "output_length": rng.choice((1, 9, 300)), "hash_ids": ids}
    if rng.random() < 0.3:
        line["source"] = rng.choice(("a", "b", 3, -5, 10**30))
    if rng.random() < 0.3:
        line["timestamp"] = rng.random()
    return line


def good_openai(rng):
    body = {"model": "m", "max_tokens": rng.choice((1, 16, 2**31 - 1))}
    if rng.random() < 0.5:
        url = "/v1/completions"
        body["prompt"] = rng.choice(("once", ["a", "b"], [5, 6], [[5], [6, 7]], "\x00", "é"))
    else:
        url = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "hello"}] * rng.randint(1, 2)
    for name, values in (
        ("temperature", (0, 1, 0.5)), ("n", (1, 2)), ("seed", (0, -(2**63))),
        ("stop", ("x", ["y"])),
    ):  # fmt: skip
        if rng.random() < 0.2:
            body[name] = rng.choice(values)
    return {"custom_id": f"r{rng.random()}", "method": "POST", "url": url, "body": body}


def dumps(value):
    """JSON, but for what is Raw; a tuple is an object's fields, some of which may come twice."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{json.dumps(name)}: {dumps(own)}" for name, own in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


def nested(rng):
    """As deep as may be read, and as may be shown, and deeper."""
    # Where Python stops: at this depth, in 3.12 at 1500 and in 3.13 at 10,000 in C.
    near = rng.choice((sys.getrecursionlimit(), 1500, 10_000)) + rng.randint(-100, 5)
    depth = rng.choice((3, near, near, near, near, near, 5000, 100_000))
    left, right = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    inner = "1" if left[-1] == ":" else rng.choice(("", "1"))
    return Raw(left * depth + inner + right * depth)


def value_of(rng):
    at = rng.random()
    if at < 0.003:
        return nested(rng)
    if at < 0.004:
        return rng.choice(("x", "\U0001f600", "\x00")) * 100_000
    if at < 0.005:
        return Raw("[" + ", ".join([rng.choice(("1", '"a"', "null"))] * 30_000) + "]")
    return copy.deepcopy(rng.choice(VALUES))  # of which fields may be changed later


def change(rng, line):
    """One field, somewhere: another value, gone, twice, by another name, or one more."""
    objects, here = [], [line]
    while here:
        own = here.pop()
        if isinstance(own, dict):
            objects.append(own)
            here += own.values()
        elif isinstance(own, list):
            here += own
    own = rng.choice(objects)
    name = rng.choice(list(own) or [""])
    kind = rng.randrange(6)
    if kind < 3:
        own[name] = value_of(rng)
    elif kind == 3:
        own.pop(name, None)
    elif kind == 4:
        own[rng.choice(NAMES)] = value_of(rng)
    else:
        own[rng.choice(NAMES)] = own.pop(name, None)


def scribble(rng, data):
    """Bytes that are gone, come twice, are other ones; or the whole in another encoding."""
    kind = rng.randrange(9)
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[end:]
    if kind == 2:
        return data[:end] + data[at:]
    if kind == 3:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 4:
        return rng.choice(BYTES) + data
    if kind == 5:
        return data + rng.choice(BYTES)
    if kind == 6 and rng.random() < 0.2:
        text = data.decode("utf-8", "replace")
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-16-be", "utf-8-sig", "utf-7")))
    return data[:at] + rng.choice(BYTES) + data[at:]


def make_line(seed, number):
    """(kind, bytes) of a case."""
    rng = random.Random(seed * 2**40 + number)
    kind = "trace" if rng.random() < 0.4 else "openai"
    line = good_trace(rng) if kind == "trace" else good_openai(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        change(rng, line)
    if rng.random() < 0.02:  # a name that comes twice
        line = (*line.items(), (rng.choice(list(line) or ["a"]), value_of(rng)))
    if rng.random() < 0.01:
        line = value_of(rng)
    data = dumps(line).encode("utf-8", "surrogatepass")
    while rng.random() < 0.3:
        data = scribble(rng, data)
    return kind, data


# -- what is expected ---------------------------------------------------------------------------


def objects_of(data):
    """(number of line in the file, its object) of each line that is not blank."""
    return [
        (number, json.loads(line))
        for number, line in enumerate(io.BytesIO(data), 1)
        if line.strip()
    ]


def check_refusal(error, path, data):
    """That it names a line which is there, and the first is good."""
    head = f"{path}:"
    assert type(error) is ArgumentError, f"{type(error).__name__} of a file"
    text = str(error)
    assert text.startswith(head), "the file is not named"
    number, rest = text[len(head) :].split(":", 1)
    lines = data.split(b"\n")
    assert 2 <= int(number) <= len(lines) and lines[int(number) - 1].strip(), (
        "another line is named"
    )
    assert len(rest) > 5


def check_trace(path, data):
    try:
        requests = Requests.from_trace(path, BLOCK)
    except ArgumentError as error:
        check_refusal(error, path, data)
        return
    lines = [content for _, content in objects_of(data)]
    lengths = [content["input_length"] for content in lines]
    assert all(type(n) is int for n in lengths) and requests.prompt_tokens == sum(lengths)
    outputs = [content.get("output_length") for content in lines]
    assert requests.output_lengths.tolist() == [-1 if n is None else n for n in outputs]
    ids = [(content.get("hash_ids") or [])[: n // BLOCK] for content, n in zip(lines, lengths)]
    assert requests.num_blocks == sum(map(len, ids))
    sources = {(type(content.get("source")), content.get("source")) for content in lines}
    assert requests.num_sources == len(sources) == len(requests.source_names)


def check_openai(path, data):
    try:
        requests = Requests.from_openai(path, Letters(), block_size=BLOCK, context=CONTEXT)
    except ArgumentError as error:
        check_refusal(error, path, data)
        return
    names = {content["custom_id"] for _, content in objects_of(data)}
    assert set(requests.custom_ids) == names and all(type(name) is str for name in names)
    assert requests.num_requests >= len(names)
    assert 1 <= requests.output_lengths.min() and requests.output_lengths.max() < CONTEXT


def check_kind(path, data):
    """Of a file whose first line it is."""
    try:
        kind = kind_of(path)
    except ArgumentError as error:
        assert str(error).startswith(str(path)), "the file is not named"
        assert str(error).startswith(f"{path}:") or not data.strip()
        return
    first = next(line for line in io.BytesIO(data) if line.strip())
    assert (kind == "trace") == ("input_length" in json.loads(first))


def check_row(data):
    """A line of a job: what is submitted, or an error row that can be written."""
    custom_id, content = _parse_line(data)
    assert custom_id is None or type(custom_id) is str
    error = content
    if not isinstance(content, RequestError):
        try:
            parsed = parse_body(content["url"], content["body"], ["m"], {})
        except RequestError as refusal:
            error = refusal
        else:
            assert custom_id and parsed.model == "m" and parsed.prompts
            assert parsed.params.max_tokens is None or 1 <= parsed.params.max_tokens < 2**31
            assert 0 <= parsed.params.temperature <= 100 and 1 <= parsed.params.n <= 128
            return
    body = error_body(error)["error"]
    assert error_status(error) in (400, 404) and type(error_code(error)) is str
    assert str(error) and type(body["message"]) is str
    _encode({"custom_id": custom_id, "body": body})


def check(kind, data, path):
    """Raises what the readers should not raise, or an AssertionError."""
    path.write_bytes(GOOD[kind] + data)
    (check_trace if kind == "trace" else check_openai)(path, GOOD[kind] + data)
    if kind == "openai":
        check_row(data)
    path.write_bytes(data)
    check_kind(path, data)


def fuzz(cases, seed, say=print):
    """How many of the cases fail. say: called with what is wrong, of the first few."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        for number in cases:
            kind, data = make_line(seed, number)
            try:
                check(kind, data, path)
            except Exception as error:
                failures += 1
                if failures <= MOST_SHOWN:
                    shown = data if len(data) <= 2000 else data[:1000] + b" .. " + data[-1000:]
                    say(
                        f"--seed {seed} --only {number} ({kind}, {len(data)} bytes): "
                        f"{type(error).__name__}: {str(error)[:500]}\n  {shown!r}"
                    )
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="this one")
    args = parser.parse_args()
    cases = range(args.cases) if args.only is None else [args.only]
    begin = time.monotonic()
    failures = fuzz(cases, args.seed)
    seconds = time.monotonic() - begin
    print(f"{len(cases)} cases of seed {args.seed}: {failures} failures, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
