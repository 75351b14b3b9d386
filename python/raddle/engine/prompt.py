"""What a prompt may be: a text, token ids, or chat messages."""

from ..errors import ArgumentError, UnsupportedError


def tokenize(prompt, tokenizer, vocab_size):
    """The token ids of a prompt, checked. tokenizer: a Tokenizer, or None."""
    if isinstance(prompt, str):
        tokens = _need(tokenizer).encode(prompt)
    elif isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict):
        text = _need(tokenizer).chat_template.render(list(prompt))
        tokens = tokenizer.encode(text, add_special_tokens=False)
    else:
        tokens = check_ids(prompt, vocab_size)
    if not tokens:
        raise ArgumentError("prompt: is empty; expected at least one token")
    return tokens


def check_ids(ids, vocab_size):
    """Token ids as a list; ArgumentError names the one that is none."""
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


def _need(tokenizer):
    if tokenizer is None:
        raise UnsupportedError("prompt: an engine without tokenizer takes token ids only")
    return tokenizer
