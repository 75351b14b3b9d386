"""flashinfer.sampling: sampling with FlashInfer's names, over raddle.ops.

probs and logits [n, vocab]: float32, float16 or bfloat16; float64 is rounded to float32. Parameters
are numbers, or 1-D tensors of one for each output. indices [m], int32 or int64: output i is drawn
from row indices[i], and outputs have its dtype; without, they are int32. Tokens as likely as the
least likely one that top_k or top_p keeps are all kept.

Random numbers: seed and offset, both numbers or both int64 or uint64 tensors of 1 or one for each
output; else generator, or torch's default one, gives them and moves on. With one pair for all
outputs, an output's number is part of the generator's counter; with one for each it is not, so that
an output is the same at any place of any batch. Results are a function of these and the inputs:
other numbers than FlashInfer's, of the same distribution. `deterministic` and `is_deterministic`
are accepted: raddle always is.

A row that nothing can be drawn from (NaN, nothing above 0 or -inf) gives 0 on a GPU, as
return_valid tells; on the CPU it is an ArgumentError unless return_valid is set. check_nan looks
for NaN first, which on a GPU waits for it.
"""

from .. import ops
from ._refuse import refuser
from ._sampling import (
    LEAST_TOP_P,
    _validate_softmax_temperature,
    get_seed_and_offset,
    random_numbers,
    rows_of,
    share,
    top_k_of,
)
from .jit import gen_sampling_module

__all__ = [
    "chain_speculative_sampling",
    "gen_sampling_module",
    "get_seed_and_offset",
    "min_p_sampling_from_probs",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]

# -- softmax ------------------------------------------------------------------------------------


def softmax(logits, temperature=None, enable_pdl=None):
    """softmax(logits / temperature) as float32, [n, vocab].

    temperature above 0: a number, a float tensor [n] on logits' device, or None for 1. enable_pdl
    only tunes and is accepted.
    """
    one_each, number, _ = _validate_softmax_temperature(logits, temperature)
    one_each = number if one_each is None else one_each.float()
    return ops.softmax(rows_of(logits), temperature=one_each)


# FlashInfer's tests ask for its route to a softmax of Blackwell's; raddle has one softmax for all.
_BLACKWELL_SOFTMAX_ROUTE_FALLBACK = 0
_BLACKWELL_SOFTMAX_ROUTE_MR515_V32000_T512 = 4


def _blackwell_softmax_route_for_testing(logits, temperature=None, enable_pdl=False):
    """The number that says: none of those routes."""
    return _BLACKWELL_SOFTMAX_ROUTE_FALLBACK


# -- sampling -----------------------------------------------------------------------------------


def _check_nan(x, name):
    import torch

    if torch.isnan(x).any():
        raise ValueError(f"Input {name} contains NaN.")


def _draw(x, is_probs, indices, generator, check_nan, seed, offset, return_valid, **settings):
    """Tokens of x, and whether they are valid when that is asked for."""
    import torch

    x = rows_of(x)
    if check_nan:
        _check_nan(x, "probs" if is_probs else "logits")
    n = x.shape[0] if indices is None else indices.shape[0]
    valid = None
    if return_valid or x.device.type != "cpu":
        valid = torch.empty(n, dtype=torch.bool, device=x.device)
    tokens = (ops.sample_probs if is_probs else ops.sample)(
        x,
        indices=indices,
        valid=valid,
        **random_numbers(seed, offset, generator, n, x.device),
        **settings,
    )
    return (tokens, valid) if return_valid else tokens


def _outputs(x, indices):
    return x.shape[0] if indices is None else indices.shape[0]


def sampling_from_logits(
    logits,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
):
    """Tokens drawn from softmax(logits)."""
    return _draw(logits, False, indices, generator, check_nan, seed, offset, False)


