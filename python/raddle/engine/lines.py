"""The lines of a batch file: all read once for what a plan needs, each again when its turn comes.

What is kept of a line is where it begins, digests, lengths of prompts and hashes of their blocks,
so that memory does not grow with what lines hold: some seventy bytes a line with one prompt, and
eight for each page of it. Prompts are tokenised in that pass and again when they are answered: that
is cheap beside the model, and token ids of millions of lines are not to be kept.
"""

import hashlib
import json
from array import array
from pathlib import Path

from ..errors import RaddleError, RaddleIOError
from .openai import RequestError, parse_body
from .prefix import block_digest
from .prompt import check_request

# States of a line.
WAITS, HAS_RESULT, IS_BAD = 0, 1, 2

_LINE_FIELDS = {"custom_id", "method", "url", "body"}


class Lines:
    """Lines of a file that are not blank; arrays have one number for each.

    A request is one answer to one prompt: those of line i are request_begin[i] up to
    request_begin[i + 1], prompt after prompt; those of bad lines are never run.
    """

    def __init__(self, path, engine, model_names):
        self.path = Path(path)
        self._engine, self._model_names = engine, model_names
        self._hash = hashlib.blake2b(f"{model_names[0]} {engine.config}".encode(), digest_size=8)
        self.numbers, self.digests, self.states = array("q"), array("Q"), array("b")
        self._offsets, self._names = array("q"), array("Q")
        self.request_begin = array("q", [0])
        self.input_lengths, self.max_tokens = array("i"), array("i")
        self._hash_ids, self._hash_begin = array("Q"), array("q", [0])
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise RaddleIOError(f"{self.path}: cannot be read: {error.strerror}") from None

    def scan(self, done):
        """The pass over the file; once, before all else.

        done: {line number: digest} of lines with results; those that are found are taken out of it.
        """
        offset = 0
        for number, data in enumerate(self._file, 1):
            if data.strip():
                self._note(number, offset, data, done)
            offset += len(data)
        self._first = self._find_duplicates()  # number of the line with the same custom_id, or 0

    def __len__(self):
        return len(self.numbers)

    def close(self):
        self._file.close()

    def read(self, i):
        """(custom_id or None, its object with the envelope checked or a RequestError) of line i."""
        self._file.seek(self._offsets[i])
        data = self._file.readline()
        if self._digest(data) != self.digests[i]:
            raise RaddleIOError(
                f"{self.path}: line {self.numbers[i]} has changed since the job began; leave the "
                "file as it is while a job runs"
            )
        custom_id, content = _parse_line(data)
        if self._first[i]:
            content = RequestError(
                f"custom_id: {custom_id!r} is also that of line {self._first[i]}",
                param="custom_id",
                code="duplicate_custom_id",
            )
        return custom_id, content

    def parse(self, content):
        """The ParsedBody of what read() gave; RequestError."""
        if isinstance(content, RequestError):
            raise content
        defaults = self._engine.config.sampling_defaults
        return parse_body(content["url"], content["body"], self._model_names, defaults)

    def bad(self):
        """(line number, error) of the lines that are errors before a model has seen them."""
        for i in range(len(self)):
            if self.states[i] == IS_BAD:
                try:
                    parsed = self.parse(self.read(i)[1])
                    for prompt in parsed.prompts:
                        check_request(self._engine, prompt, parsed.params)
                except RaddleError as error:
                    yield self.numbers[i], error

    def requests(self):
        """The requests as arguments of raddle.blend.Requests; NumPy's views, not copies."""
        import numpy as np

        return {
            "block_size": self._engine.cache.page_size,
            "input_lengths": np.asarray(self.input_lengths),
            "max_tokens": np.asarray(self.max_tokens),
            "hash_ids": np.asarray(self._hash_ids),
            "indptr": np.asarray(self._hash_begin),
        }

    # ---- the pass

    def _note(self, number, offset, data, done):
        digest = self._digest(data)
        custom_id, content = _parse_line(data)
        state = WAITS
        if done.get(number) == digest:
            del done[number]
            state = HAS_RESULT
        else:
            try:
                self._note_prompts(self.parse(content))
            except RaddleError:
                state = IS_BAD
        self.numbers.append(number)
        self._offsets.append(offset)
        self.digests.append(digest)
        self._names.append(_digest_of(custom_id) if custom_id is not None else 0)
        self.states.append(state)
        self.request_begin.append(len(self.input_lengths))

    def _note_prompts(self, parsed):
        engine, params = self._engine, parsed.params
        # All are checked before one is noted: a line is answered as a whole.
        prompts = [check_request(engine, prompt, params) for prompt in parsed.prompts]
        for tokens in prompts:
            hashes = _block_hashes(tokens, engine.cache.page_size)
            room = engine.max_model_len - len(tokens)
            most = room if params.max_tokens is None else min(room, params.max_tokens)
            for _ in range(params.n):
                self.input_lengths.append(len(tokens))
                self.max_tokens.append(most)
                self._hash_ids.extend(hashes)
                self._hash_begin.append(len(self._hash_ids))

    def _digest(self, data):
        """Of a line's content and the model that answers it."""
        digest = self._hash.copy()
        digest.update(data.rstrip(b"\r\n"))
        return int.from_bytes(digest.digest(), "little")

    def _find_duplicates(self):
        """Marks lines with the custom_id of an earlier one as bad; names are 64-bit digests, which
        are equal by chance in one of ten million files of a million lines."""
        import numpy as np

        names = np.asarray(self._names)
        order = np.argsort(names, kind="stable")
        ordered = names[order]
        is_new = np.ones(len(names), bool)
        is_new[1:] = ordered[1:] != ordered[:-1]
        begin = np.maximum.accumulate(np.where(is_new, np.arange(len(names)), 0))
        first = np.zeros(len(names), np.int64)
        repeats = ~is_new & (ordered != 0)
        first[order[repeats]] = np.asarray(self.numbers)[order[begin[repeats]]]
        states = np.asarray(self.states)
        states[(first != 0) & (states == WAITS)] = IS_BAD
        return first


def _digest_of(text):
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _block_hashes(tokens, block_size):
    """Those of the full blocks, as the prefix cache knows them, shortened."""
    hashes, digest = array("Q"), b""
    for end in range(block_size, len(tokens) + 1, block_size):
        digest = block_digest(digest, tokens[end - block_size : end])
        hashes.append(int.from_bytes(digest[:8], "little"))
    return hashes


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
