"""Softmax, sampling, what it leaves of rows, and speculative decoding: this part of raddle.ops.

Tensors, streams and errors as in raddle.ops, which has all of these names.

A probability is held as an integer in units of 2^-40 of its row's largest, and random numbers come
of a counter-based generator (Philox4x32-10, key seed, counter offset): what is drawn is a function
of the row's values and settings, seed and offset alone, the same on the CPU and on CUDA, for any
number of threads and whatever the batch. Rows with one seed and offset share their random number:
give each row, and each step, its own; or set row_streams, which makes the row's number part of the
counter.

Settings are numbers, or sequences or tensors of one for each row. Those on a CUDA device are read
by the kernel as they are (float32, top_k int32, seed and offset int64 or uint64; any stride), so
that a captured graph sees new values; a value out of range acts like the nearest one in range.
"""

from . import _core

__all__ = [
    "mask_logits",
    "renorm_probs",
    "sample",
    "sample_probs",
    "softmax",
    "token_logprobs",
    "verify_draft",
]

_ORDERS = ("top_k_first", "joint")


def softmax(logits, *, temperature=1.0, out=None, dtype=None, stream=None):
    """softmax(logits / temperature) over [n, vocab], as float32.

    temperature > 0: a number, or a float32 tensor [n] on logits' device; on a GPU, where it is not
    looked at, one that is not above 0 gives the limit, all to the largest.

    A row with NaN, or without a logit above -inf, is an ArgumentError on the CPU and NaN on CUDA.
    """
    return _core.ops_softmax(logits, temperature, out, dtype, stream)


def sample(
    logits,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    offset=0,
    indices=None,
    filter_order="top_k_first",
    row_streams=False,
    valid=None,
    out=None,
    dtype=None,
    stream=None,
):
    """Draws one token per row of logits [n, vocab]: int32 [n].

    In this order: temperature (0 takes the first maximum and ignores the rest); min_p keeps tokens
    at least min_p times as likely as the likeliest; top_k (0 or -1: all) keeps the k largest
    logits; top_p keeps the smallest set of the most likely of those left that holds top_p of their
    probability, or with filter_order "joint" of the probability of all tokens. Tokens whose logit
    equals the least one kept are all kept. What is left is renormalised and drawn from by one
    uniform number, by its cumulative sum in vocabulary order.

    indices [m] int32 or int64: token i is drawn from row indices[i], with setting i; the result
    then has indices' dtype. An index out of range is an ArgumentError on the CPU and gives -1 on
    CUDA.

    A row with NaN, or without a logit above -inf, is an ArgumentError on the CPU and gives -1 on
    CUDA; with valid, bool or uint8 like the result, it gives 0, and False in valid, on both.
    """
    return _sample(
        logits,
        False,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        offset,
        indices,
        filter_order,
        row_streams,
        valid,
        out,
        dtype,
        stream,
    )


def sample_probs(
    probs,
    *,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    offset=0,
    indices=None,
    filter_order="top_k_first",
    row_streams=False,
    valid=None,
    out=None,
    dtype=None,
    stream=None,
):
    """sample, from probabilities [n, vocab] of any sum; negative ones count as 0.

    A row with NaN or infinity, or without a probability above 0, cannot be drawn from.
    """
    return _sample(
        probs,
        True,
        1.0,
        top_k,
        top_p,
        min_p,
        seed,
        offset,
        indices,
        filter_order,
        row_streams,
        valid,
        out,
        dtype,
        stream,
    )


def _sample(
    x,
    is_probs,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    offset,
    indices,
    filter_order,
    row_streams,
    valid,
    out,
    dtype,
    stream,
):
    if filter_order not in _ORDERS:
        from .errors import ArgumentError

        raise ArgumentError(f"filter_order: expected one of {_ORDERS}, got {filter_order!r}")
    return _core.ops_sample(
        x,
        is_probs,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        offset,
        indices,
        filter_order == "joint",
        row_streams,
        valid,
        out,
        dtype,
        stream,
    )


def renorm_probs(probs, *, top_k=0, top_p=1.0, out=None, dtype=None, stream=None):
    """What top_k and then top_p leave of probabilities [n, vocab], over its sum; 0 elsewhere.

    The tokens that sample_probs would draw from. out: like probs, may be probs itself. A row with
    NaN or infinity becomes NaN, one without a probability above 0 becomes 0.
    """
    return _core.ops_filter(probs, True, top_k, top_p, out, dtype, stream)


def mask_logits(logits, *, top_k=0, top_p=1.0, out=None, dtype=None, stream=None):
    """What top_k and then top_p (at temperature 1) leave of logits [n, vocab]; -inf elsewhere.

    out: like logits, may be logits itself. A row with NaN becomes NaN.
    """
    return _core.ops_filter(logits, False, top_k, top_p, out, dtype, stream)


def verify_draft(
    draft_probs,
    draft_token_ids,
    target_probs,
    *,
    accepted=None,
    emitted=None,
    seed=0,
    offset=0,
    row_streams=False,
    out=None,
    dtype=None,
    stream=None,
):
    """Speculative decoding (arXiv 2302.01318) of a drafted chain of tokens: int32 [n, steps + 1].

    draft_probs [n, steps, vocab]: what draft_token_ids [n, steps] (int32 or int64) were drawn
    from. target_probs [n, steps + 1, vocab]. Token i is kept with probability min(1, target /
    draft). After the last one kept comes a token drawn from max(target - draft, 0), or when all are
    kept from the last target; then -1. So the tokens are distributed as if drawn from the target.

    accepted and emitted, int32 [n], are added to: the number of tokens that would be kept if each
    stood alone, and the number kept. seed and offset: numbers, or int64 or uint64 tensors [n] on
    the device. A drafted token outside the vocabulary, or a row that cannot be drawn from, is an
    ArgumentError on the CPU; on CUDA such a token is not kept, and such a row's is -1.
    """
    return _core.ops_verify(
        draft_probs,
        draft_token_ids,
        target_probs,
        accepted,
        emitted,
        seed,
        offset,
        row_streams,
        out,
        dtype,
        stream,
    )


def token_logprobs(logits, ids, *, top=0, dtype=None, stream=None):
    """(logprobs float32 [n], top_ids int32 [n, top], top_logprobs float32 [n, top]).

    logits [n, vocab], ids [n] int32 or int64; natural logarithm. The top alternatives come largest
    first, ties by lower id. An id out of range, NaN in a row or a row without a logit above -inf
    is an ArgumentError on the CPU and NaN on CUDA. On CUDA top is at most 128.
    """
    return _core.ops_token_logprobs(logits, ids, top, dtype, stream)