def sampling_from_probs(
    probs,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    """Tokens drawn from probs; with return_valid (tokens, valid), valid bool."""
    return _draw(probs, True, indices, generator, check_nan, seed, offset, return_valid)


def top_p_sampling_from_probs(
    probs,
    top_p,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    """Tokens drawn from the likeliest ones that together hold top_p of the probability."""
    top_p = share("top_p", top_p, _outputs(probs, indices), LEAST_TOP_P)
    return _draw(
        probs, True, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p
    )


def top_k_sampling_from_probs(
    probs,
    top_k,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    """Tokens drawn from the top_k likeliest."""
    top_k = top_k_of(top_k, _outputs(probs, indices))
    return _draw(
        probs, True, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k
    )


def min_p_sampling_from_probs(
    probs,
    min_p,
    indices=None,
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    """Tokens drawn from those at least min_p times as likely as the likeliest."""
    min_p = share("min_p", min_p, _outputs(probs, indices), 0.0)
    return _draw(
        probs, True, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p
    )


def _both(x, top_k, top_p, indices, filter_apply_order):
    """Settings of top_k and top_p together. With indices and "top_k_first", top_k may also have one
    value for each row of x, as FlashInfer's has."""
    import torch

    if filter_apply_order not in ("top_k_first", "joint"):
        raise ValueError(f"Invalid filter_apply_order: {filter_apply_order}")
    n = _outputs(x, indices)
    is_of_rows = (
        isinstance(top_k, torch.Tensor)
        and indices is not None
        and filter_apply_order == "top_k_first"
        and top_k.shape == (x.shape[0],) != (n,)
    )
    return {
        "top_k": top_k_of(top_k[indices.long()] if is_of_rows else top_k, n),
        "top_p": share("top_p", top_p, n, LEAST_TOP_P),
        "filter_order": filter_apply_order,
    }


def top_k_top_p_sampling_from_logits(
    logits,
    top_k,
    top_p,
    indices=None,
    filter_apply_order="top_k_first",
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
):
    """Tokens drawn from softmax(logits) after top_k, and top_p of what that leaves ("top_k_first")
    or of all ("joint")."""
    import torch

    settings = _both(logits, top_k, top_p, indices, filter_apply_order)
    if filter_apply_order == "joint":
        # By torch's probabilities, so that these are the tokens of ..._from_probs(softmax(logits)).
        probs = torch.softmax(rows_of(logits), dim=-1)
        return _draw(probs, True, indices, generator, check_nan, seed, offset, False, **settings)
    return _draw(logits, False, indices, generator, check_nan, seed, offset, False, **settings)


def top_k_top_p_sampling_from_probs(
    probs,
    top_k,
    top_p,
    indices=None,
    filter_apply_order="top_k_first",
    deterministic=True,
    generator=None,
    check_nan=False,
    seed=None,
    offset=None,
    return_valid=False,
):
    """Tokens drawn from probs after top_k, and top_p of what that leaves ("top_k_first") or of all
    ("joint")."""
    settings = _both(probs, top_k, top_p, indices, filter_apply_order)
    return _draw(probs, True, indices, generator, check_nan, seed, offset, return_valid, **settings)


# -- filters ------------------------------------------------------------------------------------


def top_p_renorm_probs(probs, top_p, is_deterministic=False):
    """The probabilities that top_p keeps, over their sum; 0 elsewhere. Of probs' dtype."""
    top_p = share("top_p", top_p, probs.shape[0], LEAST_TOP_P)
    return ops.renorm_probs(rows_of(probs), top_p=top_p)


def top_k_renorm_probs(probs, top_k, is_deterministic=False):
    """The probabilities that top_k keeps, over their sum; 0 elsewhere. Of probs' dtype."""
    return ops.renorm_probs(rows_of(probs), top_k=top_k_of(top_k, probs.shape[0]))


def top_k_mask_logits(logits, top_k):
    """The top_k largest logits, -inf elsewhere. Of logits' dtype."""
    return ops.mask_logits(rows_of(logits), top_k=top_k_of(top_k, logits.shape[0]))


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


# -- speculative decoding -----------------------------------------------------------------------


def chain_speculative_sampling(
    draft_probs,
    draft_token_ids,
    target_probs,
    maybe_output_accepted_token_num=None,
    maybe_output_emitted_draft_token_num=None,
    deterministic=True,
    generator=None,
    seed=None,
    offset=None,
):
    """(tokens int32 [n, steps + 1], accepted, emitted int32 [n]): see raddle.ops.verify_draft.

    The counters are added to in place; None: new ones from 0.
    """
    import torch

    n, device = draft_probs.shape[0], draft_probs.device
    if draft_probs.dtype != target_probs.dtype or draft_probs.dtype == torch.float64:
        draft_probs, target_probs = draft_probs.float(), target_probs.float()
    accepted, emitted = (
        torch.zeros(n, dtype=torch.int32, device=device) if given is None else given
        for given in (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    )
    tokens = ops.verify_draft(
        draft_probs,
        draft_token_ids,
        target_probs,
        accepted=accepted,
        emitted=emitted,
        **random_numbers(seed, offset, generator, n, device),
    )
    return tokens, accepted, emitted


__getattr__ = refuser(
    "sampling",
    "HY3_SAMPLER_SOFTMAX_AFTER_TOP_K",
    "HY3_SAMPLER_SOFTMAX_BEFORE_TOP_K",
    "HY3_SAMPLER_SOFTMAX_NONE",
    "fused_sampling_from_logits_hy3",
    "get_sampling_module",
)
