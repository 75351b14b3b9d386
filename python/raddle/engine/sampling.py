"""How a request wants its tokens drawn, and where it wants to stop."""

from dataclasses import dataclass

from ..errors import ArgumentError

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_N = 128
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of the n answers to one prompt


@dataclass(frozen=True)
class SamplingParams:
    """Checked when made; ArgumentError names the field.

    max_tokens: most tokens to write, None for as many as the context holds. temperature: 0 is
    greedy. top_k: 0 keeps all. seed: an int64; None draws one. n: answers to one prompt. stop:
    texts that end an answer and are not part of it. stop_token_ids: likewise tokens, beside the
    model's own end, which ignore_eos turns off. logprobs: None, or how many of the likeliest tokens
    come with each token's own log-probability. stream: outputs arrive as they are made, else one
    output at the end.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple = ()
    stop_token_ids: tuple = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    stream: bool = True

    def __post_init__(self):
        if self.max_tokens is not None:
            self._integer("max_tokens", 1)
        self._number("temperature", 0, 100)
        self._integer("top_k", 0)
        self._number("top_p", 0, 1)
        if self.top_p == 0:
            raise ArgumentError("top_p: expected a number above 0, got 0 (1 keeps all)")
        self._number("min_p", 0, 1)
        if self.seed is not None:
            self._integer("seed", -(1 << 63), (1 << 63) - 1)
        self._integer("n", 1, MAX_N)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "stream"):
            if type(getattr(self, name)) is not bool:
                raise ArgumentError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) and s for s in stop):
            raise ArgumentError(f"stop: expected a text or a list of them, got {self.stop!r}")
        ids = self.stop_token_ids
        if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
            raise ArgumentError(f"stop_token_ids: expected a list of token ids, got {ids!r}")
        if len(stop) > MAX_STOPS:
            raise ArgumentError(f"stop: at most {MAX_STOPS} texts, got {len(stop)}")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _integer(self, name, low, high=(1 << 31) - 1):
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise ArgumentError(f"{name}: expected an integer from {low} to {high}, got {value!r}")

    def _number(self, name, low, high):
        value = getattr(self, name)
        if type(value) not in (int, float) or not low <= value <= high:  # which no NaN is
            raise ArgumentError(f"{name}: expected a number from {low} to {high}, got {value!r}")


def seed_of_answer(seed, index):
    """The seed of one of the n answers to a prompt: an int64."""
    value = (seed + index * _GOLDEN) & ((1 << 64) - 1)
    return value - (1 << 64) if value >> 63 else value


class StopStrings:
    """Finds stop texts in a stream of text pieces, wherever the pieces are cut."""

    def __init__(self, stops):
        self._stops = stops
        self._held = ""
        self.matched = None

    def feed(self, piece):
        """The text that can be shown now; `matched` is set once a stop is found, and ends it.

        A tail that could be the beginning of a stop is held back.
        """
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self):
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text, stop):
    """Length of the longest end of text that is a beginning of stop, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class SamplingTable:
    """The sampling settings of every slot, as arrays that a step gathers from."""

    def __init__(self, max_slots):
        import numpy as np

        self.temperature = np.ones(max_slots, np.float32)
        self.top_p = np.ones(max_slots, np.float32)
        self.min_p = np.zeros(max_slots, np.float32)
        self.top_k = np.zeros(max_slots, np.int32)
        self.seed = np.zeros(max_slots, np.int64)
        self.num_drawn = np.zeros(max_slots, np.int64)
        self._gathered = None, None  # slots, settings

    def set(self, slot, params, seed, num_drawn):
        """A sequence moves into a slot, with so many tokens of its answer drawn before."""
        self.num_drawn[slot] = num_drawn
        self._gathered = None, None
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = params.top_k
        self.seed[slot] = seed

    def draw(self, logits, slots, out=None):
        """A token for each row of logits, row i being that of slots[i]: int32 [n] where logits are,
        in out if given; on a GPU once it gets there.

        -1 for a row that is no distribution, which a model makes that overflows.
        """
        import numpy as np

        offsets = self.num_drawn[slots]
        self.num_drawn[slots] = offsets + 1
        try:
            return self._sample(logits, self._settings(slots), offsets, out)
        except ArgumentError:  # the CPU refuses all rows for one; a GPU says -1
            host = to_host(logits)
            good = (host.max(axis=1) > -np.inf).nonzero()[0]  # false for NaN too
            if len(good) == len(slots):
                raise
        ids = np.empty(len(slots), np.int32) if out is None else out.numpy()
        ids[:] = -1
        if len(good):
            ids[good] = to_host(
                self._sample(host[good], self._settings(slots[good]), offsets[good], None)
            )
        return ids

    def _settings(self, slots):
        """The settings of slots, gathered again only when it is another array, or one changed."""
        if self._gathered[0] is not slots:
            names = ("temperature", "top_k", "top_p", "min_p", "seed")
            self._gathered = slots, {name: getattr(self, name)[slots] for name in names}
        return self._gathered[1]

    @staticmethod
    def _sample(logits, settings, offsets, out):
        from .. import ops

        return ops.sample(logits, offset=offsets, out=out, **settings)


@dataclass(slots=True)
class TokenLogprob:
    """A sampled token's log-probability, and those of the likeliest tokens, best first."""

    token_id: int
    logprob: float
    top: list  # of (token id, logprob)


def draw_logprobs(logits, ids, wanted):
    """{row: TokenLogprob} of the rows whose wanted[row] is a number of tokens, not None."""
    import numpy as np

    from .. import ops

    tops = {i: top for i, top in enumerate(wanted) if top is not None and ids[i] >= 0}
    if not tops:
        return {}
    rows = np.array(list(tops), np.int32)
    picked = np.array(ids, np.int32)[rows]
    if len(rows) < len(ids):
        logits = ops.embedding(_beside(logits, rows), logits)  # a gather of rows
    parts = ops.token_logprobs(logits, _beside(logits, picked), top=max(tops.values()))
    own, top_ids, top_logprobs = (to_host(part).tolist() for part in parts)
    return {
        row: TokenLogprob(int(picked[i]), own[i], list(zip(top_ids[i], top_logprobs[i]))[:top])
        for i, (row, top) in enumerate(tops.items())
    }


def _beside(logits, array):
    """An array where logits are."""
    from .. import tensor

    return array if logits.device == "cpu" else tensor(array, device=logits.device)


def to_host(tensor):
    """A NumPy array of a tensor on any device."""
    if not hasattr(tensor, "numpy"):
        return tensor
    return (tensor if tensor.device == "cpu" else tensor.to("cpu")).numpy()
