"""raddle.Tensor: making, describing, single elements, indexing and reshaping.

Needs: raddle installed, NumPy; a GPU where a test says so.
"""

import gc
import itertools
import pickle
import random

import numpy as np
import pytest
import raddle
from raddle import _core, errors

BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
PLAIN = "float16 float32 float64 bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()


def counting(shape, dtype="float32", device="cpu"):
    """A Tensor of 0, 1, 2, ... and the same as an array."""
    array = np.arange(int(np.prod(shape))).astype(dtype).reshape(shape)
    return raddle.tensor(array, device=device), array


# -- making and describing ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*PLAIN, *BITS])
@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 3), (2, 3, 4), (1,) * 8])
def test_empty(shape, dtype, device):
    tensor = raddle.empty(shape, dtype, device)
    item = np.dtype(BITS.get(dtype, dtype)).itemsize
    count = int(np.prod(shape))
    assert (tensor.shape, tensor.dtype, tensor.ndim) == (shape, dtype, len(shape))
    assert tensor.device == ("cpu" if device == "cpu" else "cuda:0")
    assert (tensor.size, tensor.itemsize, tensor.nbytes) == (count, item, count * item)
    assert tensor.is_contiguous and not tensor.read_only
    assert tensor.data_ptr % 256 == 0 and bool(tensor.data_ptr) == (count > 0)
    strides = np.empty([max(n, 1) for n in shape], "u1").strides
    assert tensor.strides == strides


def test_zeros(device):
    for dtype in [*PLAIN, *BITS]:
        assert not raddle.zeros((3, 5), dtype, device).to("cpu").numpy().any()


def test_repr_and_len():
    tensor = raddle.empty((2, 3), "bfloat16")
    assert repr(tensor) == "raddle.Tensor(shape=(2, 3), dtype=bfloat16, device=cpu)"
    assert len(tensor) == 2
    with pytest.raises(TypeError, match="0-d"):
        len(raddle.empty(()))


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((-1,), errors.ShapeError),
        ((2**40, 2**40), errors.ShapeError),
        ((0, 2**40, 2**40), errors.ShapeError),
        ((2**61, 4), errors.ShapeError),
        ((1,) * 9, errors.ShapeError),
        ((2**45,), errors.RaddleMemoryError),
        ("12", errors.ShapeError),
        (2.0, errors.ShapeError),
        ((2, None), errors.ShapeError),
        (None, errors.ShapeError),
        ((2**70,), errors.ShapeError),
    ],
)
def test_empty_refuses(shape, error):
    with pytest.raises(error):
        raddle.empty(shape)


def test_shapes_of_many_kinds():
    for shape in (3, np.int64(3), [3], (np.int32(3),), np.array([3])):
        assert raddle.empty(shape).shape == (3,)


def test_device_that_is_not_there():
    with pytest.raises(errors.DeviceError):
        raddle.empty(3, device="cuda:999")


def test_not_made_by_hand():
    with pytest.raises(TypeError):
        raddle.Tensor()
    with pytest.raises(TypeError):
        pickle.dumps(raddle.empty(2))
    with pytest.raises(AttributeError):
        raddle.empty(2).shape = (1, 2)


def test_tensor_copies():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for source in (array, array.T, array[:, ::-1], array[:0]):
        made = raddle.tensor(source)
        assert made.is_contiguous and made.shape == source.shape
        np.testing.assert_array_equal(made.numpy(), source)
        assert not np.shares_memory(made.numpy(), array)


def test_tensor_from_numbers():
    assert raddle.tensor(3).item() == 3 and raddle.tensor(2.5).dtype == "float64"
    made = raddle.tensor([[1, 2], [3, 4]], dtype="float16")
    assert (made.dtype, made.shape) == ("float16", (2, 2)) and made[1, 0].item() == 3.0
    assert raddle.tensor([True, False]).dtype == "bool"
    for dtype in BITS:
        with pytest.raises(errors.DTypeError, match="not made from numbers"):
            raddle.tensor([1.0], dtype=dtype)


