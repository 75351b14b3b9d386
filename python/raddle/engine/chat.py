"""Chat messages to a prompt, by the model folder's own Jinja template, in a sandbox.

Templates come with models from anywhere: they run in Jinja's immutable sandbox, which lets them
neither reach into Python objects nor change what they are given. What templates expect to find
(filters, functions, block trimming, break and continue) follows transformers.
"""

import json
from pathlib import Path

from ..errors import ArgumentError, RaddleIOError, UnsupportedError
from .config import read_json
from .tokenizer import need

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ChatTemplate:
    """A compiled template. tokens: {"bos_token": text, ..}, which templates refer to."""

    def __init__(self, source, tokens=None, name="chat_template"):
        self._name = name
        self._tokens = tokens or {}
        self._jinja2 = need("jinja2")
        try:
            self._template = self._environment().from_string(source)
        except self._jinja2.TemplateError as error:
            raise RaddleIOError(f"{name}: no Jinja template: {error}") from None

    @classmethod
    def from_folder(cls, folder, tokenizer_config):
        """chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        source = tokenizer_config.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            path = folder / "chat_template.jinja"
            source = path.read_text(encoding="utf-8")
        elif (folder / "chat_template.json").exists():
            path = folder / "chat_template.json"
            source = read_json(path).get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise UnsupportedError(
                f"{folder}: no chat_template: this model takes prompts (/v1/completions) only"
            )
        return cls(source, _special_tokens(folder, tokenizer_config), str(path))

    def render(self, messages, add_generation_prompt=True):
        """The prompt text of [{"role": .., "content": ..}, ..]. ArgumentError when the template
        refuses them, or fails."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except _Refused as error:
            raise ArgumentError(f"messages: the model's chat template says: {error}") from None
        except (
            self._jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ArgumentError(f"messages: {self._name} failed: {error}") from None

    def _environment(self):
        sandbox = need("jinja2.sandbox")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_tag(self._jinja2)],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment


class _Refused(Exception):
    """What a template's raise_exception raises."""


def _raise_exception(message):
    raise _Refused(message)


def _strftime_now(form):
    from datetime import datetime

    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _generation_tag(jinja2):
    """{% generation %}..{% endgeneration %} marks what an assistant said, for training; here it is
    only its content."""
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _special_tokens(folder, tokenizer_config):
    path = folder / "special_tokens_map.json"
    found = {**(read_json(path) if path.exists() else {}), **tokenizer_config}
    tokens = {}
    for name in _TOKEN_NAMES:
        value = found.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens
