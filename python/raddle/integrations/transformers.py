"""raddle as an attention implementation of Hugging Face transformers (4.55 and later, 5.x).

    from raddle.integrations.transformers import enable, disable

    enable(model)                    # a loaded model; disable(model) restores it
    model.generate(**inputs)         # prefill and decode by raddle's kernels
    model.generate_batch(prompts)    # continuous batching (from 4.57), K and V in its paged cache

or register() once, and load with attn_implementation="raddle" (transformers before paging became a
property of the call: "paged|raddle" for generate_batch).

CPU (float32, float16, bfloat16) and CUDA (float16, bfloat16): causal and bidirectional attention,
grouped queries, sliding windows, soft-capped logits, sinks, padding before and behind the tokens,
dynamic and static caches, packed batches by cu_seq_lens_q and cu_seq_lens_k. Inference only.
torch.compile breaks its graph at each attention. Continuous batching in transformers 4.5x and 5.0
keeps wrong tokens of layers with a window, by whatever implementation: use 5.17 or later there.
Refused with an UnsupportedError that says why: gradients and dropout, output_attentions, biases,
masks of other patterns, padding between tokens.
"""

import inspect
import sys
import weakref

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from ..errors import StateError, UnsupportedError

if not hasattr(PreTrainedModel, "set_attn_implementation"):
    raise ImportError(
        "raddle.integrations.transformers needs transformers 4.55 or later, where a model's "
        "attention implementation can be changed"
    )

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .transformers_attention import attention_forward
from .transformers_mask import build_mask
from .transformers_paged import NAMES, install_hooks
from .transformers_plans import clear

__all__ = ["clear", "disable", "enable", "register"]

_enabled = weakref.WeakKeyDictionary()  # model -> [(config, implementation before)]


def register():
    """Makes "raddle" and "paged|raddle" known to transformers: attention and mask function, and
    what continuous batching needs. Idempotent; importing this module does it."""
    for name in NAMES:
        ALL_ATTENTION_FUNCTIONS.register(name, attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, build_mask)
    install_hooks()


def enable(model):
    """Lets a loaded model compute its attention by raddle; returns the model.

    Raises UnsupportedError for a model that does not take attention implementations, and leaves it
    as it was. Enabling twice changes nothing.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"model: expected a transformers model, got {type(model).__name__}")
    if model in _enabled:
        return model
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for part in model.modules():  # some versions skip parts whose config is a copy
            if isinstance(part, PreTrainedModel) and part.config._attn_implementation not in NAMES:
                part.set_attn_implementation("raddle")
    except BaseException:
        _restore(before)
        raise
    is_set = any(config._attn_implementation in NAMES for config, _ in before)
    if not (is_set and _asks_interface(model)):
        _restore(before)
        raise UnsupportedError(
            f"model: {type(model).__name__} computes its attention itself and takes no "
            "attn_implementation"
        )
    _enabled[model] = before
    return model


def disable(model):
    """Gives a model the attention implementation back that it had before enable(); returns it."""
    if model not in _enabled:
        raise StateError("model: raddle is not enabled on it; call enable(model) first")
    _restore(_enabled.pop(model))
    return model


def _asks_interface(model):
    """Whether the source of the model, or of a part, looks implementations up: some let theirs be
    set and never do. True where there is no source."""
    kinds = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    for kind in kinds:
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[kind.__module__]):
                return True
        except (KeyError, OSError, TypeError):
            return True
    return False


def _restore(before):
    for config, implementation in before:
        config._attn_implementation_internal = implementation


def _configs(model):
    """The configs of a model and its parts, each once."""
    found = []
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if any(config is known for known in found):
            continue
        found.append(config)
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        waiting.extend(part for part in parts if part is not None)
    return found


register()