def test_tensor_never_converts():
    with pytest.raises(errors.DTypeError, match="obj: expected dtype float16.*got float32"):
        raddle.tensor(np.zeros(3, np.float32), dtype="float16")
    bits = raddle.tensor(np.array([0x3FC0], np.uint16), dtype="bfloat16")
    assert bits.item() == 1.5


# -- single elements ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PLAIN)
def test_item(dtype):
    samples = [0, 1] if dtype == "bool" else [0, 1, 100]
    if dtype[0] in "if":
        samples.append(-5)
    for sample in samples:
        array = np.array([sample]).astype(dtype)
        item = raddle.tensor(array).item()
        assert item == array.item() and type(item) is type(array.item())


def every_float8(exponent_bits, mantissa_bits, has_infinities):
    """All 256 values of an 8-bit float, from its definition."""
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 1
    for bits in range(256):
        sign = -1.0 if bits & 128 else 1.0
        exponent, mantissa = (bits & 127) >> mantissa_bits, bits & (2**mantissa_bits - 1)
        if has_infinities and exponent == top:
            yield sign * np.inf if mantissa == 0 else np.nan
        elif not has_infinities and bits & 127 == 127:
            yield np.nan
        elif exponent == 0:
            yield sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            yield sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float8_e4m3fn", every_float8(4, 3, False)), ("float8_e5m2", every_float8(5, 2, True))],
)
def test_item_of_every_float8(dtype, expected):
    tensor = raddle.from_dlpack(np.arange(256, dtype=np.uint8), dtype)
    np.testing.assert_array_equal([tensor[i].item() for i in range(256)], list(expected))


def test_item_of_bfloat16():
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x7FC0, 0x0001], np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    tensor = raddle.from_dlpack(bits, "bfloat16")
    np.testing.assert_array_equal([tensor[i].item() for i in range(5)], expected)


def test_item_wants_one():
    assert raddle.zeros((1, 1, 1)).item() == 0
    for shape in ((2,), (0,), (1, 2)):
        with pytest.raises(errors.ShapeError, match="one element"):
            raddle.zeros(shape).item()


# -- views --------------------------------------------------------------------------------------

