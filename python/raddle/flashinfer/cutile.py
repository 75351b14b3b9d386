"""flashinfer.cutile and flashinfer.cutile.cutile_common: raddle has no kernels in cuda.tile."""

import sys

from ._refuse import refuser

__all__ = ["is_cuda_tile_available"]


def is_cuda_tile_available(device=None):
    """False: whatever asks for backend="cutile" finds nothing here."""
    return False


__getattr__ = refuser("cutile", "cached_replace_hints")

cutile_common = sys.modules[__name__]  # flashinfer.cutile.cutile_common is this module too
