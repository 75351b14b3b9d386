"""Text to tokens and back, by the tokenizers library.

Turning tokens into text piece by piece must never show half a character. A byte-level vocabulary
(Llama 3, Qwen, tiny-llama) gives bytes per token, which an incremental UTF-8 decoder joins exactly;
for any other kind, the text of a short window of tokens is compared with that of the window before.
"""

import codecs
from pathlib import Path

from ..errors import ArgumentError, RaddleIOError, UnsupportedError
from .config import read_json

_HELD_TOKENS = 16  # of a window whose text ends in an unfinished character


def need(module):
    """Import a module of the engine extra, or say how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnsupportedError(
            f"{module.split('.')[0]} is not installed: pip install 'raddle[engine]'"
        ) from None


def check_ids(ids, vocab_size):
    """A prompt's token ids as a list; ArgumentError names the first that is none."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, (list, tuple)):
        raise ArgumentError(
            f"prompt: expected a text, token ids or chat messages, got {type(ids).__name__}"
        )
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ArgumentError(
                f"prompt: {token!r} at position {i} is no token id from 0 to {vocab_size - 1}"
            )
    return list(ids)


class Tokenizer:
    """The tokenizer.json of a model folder, with the chat template beside it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise RaddleIOError(
                f"{path}: no such file; save the model's fast tokenizer into the folder"
            )
        library = need("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise RaddleIOError(f"{path}: no tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config_path = self.folder / "tokenizer_config.json"
        self.config = read_json(config_path) if config_path.exists() else {}
        self._bytes = _token_bytes(self._tokenizer, read_json(path))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self._template = None

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text, with what the model expects around one (often a BOS)."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:  # lone surrogates, for one
            raise ArgumentError(f"text: cannot be tokenised: {error}") from None

    def decode(self, ids, skip_special_tokens=True):
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id):
        """One token by itself: (text, bytes)."""
        if self._bytes is not None:
            data = self._bytes.get(token_id, b"")
            return data.decode("utf-8", "replace"), data
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text, text.encode()

    def stream(self, skip_special_tokens=True):
        """A new detokeniser: feed(token_id) -> text that is now certain, flush() -> the rest."""
        skip = self._special if skip_special_tokens else frozenset()
        if self._bytes is not None:
            return ByteStream(self._bytes, skip)
        return WindowStream(self._tokenizer, skip)

    @property
    def chat_template(self):
        """The folder's own ChatTemplate; UnsupportedError when it has none."""
        if self._template is None:
            from .chat import ChatTemplate

            self._template = ChatTemplate.from_folder(self.folder, self.config)
        return self._template


class ByteStream:
    """Tokens whose bytes are known."""

    def __init__(self, token_bytes, skip):
        self._token_bytes, self._skip = token_bytes, skip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token_id):
        if token_id in self._skip:
            return ""
        return self._decode(self._token_bytes.get(token_id, b""))

    def flush(self):
        return self._decode(b"", True)


class WindowStream:
    """Tokens of any vocabulary: the new text is what a window of tokens says beyond a shorter one.

    The window starts at a token whose text was complete, so that a decoder which looks at
    neighbours (a space in front of words, bytes that form a character) sees them.
    """

    def __init__(self, tokenizer, skip):
        self._tokenizer, self._skip = tokenizer, skip
        self._ids = []  # the window
        self._shown = 0  # tokens of the window whose text was given out
        self._shown_text = ""

    def feed(self, token_id):
        if token_id in self._skip:
            return ""
        self._ids.append(token_id)
        text = self._text()
        is_unfinished = text.endswith("\ufffd") and len(self._ids) - self._shown < _HELD_TOKENS
        return "" if is_unfinished else self._give_out(text)

    def flush(self):
        return self._give_out(self._text())

    def _text(self):
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def _give_out(self, text):
        piece = text[len(self._shown_text) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self._shown_text = self._text()
        return piece


def _token_bytes(tokenizer, content):
    """{token id: bytes} of a byte-level vocabulary, None for any other."""
    decoder = content.get("decoder") or {}
    if decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    if decoder.get("type") != "ByteLevel":
        return None
    byte_of = _byte_alphabet()
    result = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if all(char in byte_of for char in token):
            result[token_id] = bytes(byte_of[char] for char in token)
        else:
            result[token_id] = token.encode("utf-8", "replace")
    return result


def _byte_alphabet():
    """{character: byte} of byte-level vocabularies: printable Latin-1 is itself, the rest is moved
    to U+0100 and up in order."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(0x100 + i): b for i, b in enumerate(moved)}
