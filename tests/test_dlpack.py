"""The tensor boundary: what comes in through each door, and what is refused.

Needs: raddle installed, NumPy, a C compiler (for the fake producer).
"""

import sys

import numpy as np
import pytest
import raddle
from raddle import _core, errors

pytest_plugins = ["tests.producers"]

INFO = _core.tensor_info
READ_ONLY, COPIED, PADDED = 1, 2, 4
CPU, CUDA, CUDA_HOST, METAL = 1, 2, 3, 8
INT, UINT, FLOAT, BFLOAT, COMPLEX, BOOL = 0, 1, 2, 4, 5, 6


def values(obj, dtype=None):
    """Elements as raddle reads them, copied out while the memory is known to be alive."""
    return raddle.from_dlpack(obj, dtype).numpy().copy()


# -- what comes in ------------------------------------------------------------------------------


def test_door_is_found_and_remembered(make):
    doors = {"capsule": "dlpack", "legacy": "dlpack legacy"}
    producer = make([2, 3])
    for _ in range(3):
        info = INFO(producer)
        assert info == (
            "float32",
            "cpu",
            (2, 3),
            (3, 1),
            False,
            doors.get(make.door, "exchange table"),
        )


def test_null_strides_mean_contiguous(make):
    assert INFO(make([2, 3, 4]))[3] == (12, 4, 1)
    np.testing.assert_array_equal(values(make([2, 3])), np.arange(6).reshape(2, 3))


def test_byte_offset_is_applied(make):
    np.testing.assert_array_equal(values(make([5], byte_offset=12)), np.arange(3, 8))


def test_odd_strides(make):
    producer = make([3, 2], strides=[7, 3])
    np.testing.assert_array_equal(values(producer), [[0, 3], [7, 10], [14, 17]])


def test_negative_strides(make, memory):
    producer = make([4], strides=[-2], address=memory.ctypes.data + 40)
    assert INFO(producer)[3] == (-2,)
    np.testing.assert_array_equal(values(producer), [10, 8, 6, 4])


def test_broadcast_stride(make):
    np.testing.assert_array_equal(values(make([3, 2], strides=[0, 1])), [[0, 1]] * 3)


def test_zero_dimensions(make):
    assert INFO(make([]))[2:4] == ((), ())
    assert raddle.from_dlpack(make([], byte_offset=8)).item() == 2.0


@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 4, 2]])
def test_zero_size(make, shape):
    """NULL data is right for a tensor without elements, whatever its strides say."""
    wild = [2**62] * len(shape)
    for settings in ({}, {"address": 0}, {"address": 0, "byte_offset": 64}, {"strides": wild}):
        view = raddle.from_dlpack(make(shape, **settings))
        assert view.shape == tuple(shape) and view.size == 0
        assert view.numpy().shape == tuple(shape)


def test_extent_one_may_have_any_stride(make):
    np.testing.assert_array_equal(values(make([1, 4], strides=[2**62, 1])), [[0, 1, 2, 3]])


def test_pinned_host_memory_is_cpu(make):
    assert INFO(make([4], device=(CUDA_HOST, 1)))[1] == "cpu"


@pytest.mark.parametrize(
    ("code", "bits", "name"),
    [
        (FLOAT, 32, "float32"),
        (FLOAT, 16, "float16"),
        (FLOAT, 64, "float64"),
        (BFLOAT, 16, "bfloat16"),
        (10, 8, "float8_e4m3fn"),
        (12, 8, "float8_e5m2"),
        (BOOL, 8, "bool"),
        *[(INT, bits, f"int{bits}") for bits in (8, 16, 32, 64)],
        *[(UINT, bits, f"uint{bits}") for bits in (8, 16, 32, 64)],
    ],
)
def test_dtypes(make, code, bits, name):
    assert INFO(make([4], code=code, bits=bits))[0] == name


@pytest.mark.parametrize(
    ("carrier", "dtype"),
    [
        ((UINT, 16), "bfloat16"),
        ((INT, 16), "float16"),
        ((UINT, 8), "float8_e4m3fn"),
        ((INT, 8), "float8_e5m2"),
    ],
)
def test_bits_of_small_floats(make, carrier, dtype):
    producer = make([4], code=carrier[0], bits=carrier[1])
    assert INFO(producer, dtype)[0] == dtype


