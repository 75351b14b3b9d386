"""A batch job: a file of requests in OpenAI's batch format, a file of results in the same.

Lines are read as the engine has room for them and written when they are answered, in any order.
Whatever is wrong with a line is its own result, an error row, and nobody else's.
"""

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArgumentError, RaddleError, RaddleIOError
from .openai import (
    RequestError,
    error_body,
    error_code,
    error_status,
    parse_body,
    response_body,
)
from .results import ResultsFile

_LINE_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass
class Summary:
    """What a job did, this time (seconds, tokens) and in all (lines)."""

    num_lines: int
    num_done: int = 0
    num_errors: int = 0
    num_resumed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    hit_tokens: int = 0  # of prompt_tokens, found in the prefix cache
    seconds: float = 0.0

    @property
    def hit_ratio(self):
        return self.hit_tokens / max(1, self.prompt_tokens)


@dataclass
class Row:
    """A line that is being answered: one engine request per prompt."""

    number: int
    custom_id: str
    parsed: object
    answers: list = field(default_factory=list)  # per prompt, a list of n Outputs
    num_missing: int = 0


class BatchJob:
    """Answers the lines of input_path into output_path; the engine is lent.

    model_names: what a request's `model` may be, the first being the job's own. seed: of the
    requests without one. progress: called with the Summary after each step.
    """

    def __init__(self, engine, input_path, output_path, model_names, *, seed=0, progress=None):
        self._engine, self._model_names, self._seed = engine, list(model_names), seed
        self._input = Path(input_path)
        if self._input.resolve() == Path(output_path).resolve():
            raise ArgumentError("--output: is the input file; name another one")
        self._progress = progress or (lambda summary: None)
        self._defaults = engine.config.sampling_defaults
        model = f"{self._model_names[0]} {engine.config}"
        digest, num_lines = _identify(self._input, model)
        self.results = ResultsFile(output_path, digest)
        self.summary = Summary(num_lines)
        self.summary.num_done = self.summary.num_resumed = len(self.results.done)
        self.summary.num_errors = self.results.num_errors
        self._rows = {}  # request id -> (Row, prompt index)
        self._records = []  # finished, not yet written

    def run(self):
        """Answer all that is missing. What is written stays written whatever ends the job."""
        begin = time.monotonic()
        engine, before = self._engine, self._counts()
        lines = self._missing_lines()
        is_open = True
        try:
            while is_open or engine.has_work or self._records:
                while is_open and not self._has_enough():
                    line = next(lines, None)
                    is_open = line is not None
                    if is_open:
                        self._submit(*line)
                if engine.has_work:
                    for output in engine.step():
                        self._take(output)
                self._write()
                counts = [now - then for now, then in zip(self._counts(), before)]
                self.summary.prompt_tokens, self.summary.output_tokens = counts[:2]
                self.summary.hit_tokens = counts[2]
                self.summary.seconds = time.monotonic() - begin
                self._progress(self.summary)
        finally:
            for request_id in list(self._rows):
                engine.abort(request_id)
            self._rows.clear()
            self.results.sync()
        return self.summary

    def close(self):
        self.results.close()

    def _has_enough(self):
        return self._engine.num_waiting >= self._engine.max_batch or len(self._records) >= 256

    def _counts(self):
        engine = self._engine
        return engine.num_prompt_tokens, engine.num_output_tokens, engine.num_hit_tokens

    def _missing_lines(self):
        """(number, custom_id, line's content or RequestError) of the lines without a result."""
        seen = {}
        for number, data in _lines(self._input):
            custom_id, content = _parse_line(data)
            if custom_id in seen:
                content = RequestError(
                    f"custom_id: {custom_id!r} is also that of line {seen[custom_id]}",
                    param="custom_id",
                    code="duplicate_custom_id",
                )
            elif custom_id is not None:
                seen[custom_id] = number
            if number not in self.results.done:
                yield number, custom_id, content

    def _submit(self, number, custom_id, content):
        added = []
        try:
            if isinstance(content, RequestError):
                raise content
            parsed = parse_body(content["url"], content["body"], self._model_names, self._defaults)
            row = Row(number, custom_id, parsed)
            for i, prompt in enumerate(parsed.prompts):
                request_id = (number, i)
                params = parsed.params
                if params.seed is None:
                    params = dataclasses.replace(params, seed=self._seed_of(number, i))
                self._engine.add_request(prompt, params, request_id=request_id)
                added.append(request_id)
                row.answers.append([None] * parsed.params.n)
                row.num_missing += parsed.params.n
            self._rows.update({request_id: row for request_id in added})
        except RaddleError as error:
            for request_id in added:
                self._engine.abort(request_id)
            self._finish(number, custom_id, error_status(error), error_body(error), error)

    def _seed_of(self, number, prompt_index):
        """The same in every run of the job, wherever it was stopped."""
        text = f"{self._seed} {number} {prompt_index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")

    def _take(self, output):
        row = self._rows.get(output.request_id)
        if row is None:  # of a row that failed
            return
        number, prompt = output.request_id
        row.answers[prompt][output.index] = output
        row.num_missing -= 1
        if output.finish_reason == "error":
            self._drop(row)
            error = RequestError(
                "the model's logits are not numbers: its weights or dtype do not suit this prompt",
                status=500,
                code="model_error",
            )
            self._finish(number, row.custom_id, 500, error_body(error), error)
        elif row.num_missing == 0:
            self._drop(row)
            body = response_body(
                row.parsed,
                row.answers,
                self._engine.tokenizer,
                self.results.line_id(number).removeprefix("batch_req_"),
                int(time.time()),
            )
            self._finish(number, row.custom_id, 200, body)

    def _drop(self, row):
        for i in range(len(row.answers)):
            self._rows.pop((row.number, i), None)
            self._engine.abort((row.number, i))

    def _finish(self, number, custom_id, status, body, error=None):
        line_id = self.results.line_id(number)
        self._records.append({
            "id": line_id,
            "custom_id": custom_id,
            "response": {
                "status_code": status,
                "request_id": line_id.replace("batch_req_", "req_"),
                "body": body,
            },
            "error": None if error is None else {
                "code": error_code(error), "message": str(error),
            },
        })  # fmt: skip

    def _write(self):
        self.results.append(self._records)
        self.summary.num_done += len(self._records)
        self.summary.num_errors += sum(r["error"] is not None for r in self._records)
        self._records = []


