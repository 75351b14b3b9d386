"""OpenAI's request and response bodies: /v1/completions and /v1/chat/completions.

A field that the engine does not act on is accepted only with the value that asks for nothing, or
where it is a label that no answer depends on; anything else is an error that names it. Beyond
OpenAI's own, these fields are known: top_k, min_p, stop_token_ids, ignore_eos, skip_special_tokens.

usage has no prompt_tokens_details.cached_tokens: what a prompt found in the prefix cache depends on
what ran before it, and the rows of a job that was resumed are those of one that was not. The sum is
in the job's Summary, and each number in Output.num_cached_tokens.
"""

from dataclasses import dataclass

from ..errors import ArgumentError, RaddleError, UnsupportedError
from .sampling import SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
URLS = (COMPLETIONS, CHAT)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids",
             "ignore_eos", "skip_special_tokens")  # fmt: skip
_LABELS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
_NOTHING = {  # field -> values that ask for nothing
    "stream": (False,),
    "stream_options": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
_NOTHING_COMPLETIONS = {"echo": (False,), "suffix": ("",)}
_NOTHING_CHAT = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "verbosity": (),
}


class RequestError(RaddleError):
    """A request that is answered by an error row."""

    def __init__(self, message, *, status=400, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass
class ParsedBody:
    """One body: `prompts` (texts, lists of token ids, or one list of messages), params for each."""

    url: str
    model: str
    prompts: list
    params: SamplingParams


def parse_body(url, body, model_names, defaults):
    """A ParsedBody; RequestError for what is wrong with it.

    model_names: that a request may name. defaults: values of sampling fields that are absent.
    """
    if url not in URLS:
        raise RequestError(
            f"url: {url!r} is not served; expected one of {', '.join(URLS)}",
            status=404,
            param="url",
            code="unknown_url",
        )
    if not isinstance(body, dict):
        raise RequestError(f"body: expected an object, got {_kind(body)}", param="body")
    fields = {name: value for name, value in body.items() if value is not None}
    model = _model(fields, model_names)
    is_chat = url == CHAT
    settings = {name: defaults[name] for name in defaults}
    settings.update({name: fields.pop(name) for name in _SAMPLING if name in fields})
    if is_chat:
        prompts = [_messages(fields.pop("messages", None))]
        settings["max_tokens"] = _chat_max_tokens(fields)
        settings["logprobs"] = _chat_logprobs(fields)
    else:
        prompts = _prompts(fields.pop("prompt", None))
        settings["max_tokens"] = fields.pop("max_tokens", 16)
        settings["logprobs"] = fields.pop("logprobs", None)
        best_of, n = fields.pop("best_of", None), settings.get("n", 1)
        if best_of is not None and best_of != n:
            raise RequestError(f"best_of: {best_of!r}, but n is {n!r}; only n answers are made",
                               param="best_of")  # fmt: skip
    _refuse_unknown(fields, _NOTHING | (_NOTHING_CHAT if is_chat else _NOTHING_COMPLETIONS))
    if settings.get("top_p") == 0:
        settings["top_p"] = 1e-6  # only the likeliest token passes
    try:
        params = SamplingParams(**settings, stream=False)
    except ArgumentError as error:
        raise RequestError(str(error), param=str(error).split(":")[0]) from None
    return ParsedBody(url, model, prompts, params)


def _kind(value):
    return {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}.get(
        type(value), repr(value)
    )


def _model(fields, model_names):
    model = fields.pop("model", None)
    if not isinstance(model, str):
        raise RequestError(f"model: expected a string, got {_kind(model)}", param="model")
    if model not in model_names:
        raise RequestError(
            f"model: {model!r} is not served; this job serves {', '.join(model_names)} "
            f"(--served-model-name {model!r} would add it)",
            status=404,
            param="model",
            code="model_not_found",
        )
    return model


def _prompts(prompt):
    """OpenAI's four forms: a text, a list of texts, token ids, a list of lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) for item in prompt):
            return prompt
    raise RequestError(
        f"prompt: expected a string, token ids, or a list of either, got {_kind(prompt)}",
        param="prompt",
    )


def _messages(messages):
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages: expected a list of messages, got {_kind(messages)}",
                           param="messages")  # fmt: skip
    result = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where}: expected an object, got {_kind(message)}",
                               param="messages")  # fmt: skip
        role = message.get("role")
        if not isinstance(role, str):
            raise RequestError(f"{where}.role: expected a string, got {_kind(role)}",
                               param="messages")  # fmt: skip
        extra = [k for k, v in message.items() if k not in ("role", "content", "name") and v]
        if extra:
            raise RequestError(f"{where}.{extra[0]}: not supported", param="messages")
        clean = {"role": role, "content": _content(where, message.get("content"))}
        if isinstance(message.get("name"), str):
            clean["name"] = message["name"]
        result.append(clean)
    return result


def _content(where, content):
    """A text, or text parts joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"{where}.content: only text parts are supported, got "
                                   f"{kind or part!r}", param="messages")  # fmt: skip
        return "".join(part["text"] for part in content)
    raise RequestError(f"{where}.content: expected a string, got {_kind(content)}",
                       param="messages")  # fmt: skip