KEYS = [
    0,
    -1,
    (1, 2),
    (1, 2, 1),
    (-1, -1, -2),
    ...,
    (..., 0),
    (0, ...),
    (0, ..., 1),
    (0, 1, 2, ...),
    None,
    (None, 1, None, ...),
    (..., None),
    slice(None),
    slice(1, None),
    slice(None, None, -1),
    slice(5, 0, -2),
    slice(2, 1),
    slice(-100, 100, 3),
    (slice(None), slice(None, None, -2), slice(1, 4)),
    (slice(None, None, 2**40), 1),
    (slice(0, 0), slice(None, None, -1), 2),
    (np.int64(1), slice(np.int32(1), None)),
    (),
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_indexing_is_numpys(key):
    tensor, array = counting((3, 4, 5))
    for t, a in ((tensor, array), (tensor[::-1, :, ::-2], array[::-1, :, ::-2])):
        expected = np.asarray(a[key])
        view = t[key]
        assert view.shape == expected.shape
        np.testing.assert_array_equal(view.numpy(), expected)
        if expected.size and isinstance(a[key], np.ndarray):
            assert view.data_ptr == t.data_ptr + expected.ctypes.data - a.ctypes.data


def test_random_index_chains():
    rng = random.Random(3)
    for _ in range(300):
        tensor, array = counting((4, 5, 3, 2))
        for _ in range(3):
            ends = [None, *range(-6, 7)]
            key = tuple(
                slice(rng.choice(ends), rng.choice(ends), rng.choice([None, 1, 2, -1, -3]))
                for _ in range(rng.randint(0, array.ndim))
            )
            tensor, array = tensor[key], array[key]
        assert tensor.shape == array.shape
        np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("key", [3, -4, (0, 4), (0, 0, 0, 0), (..., ...), 2**70], ids=repr)
def test_index_out_of_range(key):
    with pytest.raises(IndexError):
        raddle.empty((3, 4, 5))[key]


@pytest.mark.parametrize("key", [[0], "a", 1.0, True, (0, True), np.array([0, 1])], ids=repr)
def test_index_of_another_kind(key):
    with pytest.raises(errors.UnsupportedError, match="ints, slices"):
        raddle.empty((3, 4, 5))[key]


def test_bad_slices():
    with pytest.raises(ValueError, match="zero"):
        raddle.empty(3)[::0]
    with pytest.raises(TypeError):
        raddle.empty(3)["a":]
    with pytest.raises(errors.ShapeError, match="more than 8"):
        raddle.empty((1,) * 8)[None]


def test_scalar_cannot_be_indexed():
    with pytest.raises(IndexError):
        raddle.empty(())[0]
    assert raddle.empty(())[...].shape == raddle.empty(())[()].shape == ()


def test_iteration():
    tensor, array = counting((3, 2))
    np.testing.assert_array_equal([row.numpy() for row in tensor], array)


def test_views_share_memory():
    tensor, _ = counting((3, 4))
    tensor[1, ::2].zero_()
    np.testing.assert_array_equal(tensor.numpy()[1], [0, 5, 0, 7])
    tensor.numpy()[0, 0] = 9
    assert tensor[0][0].item() == 9


def test_views_keep_the_memory():
    live = _core.alloc_live()
    tensor, array = counting((100, 4))
    last = tensor[10:][::2][3]
    del tensor
    gc.collect()
    np.testing.assert_array_equal(last.numpy(), array[16])
    del last
    assert _core.alloc_live() == live


# -- reshape ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(60,), (5, 12), (3, 4, 5), (1, 60, 1), (2, 2, 3, 5), (-1,), (5, -1)]
)
def test_reshape(shape):
    tensor, array = counting((3, 4, 5))
    np.testing.assert_array_equal(tensor.reshape(shape).numpy(), array.reshape(shape))
    np.testing.assert_array_equal(tensor.reshape(*shape).numpy(), array.reshape(shape))
    assert tensor.reshape(shape).data_ptr == tensor.data_ptr


def all_shapes(count, rank):
    """Ordered factorisations of count into rank factors."""
    if rank == 1:
        return [(count,)]
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    return [(d, *rest) for d in divisors for rest in all_shapes(count // d, rank - 1)]


def test_reshape_makes_a_view_or_nothing():
    """Against NumPy, which copies where a view is impossible."""
    tensor, array = counting((6, 4, 4, 2))
    keys = [
        ...,
        np.s_[::2],
        np.s_[:, 1:3],
        np.s_[:, :, ::-1],
        np.s_[:, ::2, ::2],
        np.s_[:1, :, 1:2],
    ]
    keys += [np.s_[::-1, ::-1, ::-1, ::-1], np.s_[2, :, :, :1]]
    made = 0
    for key in keys:
        source, expected = tensor[key], array[key]
        for shape in itertools.chain(*(all_shapes(expected.size, r) for r in (1, 2, 3))):
            wanted = expected.reshape(shape)
            is_view = np.shares_memory(wanted, array)
            try:
                view = source.reshape(shape)
            except errors.ShapeError as error:
                assert "allow no view" in str(error) and not is_view
                continue
            assert is_view
            np.testing.assert_array_equal(view.numpy(), wanted)
            made += 1
    assert made > 100


def test_reshape_of_nothing_and_of_one():
    assert raddle.empty((0, 3)).reshape(2, 0, 5).shape == (2, 0, 5)
    assert raddle.empty((4, 0)).reshape((4, -1)).shape == (4, 0)
    assert raddle.tensor(7.0).reshape(1, 1).reshape(()).item() == 7.0
    assert raddle.empty(()).reshape([]).shape == ()


@pytest.mark.parametrize(
    "shape", [(7,), (-1, -1), (-2, 6), (5, -1), (0, -1), (2**40, 2**40), "a", (1,) * 9], ids=repr
)
def test_reshape_refuses(shape):
    with pytest.raises(errors.ShapeError):
        raddle.empty(12).reshape(shape)
