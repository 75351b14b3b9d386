"""How an operator of raddle comes into torch.library; see raddle.integrations.torch."""

import itertools

import torch

from ..errors import UnsupportedError

_library = torch.library.Library("raddle", "FRAGMENT")


def _needs_gradient(value):
    if isinstance(value, (list, tuple)):
        return any(_needs_gradient(one) for one in value)
    return isinstance(value, torch.Tensor) and value.requires_grad


def define(schema, make, run):
    """Defines an operator. make(*arguments) gives the results, empty: a tensor, a tuple, or None
    for an operator that writes into its arguments. run(results, *arguments) fills them."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    op = getattr(torch.ops.raddle, name)

    def forward(*args, **kwargs):
        out = make(*args, **kwargs)
        run(out, *args, **kwargs)
        return out

    def refuse_gradient(*args, **kwargs):
        given = itertools.chain(args, kwargs.values())
        if torch.is_grad_enabled() and any(_needs_gradient(x) for x in given):
            raise UnsupportedError(
                f"raddle::{name} has no gradient: call it under torch.no_grad() or "
                "torch.inference_mode(), or detach its inputs"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    for key in ("CPU", "CUDA"):
        _library.impl(name, forward, key)
    _library.impl(name, refuse_gradient, "Autograd")
    torch.library.register_fake(f"raddle::{name}", make, lib=_library)


def nothing(*_args, **_kwargs):
    """make of an operator that writes into its arguments."""
    return None