def _chat_max_tokens(fields):
    old, new = fields.pop("max_tokens", None), fields.pop("max_completion_tokens", None)
    if old is not None and new is not None and old != new:
        raise RequestError(f"max_tokens: {old!r}, but max_completion_tokens is {new!r}; give one",
                           param="max_tokens")  # fmt: skip
    return old if new is None else new


def _chat_logprobs(fields):
    wanted, top = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    if type(wanted) is not bool:
        raise RequestError(f"logprobs: expected true or false, got {wanted!r}", param="logprobs")
    if not wanted and top:
        raise RequestError("top_logprobs: needs logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None


def _refuse_unknown(fields, nothing):
    for name, value in fields.items():
        if name in _LABELS or (name in nothing and value in nothing[name]):
            continue
        what = f"{value!r} is not supported" if name in nothing else "unknown field"
        raise RequestError(f"{name}: {what}", param=name, code="unsupported_field")


# ---- responses


def error_body(error):
    """The body of an error row."""
    return {
        "error": {
            "message": str(error),
            "type": "server_error" if error_status(error) >= 500 else "invalid_request_error",
            "param": getattr(error, "param", None),
            "code": error_code(error),
        }
    }


def error_status(error):
    return getattr(error, "status", 400)


def error_code(error):
    code = getattr(error, "code", None)
    return code or ("unsupported" if isinstance(error, UnsupportedError) else "invalid_request")


def response_body(parsed, answers, tokenizer, response_id, created):
    """answers: for each prompt, its list of Outputs."""
    is_chat = parsed.url == CHAT
    outputs = [output for group in answers for output in group]
    make = _chat_choice if is_chat else _completion_choice
    prompt_tokens = sum(group[0].num_prompt_tokens for group in answers)
    completion_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + response_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": parsed.model,
        "choices": [make(i, output, tokenizer) for i, output in enumerate(outputs)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _shown_logprobs(output):
    """The log-probabilities of the tokens that are part of the text."""
    ends_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    return output.logprobs[:-1] if ends_by_token else output.logprobs


def _json_number(logprob):
    """JSON has no infinity; -9999 is what OpenAI says for a token that cannot be."""
    return max(logprob, -9999.0)


def _token_name(tokenizer, token_id):
    """A token's text; OpenAI's "bytes:.." for a piece of a character, so that names differ."""
    text, data = tokenizer.token_text(token_id)
    is_piece = "\ufffd" in text and text.encode() != data
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if is_piece else text


def _completion_choice(index, output, tokenizer):
    logprobs = None
    if output.logprobs:
        entries = _shown_logprobs(output)
        texts = [_token_name(tokenizer, entry.token_id) for entry in entries]
        offsets = [0]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        logprobs = {
            "tokens": texts,
            "token_logprobs": [_json_number(entry.logprob) for entry in entries],
            "top_logprobs": [
                {_token_name(tokenizer, i): _json_number(value) for i, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets[:-1],
        }
    return {
        "text": output.text,
        "index": index,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }


def _chat_choice(index, output, tokenizer):
    def entry(token_id, logprob):
        text, data = tokenizer.token_text(token_id)
        return {"token": text, "logprob": _json_number(logprob), "bytes": list(data)}

    logprobs = None
    if output.logprobs:
        content = [
            entry(e.token_id, e.logprob) | {"top_logprobs": [entry(*pair) for pair in e.top]}
            for e in _shown_logprobs(output)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
    }
