"""What a prompt may be: a text, token ids, or chat messages."""

from ..errors import ArgumentError, CapacityError, UnsupportedError


def check_request(engine, prompt, params):
    """The token ids of a prompt that an engine can answer, or its ArgumentError, CapacityError or
    UnsupportedError."""
    tokens = tokenize(prompt, engine.tokenizer, engine.config.vocab_size)
    if len(tokens) >= engine.max_model_len:
        raise CapacityError(
            f"prompt: {len(tokens)} tokens do not fit the context of {engine.max_model_len} "
            "tokens with room for an answer; shorten it"
        )
    if params.n > engine.max_batch:
        raise CapacityError(f"n: {params.n} is more than max_batch, {engine.max_batch}")
    if engine.tokenizer is None and params.stop:
        raise UnsupportedError("stop: an engine without tokenizer knows no texts")
    return tokens


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
                f"prompt: expected token ids, got {token!r} at position {i} (they are from 0 to "
                f"{vocab_size - 1})"
            )
    return list(ids)


def _need(tokenizer):
    if tokenizer is None:
        raise UnsupportedError("prompt: an engine without tokenizer takes token ids only")
    return tokenizer
