"""Files of requests as arrays: traces, and OpenAI's batch format.

Every error names the file and the line.
"""

import json
from array import array

from ..errors import ArgumentError, RaddleError, RaddleIOError

INT32_MAX = 2**31 - 1


def lines_of(path):
    """(number from 1, bytes) of the lines that are not blank; RaddleIOError."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise RaddleIOError(f"{path}: cannot be read: {error.strerror}") from None


def kind_of(path):
    """ "trace" or "openai", by the first line; ArgumentError when it is neither."""
    for number, line in lines_of(path):
        content = _object(path, number, line)
        if "input_length" in content:
            return "trace"
        if "custom_id" in content or "body" in content:
            return "openai"
        raise ArgumentError(
            f"{path}:{number}: neither a trace (input_length) nor a batch request (custom_id, body)"
        )
    raise ArgumentError(f"{path}: holds no request; expected a JSON object a line")


def _object(path, number, line):
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are kinds of it
        raise ArgumentError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ArgumentError(f"{path}:{number}: expected a JSON object, got {kind}")
    return content


# -- traces -------------------------------------------------------------------------------------


def read_trace(path, block_size):
    """The arrays of a trace, as Requests takes them."""
    import numpy

    if type(block_size) is not int or block_size < 1:
        raise ArgumentError(f"block_size: expected an integer of 1 or more, got {block_size!r}")
    inputs, outputs, sources, indptr = array("q"), array("q"), array("q"), array("q", [0])
    ids, numbers = array("Q"), {}
    for line_number, line in lines_of(path):
        content = _object(path, line_number, line)
        try:
            length = _integer(content, "input_length", 1, INT32_MAX - 1)
            output = _output_length(content, INT32_MAX - length)
            _append_ids(ids, content, length, block_size)
            sources.append(_source_number(content, numbers))
        except ArgumentError as error:
            raise ArgumentError(f"{path}:{line_number}: {error}") from None
        inputs.append(length)
        outputs.append(output)
        indptr.append(len(ids))
    return dict(
        input_lengths=numpy.asarray(inputs),
        output_lengths=numpy.asarray(outputs),
        sources=numpy.asarray(sources),
        hash_ids=numpy.asarray(ids),
        indptr=numpy.asarray(indptr),
        source_names=list(numbers),
    )


def _integer(content, name, least, most):
    value = content.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ArgumentError(f"{name}: expected an integer from {least} to {most}, got {value!r}")
    return value


def _output_length(content, most):
    if content.get("output_length") in (None, -1):
        return -1
    return _integer(content, "output_length", 1, most)


def _append_ids(ids, content, length, block_size):
    """Those of full blocks."""
    own = content.get("hash_ids") or []
    most = -(-length // block_size)
    if not isinstance(own, list) or len(own) > most:
        what = f"{len(own)} of them" if isinstance(own, list) else repr(own)
        raise ArgumentError(
            f"hash_ids: expected a list of at most {most} ids for {length} tokens in blocks of "
            f"{block_size}, got {what} (is block_size that of the trace?)"
        )
    before = len(ids)
    try:
        ids.extend(own[: length // block_size])
    except (TypeError, OverflowError):
        del ids[before:]
        raise ArgumentError("hash_ids: expected integers from 0 to 2^64 - 1") from None


def _source_number(content, numbers):
    source = content.get("source")
    if source is not None and type(source) not in (str, int):
        raise ArgumentError(f"source: expected a text or a number, got {source!r}")
    return numbers.setdefault(source, len(numbers))


# -- OpenAI's batch format ----------------------------------------------------------------------


def read_openai(path, tokenizer, context):
    """The arrays of a batch file, as Requests takes them."""
    import numpy

    from ..engine.tokenizer import Tokenizer

    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer(tokenizer)
    tokens, indptr, most, custom_ids = array("i"), array("q", [0]), array("q"), []
    seen = {}
    for number, line in lines_of(path):
        content = _object(path, number, line)
        try:
            custom_id = _custom_id(content, seen, number)
            for prompt, room, count in _prompts(content, tokenizer, context):
                for _ in range(count):
                    tokens.extend(prompt)
                    indptr.append(len(tokens))
                    most.append(room)
                    custom_ids.append(custom_id)
        except RaddleError as error:
            raise ArgumentError(f"{path}:{number}: {error}") from None
    return dict(
        tokens=numpy.asarray(tokens),
        indptr=numpy.asarray(indptr),
        output_lengths=numpy.asarray(most),
        max_tokens=numpy.asarray(most),
        custom_ids=custom_ids,
    )


def _custom_id(content, seen, number):
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ArgumentError(f"custom_id: expected a text, got {custom_id!r}")
    if custom_id in seen:
        raise ArgumentError(f"custom_id: {custom_id!r} is also that of line {seen[custom_id]}")
    seen[custom_id] = number
    return custom_id


def _prompts(content, tokenizer, context):
    """(token ids, the most that its answers may have, how many answers) of each prompt."""
    from ..engine.openai import parse_body
    from ..engine.prompt import tokenize

    body = content.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    parsed = parse_body(content.get("url"), body, [model], {})  # any model: none is run
    for prompt in parsed.prompts:
        ids = tokenize(prompt, tokenizer, tokenizer.vocab_size)
        room = INT32_MAX - len(ids) if context is None else context - len(ids)
        if room < 1:
            raise ArgumentError(
                f"prompt: {len(ids)} tokens leave no room in a context of {context}"
            )
        wanted = parsed.params.max_tokens
        if wanted is None and context is None:
            raise ArgumentError("max_tokens: is missing; give it, or the context that bounds it")
        yield ids, room if wanted is None else min(wanted, room), parsed.params.n