# -- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "lanes": (dict(shape=[4], lanes=4), errors.DTypeError, "vectors of 4 lanes"),
    "complex": (dict(shape=[4], code=COMPLEX, bits=64), errors.DTypeError, "complex64"),
    "fp4": (dict(shape=[4], code=17, bits=4), errors.DTypeError, "code 17 with 4 bits"),
    "int4": (dict(shape=[4], code=INT, bits=4), errors.DTypeError, "int4"),
    "float80": (dict(shape=[4], code=FLOAT, bits=80), errors.DTypeError, "float80"),
    "unknown code": (dict(shape=[4], code=200, bits=8), errors.DTypeError, "code 200"),
    "metal": (dict(shape=[4], device=(METAL, 0)), errors.DeviceError, "device type 8"),
    "managed": (dict(shape=[4], device=(13, 0)), errors.DeviceError, "device type 13"),
    "cuda -1": (dict(shape=[4], device=(CUDA, -1)), errors.DeviceError, "negative CUDA device"),
    "rank 9": (dict(shape=[1] * 9), errors.ShapeError, "0 to 8 dimensions, got 9"),
    "rank -2": (dict(shape=[4], ndim=-2), errors.ShapeError, "got -2"),
    "no shape": (dict(shape=[4], shapeless=True), errors.ArgumentError, "no shape"),
    "negative": (dict(shape=[2, -3]), errors.ShapeError, "negative extent -3 in dimension 1"),
    "product": (dict(shape=[2**40, 2**40]), errors.ShapeError, "2\\^63"),
    "empty product": (dict(shape=[0, 2**40, 2**40]), errors.ShapeError, "2\\^63"),
    "bytes": (dict(shape=[2**62], strides=[0]), errors.ShapeError, "2\\^63"),
    "stride": (dict(shape=[2], strides=[2**62]), errors.ShapeError, "stride"),
    "span": (dict(shape=[2**20, 3], strides=[2**42, 2**61]), errors.ShapeError, "out of range"),
    "below zero": (dict(shape=[2], strides=[-(2**60)]), errors.ShapeError, "address space"),
    "offset": (dict(shape=[4], byte_offset=2**64 - 8), errors.ShapeError, "byte_offset"),
    "unaligned": (dict(shape=[4], byte_offset=2), errors.ShapeError, "not aligned"),
    "null": (dict(shape=[4], address=0), errors.ArgumentError, "NULL"),
    "null offset": (dict(shape=[4], address=0, byte_offset=64), errors.ArgumentError, "NULL"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(make, case):
    settings, error, words = REFUSED[case]
    producer = make(**settings)
    before = sys.getrefcount(producer)
    for _ in range(2):
        with pytest.raises(error, match=f"^tensor: .*{words}"):
            INFO(producer)
        with pytest.raises(error, match=f"^obj: .*{words}"):
            raddle.from_dlpack(producer)
    assert sys.getrefcount(producer) == before
    assert INFO(make([4]))[2] == (4,)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "float8_e4m3fn"])
def test_dtype_never_reinterprets_numbers(make, dtype):
    with pytest.raises(errors.DTypeError, match=f"tensor: expected dtype {dtype}.*got float32"):
        INFO(make([4]), dtype)


def test_wrong_class_of_error_is_kin_of_the_builtin(make):
    with pytest.raises(ValueError):
        INFO(make([2, -3]))
    with pytest.raises(TypeError):
        INFO(make([4], lanes=2))
    with pytest.raises(RuntimeError):
        INFO(make([4], device=(METAL, 0)))


def test_read_only(make):
    """A legacy capsule and a bare view cannot say it; the others are asked when it matters."""
    producer = make([4], flags=READ_ONLY)
    can_say = make.door not in ("legacy", "no_owned")
    view = raddle.from_dlpack(producer)
    assert view.read_only == can_say
    if can_say:
        with pytest.raises(errors.ArgumentError, match="^tensor: .*read-only"):
            INFO(producer, None, True)
        with pytest.raises(errors.ArgumentError, match="read-only"):
            view.zero_()
    else:
        INFO(producer, None, True)
    INFO(make([4]), None, True)


def test_other_flags_change_nothing(make):
    assert INFO(make([4], flags=COPIED | PADDED | 1 << 40), None, True)[4] is False


@pytest.mark.parametrize("made", ["capsule", "no_view"])
def test_newer_major_version(fake, memory, balanced, made):
    body = {} if made == "capsule" else {"__dlpack_c_exchange_api__": fake.table(made)}
    producer = type("Newer", (fake.Producer,), body)(memory.ctypes.data, [4], major=2)
    with pytest.raises(errors.UnsupportedError, match="DLPack 2.3, raddle understands 1.x"):
        INFO(producer)


@pytest.mark.parametrize(
    "obj", [None, 3, 2.5, "q", [1.0], (1, 2), b"abc", object(), np.float32(1), np]
)
def test_objects_that_are_no_tensors(obj):
    with pytest.raises(errors.DTypeError, match="^tensor: expected a tensor .*__dlpack__"):
        INFO(obj)
