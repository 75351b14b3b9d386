"""Requests of which the scheduler knows lengths and shared prefixes, and no more."""

from .. import _core
from ..errors import ArgumentError

# Of each source at least so many requests are sampled: 1 % of a few hundred long ones would say
# little of them, and they may be most of the work.
SAMPLE_QUOTA = 64


class Requests:
    """Requests and the tree of their prefixes, which is built once, here. Never changes; threads
    may use it at once.

    Arrays are on the host, of any strides, copied. input_lengths, output_lengths, max_tokens and
    sources: int32 or int64 [num_requests]; weights: float32 [num_requests]. input_lengths: tokens
    of the prompt, 1 or more. output_lengths: tokens of the answer, 1 or more, -1 (or None for all)
    where it is not known. max_tokens: the most that it may have; default: the longest known output
    of its source, or 2^20 where its own is not known. sources: which data set a request comes from,
    from 0 on (default: one): requests of a source are thought to be alike. weights: of the user,
    above 0 (default 1).

    What is shared comes as hash_ids (uint64 or int64 [indptr[-1]]: an id for each full block of
    block_size tokens, from the first on, at most input_length // block_size of a request; equal
    where the blocks are equal) or as tokens (int32 or int64 [indptr[-1]]; indptr has the lengths,
    input_lengths is None), with indptr int32 or int64 [num_requests + 1]; without either, nothing
    is shared. custom_ids, source_names: names for requests and sources, kept for the caller.

    Raises ShapeError and DTypeError for arrays that do not fit, ArgumentError for a value that
    cannot be (it names the request).
    """

    def __init__(
        self,
        *,
        block_size,
        input_lengths=None,
        output_lengths=None,
        max_tokens=None,
        sources=None,
        weights=None,
        hash_ids=None,
        indptr=None,
        tokens=None,
        custom_ids=None,
        source_names=None,
    ):
        self._core = _core.BlendRequests(
            block_size=block_size,
            input_lengths=input_lengths,
            output_lengths=output_lengths,
            max_tokens=max_tokens,
            sources=sources,
            weights=weights,
            hash_ids=hash_ids,
            indptr=indptr,
            tokens=tokens,
        )
        self.custom_ids = _names("custom_ids", custom_ids, self.num_requests)
        self.source_names = _names("source_names", source_names, None)

    @classmethod
    def from_trace(cls, path, block_size=512):
        """Read a trace: a JSON object a line, as Mooncake's (FAST 2025) are.

        Fields: input_length; output_length (absent, null or -1: unknown); hash_ids, prefix-unique
        ids, one for each full block of block_size tokens, a last one for what is left of the prompt
        may follow and is not used (fewer, or none: what has no id is the request's own); source, a
        text or a number. Other fields, such as timestamp, are not read: offline, all requests are
        there. Raises RaddleIOError when the file cannot be read, ArgumentError with file and line
        for a line that is malformed.
        """
        from .files import read_trace

        return cls(block_size=block_size, **read_trace(path, block_size))

    @classmethod
    def from_openai(cls, path, tokenizer, *, block_size=16, context=None):
        """Read a file of OpenAI batch requests, one request for each prompt and answer (n).

        tokenizer: a raddle.engine.Tokenizer, or the folder of one. The answers are not there yet:
        max_tokens is taken as the output length. context: the most tokens of prompt and answer,
        which bounds max_tokens and stands for it where a line has none. custom_ids has the name of
        each request's line. Raises as from_trace; UnsupportedError when the tokenizers library is
        not installed.
        """
        from .files import read_openai

        return cls(block_size=block_size, **read_openai(path, tokenizer, context))

    @property
    def num_requests(self):
        return self._core.num_requests

    @property
    def num_sources(self):
        """The largest source and 1."""
        return self._core.num_sources

    @property
    def block_size(self):
        """Tokens of a block."""
        return self._core.block_size

    @property
    def num_blocks(self):
        """Blocks of all prompts that have an id."""
        return self._core.num_blocks

    @property
    def distinct_blocks(self):
        """Blocks that are left to compute when none is computed twice."""
        return self._core.distinct_blocks

    @property
    def prompt_tokens(self):
        """Tokens of all prompts."""
        return self._core.prompt_tokens

    @property
    def shared_tokens(self):
        """Tokens of prompts that need not be computed, when nothing is computed twice."""
        return (self.num_blocks - self.distinct_blocks) * self.block_size

    @property
    def has_unknown(self):
        """Whether an output length is not known."""
        return self._core.has_unknown

    @property
    def tree_seconds(self):
        """That building the tree took, on this machine."""
        return self._core.build_seconds

    @property
    def output_lengths(self):
        """int32 ndarray [num_requests], -1 where it is not known."""
        return self._core.output_lengths().numpy()

    def sample(self, rate, *, quota=SAMPLE_QUOTA, seed=0):
        """Requests to run first, so that their outputs are seen: int32 ndarray [..], ascending.

        Of each source the share rate (0 to 1) or quota requests, whichever is more. The same for
        the same seed. Raises ArgumentError.
        """
        return self._core.sample(rate, quota, seed).numpy()

    def guess(self, seen, so_far):
        """What is thought of outputs while they are written: int32 ndarray [num_requests].

        seen: int32 or int64 [num_requests], lengths, -1 where it was not seen. so_far: likewise,
        the tokens that a request has given that was not seen to end; fewer than max_tokens. Those
        of a source are thought to be alike, and more so those that share a prefix; lengths follow
        the survival curve of a source, so that those that end early do not make them short. Raises
        ShapeError, DTypeError and ArgumentError.
        """
        return _core.blend_guess(self._core, seen, so_far).numpy()


def _names(argument, names, count):
    names = None if names is None else list(names)
    if names is not None and count is not None and len(names) != count:
        raise ArgumentError(f"{argument}: expected {count} names, got {len(names)}")
    return names
