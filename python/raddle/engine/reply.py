"""From sampled tokens to what a caller sees: text, log-probabilities, the reason of the end."""

from dataclasses import dataclass, field

from .sampling import StopStrings


@dataclass(slots=True)
class Output:
    """News of one answer. What is `new` since the last Output, or all of it with stream=False.

    finish_reason: None while it goes on; "stop" (the model's end, or a stop of the request's own,
    which stop_reason then names), "length" (max_tokens, or the context is full) or "error" (the
    model gave no number to choose by). The token that ends an answer is in token_ids, not in text.
    """

    request_id: object
    index: int
    text: str = ""
    token_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: object = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache


class Reply:
    """The text side of one Sequence."""

    def __init__(self, request_id, params, tokenizer, end_ids):
        self._params, self._tokenizer = params, tokenizer
        self._request_id = request_id
        own_ends = frozenset(() if params.ignore_eos else end_ids)
        self._ends = own_ends | frozenset(params.stop_token_ids)
        self._own_ends = own_ends
        is_text_followed = tokenizer is not None and (params.stream or params.stop)
        self._detokeniser = (
            tokenizer.stream(params.skip_special_tokens) if is_text_followed else None
        )
        self._stops = StopStrings(params.stop) if params.stop else None
        # Whether most of its tokens need nothing but to be kept.
        self.is_quiet = not (is_text_followed or params.stream or params.logprobs is not None)
        self._num_seen = 0  # output tokens that advance() was told of; quiet ones count themselves
        self._pieces = []
        self._first = 0  # of the output tokens that the next Output tells
        self._logprobs = []
        self._stop_reason = None

    def ends_with(self, token, sequence):
        """Whether this newest token is the answer's last."""
        return token in self._ends or len(sequence.tokens) >= sequence.max_length

    def advance(self, sequence, logprob=None):
        """The sequence has one more token. Sets its finish_reason when that was the last one."""
        token = sequence.tokens[-1]
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self._own_ends:
            sequence.finish_reason = "stop"
        elif token in self._ends:
            sequence.finish_reason, self._stop_reason = "stop", token
        elif len(sequence.tokens) >= sequence.max_length:
            sequence.finish_reason = "length"
        if self._detokeniser is not None:
            self._add_text(sequence, token)
        self._num_seen += 1

    def forget_unseen(self, sequence):
        """Drop a token that a broken-off step added and advance() did not hear of: it will be
        drawn again, and be the same."""
        if not self.is_quiet:
            del sequence.tokens[sequence.num_prompt + self._num_seen :]
        elif len(sequence.tokens) > sequence.num_prompt and self.ends_with(
            sequence.tokens[-1], sequence
        ):
            sequence.tokens.pop()

    def output(self, sequence):
        """The next Output, or None when there is nothing to tell yet."""
        is_finished = sequence.finish_reason is not None
        if not (is_finished or self._params.stream):
            return None
        begin = sequence.num_prompt + self._first
        token_ids = sequence.tokens[begin:]
        self._first += len(token_ids)
        if self._detokeniser is not None or self._tokenizer is None:
            text = "".join(self._pieces)
        else:
            ends = sequence.finish_reason == "stop"
            text = self._tokenizer.decode(
                token_ids[:-1] if ends else token_ids, self._params.skip_special_tokens
            )
        output = Output(
            self._request_id,
            sequence.index,
            text,
            token_ids,
            self._logprobs,
            sequence.finish_reason,
            self._stop_reason,
            sequence.num_prompt,
            sequence.num_cached_tokens,
        )
        self._pieces, self._logprobs = [], []
        return output

    def _add_text(self, sequence, token):
        ends_by_token = sequence.finish_reason == "stop"
        piece = "" if ends_by_token else self._detokeniser.feed(token)
        if sequence.finish_reason:
            piece += self._detokeniser.flush()
        if self._stops is not None:
            piece = self._stops.feed(piece)
            if self._stops.matched is not None:
                sequence.finish_reason, self._stop_reason = "stop", self._stops.matched
            elif sequence.finish_reason:
                piece += self._stops.flush()
        self._pieces.append(piece)
