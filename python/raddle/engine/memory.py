"""How much memory the KV cache gets, and how it is cut into pages."""

import os

from .. import _core, empty
from ..errors import ArgumentError, CapacityError
from .pages import KVCache, KVGroup
from .weights import ITEM_BYTES

_MAX_ROWS = (1 << 31) - 1  # of one pool: int32 counts them


def build_cache(model, max_len, max_batch, max_tokens, page_size, memory_bytes):
    """A KVCache for a model, with as many pages as memory_bytes holds or max_batch can ever use.

    memory_bytes None: see Engine. Layers of one window share a pool; a windowed layer never needs
    more than its window and one step's tokens, and what that saves goes to the others.
    """
    if memory_bytes is None:
        memory_bytes = _default_bytes(model.device)
    if type(memory_bytes) is not int or memory_bytes < 1:
        raise ArgumentError(f"kv_memory_bytes: expected an integer above 0, got {memory_bytes!r}")
    config = model.config
    shape = (2, page_size, model.num_kv_heads, config.head_dim)
    page_bytes = 2 * page_size * model.num_kv_heads * config.head_dim * ITEM_BYTES[model.dtype]
    groups = {}
    for layer, window in enumerate(config.windows):
        groups.setdefault(window, []).append(layer)
    full_blocks = -(-max_len // page_size)
    blocks = {}
    for window in groups:
        seen = -(-(window + max_tokens) // page_size) + 2
        blocks[window] = full_blocks if window < 0 else min(full_blocks, seen)
    pages, left, layers_left = {}, memory_bytes, config.num_layers
    for window in sorted(groups, reverse=True):  # windowed groups first: they may need less
        share = left // (layers_left * page_bytes)
        pages[window] = min(share, max_batch * blocks[window], _MAX_ROWS // page_size)
        left -= pages[window] * len(groups[window]) * page_bytes
        layers_left -= len(groups[window])
    least = min(pages.values())
    if least < 2:
        raise CapacityError(
            f"kv_memory_bytes: {memory_bytes} bytes hold {least} pages, expected at least 2; one "
            f"page of {page_size} tokens takes {config.num_layers * page_bytes} bytes"
        )
    return KVCache(
        [
            KVGroup(
                layers,
                window,
                page_size,
                pages[window],
                max_batch,
                blocks[window],
                [
                    empty((pages[window], *shape), dtype=model.dtype, device=model.device)
                    for _ in layers
                ],
            )
            for window, layers in groups.items()
        ],
        page_size,
        max_batch,
    )


def _default_bytes(device):
    """A quarter of this machine's memory, or nine tenths of what a GPU has free."""
    if device != "cpu":
        return _core.gpu_info(int(device.partition(":")[2] or 0))["free_bytes"] * 9 // 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
