"""Counting launches of raddle's kernels on the device."""

from .. import _core
from ..errors import StateError, UnsupportedError

_is_counting = False


def start_counting():
    """Count from zero.

    Every launch from now on also bumps a counter of its kernel in device memory, in stream order,
    so that replays of CUDA graphs count as well."""
    global _is_counting
    _set_counting(True)
    _is_counting = True


def stop_counting():
    """Stop; graphs that were captured while counting go on to count, which nobody sees."""
    global _is_counting
    if _is_counting:
        _set_counting(False)
        _is_counting = False


def launch_counts():
    """Kernel name -> launches since install(count=True), on all devices together.

    Waits for the devices. Raises StateError when nothing is counted."""
    if not _is_counting:
        raise StateError("launch_counts: nothing is counted; call install(count=True)")
    return _core.launch_counts()


def _set_counting(on):
    count = getattr(_core, "count_launches", None)
    if count is None:
        raise UnsupportedError("count: this build of raddle has no launch counters")
    count(on)
