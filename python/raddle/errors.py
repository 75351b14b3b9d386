"""What raddle raises: every class is a RaddleError, and kin of the built-in that callers expect.

A message names the argument as the caller typed it, what came, what was expected and what to do.
"""

__all__ = [
    "ArgumentError",
    "CapacityError",
    "CompileError",
    "CudaError",
    "DTypeError",
    "DeviceError",
    "RaddleError",
    "RaddleIOError",
    "RaddleMemoryError",
    "ShapeError",
    "StateError",
    "UnsupportedError",
]


class RaddleError(Exception):
    """Root of everything that raddle raises on purpose."""


class ArgumentError(RaddleError, ValueError):
    """An argument has a value that cannot be."""


class ShapeError(ArgumentError):
    """A rank, extent, stride or alignment does not fit."""


class DTypeError(RaddleError, TypeError):
    """An element type does not fit, or an object is no tensor at all."""


class DeviceError(RaddleError, RuntimeError):
    """No such device, the wrong one, two at once, or CUDA used after a fork."""


class CapacityError(RaddleError, ValueError):
    """More than a declared maximum, or a workspace that is too small; states both numbers."""


class StateError(RaddleError, RuntimeError):
    """The right call at the wrong moment: run before plan, two threads in a plan, a stale graph."""


class UnsupportedError(RaddleError, NotImplementedError):
    """Legal, but this back end cannot do it; the message lists why."""


class CompileError(RaddleError, RuntimeError):
    """A kernel did not compile. `log` holds the compiler's whole output."""

    log: str = ""


class CudaError(RaddleError, RuntimeError):
    """The CUDA driver refused; the message has the driver's own name for it.

    An asynchronous one, which says so, is the failure of GPU work that an earlier call had queued:
    the CUDA context is lost, and the process must be restarted to use that GPU again.
    """


class RaddleIOError(RaddleError, OSError):
    """A file could not be read or written."""


class RaddleMemoryError(RaddleError, MemoryError):
    """An allocation failed."""