def _lines(path):
    """(number from 1, bytes) of the lines that are not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _identify(path, model):
    """(12 hex digits for this input and model, number of lines that are not blank)."""
    digest, count = hashlib.sha256(model.encode()), 0
    try:
        for _, line in _lines(path):
            digest.update(line.rstrip(b"\r\n") + b"\n")
            count += 1
    except OSError as error:
        raise RaddleIOError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:12], count


def _parse_line(data):
    """(custom_id or None, the line's object with its envelope checked, or a RequestError)."""
    custom_id = None
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise RequestError("line: expected a JSON object", code="invalid_json")
        if isinstance(content.get("custom_id"), str):
            custom_id = content["custom_id"]
        _check_line(content)
        return custom_id, content
    except RequestError as error:
        return custom_id, error
    except (ValueError, RecursionError) as error:
        return None, RequestError(f"line: not JSON: {error}", code="invalid_json")


def _check_line(content):
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"custom_id: expected a string, got {custom_id!r}", param="custom_id")
    for name in ("method", "url", "body"):
        if name not in content:
            raise RequestError(f"{name}: is missing", param=name)
    if content["method"] != "POST":
        raise RequestError(f'method: expected "POST", got {content["method"]!r}', param="method")
    unknown = sorted(content.keys() - _LINE_FIELDS)
    if unknown:
        raise RequestError(f"{unknown[0]}: unknown field", param=unknown[0])
