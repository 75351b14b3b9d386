"""Tensors without a framework: memory on the CPU or a GPU that exports DLPack.

Every function of raddle takes torch tensors, NumPy arrays, raddle tensors and any other object with
`__dlpack__`. The ones made here are for callers who have neither torch nor CuPy. dtypes are strings
as torch spells them ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8" ...
"uint64", "bool"), or the dtype objects of NumPy and torch; devices are "cpu", "cuda" (which is
cuda:0), "cuda:1", or a torch.device.
"""

from . import _core
from .errors import DTypeError

Tensor = _core.Tensor

__all__ = ["Tensor", "empty", "from_dlpack", "tensor", "zeros"]


def empty(shape, dtype="float32", device="cpu"):
    """A new contiguous Tensor with uninitialised elements, aligned to 256 bytes.

    shape: an int or a sequence of at most 8 ints. Raises ShapeError, DTypeError, DeviceError (no
    such device, or no driver) and RaddleMemoryError.
    """
    return _core.empty(shape, dtype, device)


def zeros(shape, dtype="float32", device="cpu"):
    """A new contiguous Tensor of zeros; on a GPU, queued on the legacy default stream."""
    return _core.empty(shape, dtype, device).zero_()


def tensor(obj, dtype=None, device=None):
    """A new contiguous Tensor with a copy of obj's elements.

    obj: a tensor of any framework, or a number or nested lists of numbers, which NumPy reads.
    dtype: for a tensor, how its bits are to be read (a uint16 array as "bfloat16", say); for
    numbers, what they become ("bfloat16" and fp8 cannot be made from numbers here). device: where
    the copy goes; by default where obj is.

    Elements are never converted: a float32 tensor with dtype="float16" is a DTypeError. With a GPU
    on either side obj must be contiguous.
    """
    if isinstance(obj, (bool, int, float, list, tuple)):
        obj = _array_of_numbers(obj, dtype)
    source = _core.from_dlpack(obj, dtype)
    target = source.device if device is None else device
    return _core.empty(source.shape, source.dtype, target).copy_(obj)


def _array_of_numbers(numbers, dtype):
    import numpy

    if dtype is None:
        return numpy.array(numbers)
    name = _core.empty(0, dtype, "cpu").dtype
    if name == "bfloat16" or name.startswith("float8"):
        raise DTypeError(f"dtype: {name} is not made from numbers; pass its bits, an integer array")
    return numpy.array(numbers, dtype=name)


def from_dlpack(obj, dtype=None):
    """A Tensor over the memory of obj, without a copy; the memory lives as long as a view of it.

    Read-only memory stays read-only. dtype: how to read the bits, as in `tensor`. Nothing is
    synchronised: on a GPU, work that obj's framework has queued is ordered before ours only on the
    same stream. torch's resize_ frees memory under every view, this one too: do not resize obj.
    """
    return _core.from_dlpack(obj, dtype)
