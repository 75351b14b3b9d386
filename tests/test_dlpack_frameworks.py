"""The tensor boundary with real frameworks: arrays, tensors, their words, and results.

Needs: raddle installed, NumPy; torch, ml_dtypes and a C compiler where a test says so.
"""

import sys

import numpy as np
import pytest
import raddle
from raddle import _core, errors

pytest_plugins = ["tests.producers"]

INFO = _core.tensor_info


def values(obj, dtype=None):
    """Elements as raddle reads them, copied out while the memory is known to be alive."""
    return raddle.from_dlpack(obj, dtype).numpy().copy()


# -- NumPy --------------------------------------------------------------------------------------


def test_ndarray_views():
    base = np.arange(48, dtype=np.int32).reshape(4, 3, 4)
    for array in (
        base,
        base[::-1, :, 1::2],
        base.T,
        base[:, :0],
        base[2:3, 1],
        np.asfortranarray(base),
    ):
        info = INFO(array)
        assert info[0] == "int32" and info[2] == array.shape and info[5] == "numpy"
        np.testing.assert_array_equal(values(array), array)


@pytest.mark.parametrize(
    "name", "float16 float32 float64 bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()
)
def test_ndarray_dtypes(name):
    assert INFO(np.zeros(3, name))[0] == name
    assert INFO(np.zeros(3, np.dtype(name).newbyteorder("=")))[0] == name


@pytest.mark.parametrize("name", ["longlong", "ulonglong", "intc", "long"])
def test_ndarray_c_integers(name):
    dtype = np.dtype(getattr(np, name))
    assert INFO(np.zeros(3, dtype))[0] == dtype.name


@pytest.mark.parametrize(
    "dtype", ["complex64", "longdouble", "object", "U4", "M8[s]", "f4,f4", "V2", "V3"]
)
def test_ndarray_dtypes_that_are_refused(dtype):
    with pytest.raises(errors.DTypeError, match="^tensor: NumPy dtype .* is not supported"):
        INFO(np.zeros(3, dtype))


def test_ndarray_bits_with_explicit_dtype():
    bits = np.array([0x3F80, 0xC000], np.uint16)
    assert raddle.from_dlpack(bits, "bfloat16")[1].item() == -2.0
    assert INFO(bits.view("V2"), "bfloat16")[0] == "bfloat16"
    assert INFO(np.zeros(2, np.uint8), "float8_e5m2")[0] == "float8_e5m2"
    with pytest.raises(errors.DTypeError, match=r"expected dtype bfloat16 .*uint16.*got float16"):
        INFO(np.zeros(2, np.float16), "bfloat16")


def test_ndarray_byte_order():
    swapped = np.zeros(3, np.dtype("f4").newbyteorder())
    with pytest.raises(errors.DTypeError, match="other byte order"):
        INFO(swapped)
    assert INFO(np.zeros(3, ">u1"))[0] == "uint8"


def test_ndarray_read_only():
    array = np.zeros(3)
    array.flags.writeable = False
    assert INFO(array)[4] is True
    with pytest.raises(errors.ArgumentError, match="^tensor: .*read-only"):
        INFO(array, None, True)
    INFO(np.zeros(3), None, True)


def test_ndarray_odd_byte_strides():
    record = np.zeros(4, np.dtype([("a", "u1"), ("b", "f4"), ("c", "f4"), ("d", "u1")]))
    with pytest.raises(errors.ShapeError, match="stride of 10 bytes.*element size 4"):
        INFO(record["b"])
    aligned = np.zeros(4, np.dtype([("a", "f4"), ("b", "f4"), ("c", "f4")]))
    assert INFO(aligned["b"])[3] == (3,)


def test_ndarray_unaligned():
    raw = np.zeros(17, np.uint8)
    with pytest.raises(errors.ShapeError, match="not aligned to its element size of 4"):
        INFO(raw[1 + -raw.ctypes.data % 4 :][:8].view(np.float32))


def test_ndarray_rank():
    assert len(INFO(np.zeros([1] * 8))[2]) == 8
    with pytest.raises(errors.ShapeError, match="at most 8 dimensions, got 9"):
        INFO(np.zeros([1] * 9))


def test_ndarray_subclass_goes_by_capsule(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert type(mapped) is not np.ndarray
    assert INFO(mapped) == ("float32", "cpu", (6,), (1,), True, "dlpack")
    np.testing.assert_array_equal(values(mapped), np.arange(6))


def test_ndarray_references():
    array, live = np.zeros((2, 3), np.float32), _core.alloc_live()
    before = sys.getrefcount(array)
    for _ in range(10_000):
        INFO(array)
    assert sys.getrefcount(array) == before
    assert _core.alloc_live() == live
    view = raddle.from_dlpack(array)
    assert sys.getrefcount(array) == before + 1
    del view
    assert sys.getrefcount(array) == before


def test_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="needs ml_dtypes: not installed")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        array = np.array([1.5, -2], getattr(ml_dtypes, name))
        assert INFO(array)[0] == name
        assert [raddle.from_dlpack(array)[i].item() for i in range(2)] == [1.5, -2]
        assert raddle.empty(3, array.dtype).dtype == name
    with pytest.raises(errors.DTypeError):
        INFO(np.zeros(3, ml_dtypes.float8_e4m3b11fnuz))
    with pytest.raises(errors.DTypeError):
        INFO(np.zeros(3, ml_dtypes.int4))


# -- torch --------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch: not installed")


def test_torch_dtypes_and_layouts(torch):
    floats = "float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2"
    for name in [*floats.split(), "bool", "int8", "uint8", "int16", "int32", "int64"]:
        tensor = torch.zeros(4, 6).to(getattr(torch, name))
        assert INFO(tensor)[:4] == (name, "cpu", (4, 6), (6, 1))
        assert INFO(tensor.T[1:, ::2])[2:4] == ((5, 2), (1, 12))
    assert INFO(torch.tensor(1.0))[2] == ()
    assert INFO(torch.zeros(0, 3))[2] == (0, 3)
    assert INFO(torch.zeros(1).expand(4))[3] == (0,)


def test_torch_door(torch):
    has_table = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert INFO(torch.zeros(3))[5] == ("exchange table" if has_table else "dlpack")


def test_torch_requires_grad(torch):
    parameter = torch.nn.Parameter(torch.arange(4.0))
    for leaf in (parameter, torch.ones(3, requires_grad=True), (parameter * 2)):
        assert INFO(leaf)[0] == "float32"
        assert INFO(leaf, None, True)[4] is False
    np.testing.assert_array_equal(values(parameter), [0, 1, 2, 3])


def test_torch_storage_is_kept_when_the_tensor_gets_another(torch):
    """What a server does when it swaps weights: param.data = new."""
    parameter = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
    view = raddle.from_dlpack(parameter)
    parameter.data = torch.zeros(4)
    np.testing.assert_array_equal(view.numpy(), [0, 1, 2, 3])


def test_torch_tensors_without_memory(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake_tensor = torch.zeros(3)
    for tensor in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse(), fake_tensor):
        with pytest.raises(errors.RaddleError, match="^tensor: "):
            INFO(tensor)


def test_torch_dtypes_that_are_refused(torch):
    for dtype in (torch.complex64, torch.float8_e4m3fnuz):
        with pytest.raises(errors.DTypeError, match="is not supported"):
            INFO(torch.zeros(2).to(dtype))


def test_torch_capsule_door(torch):
    """The third door, as a torch without a table would use it; grad and all."""

    class Older:
        def __init__(self, tensor):
            self.tensor, self.requires_grad = tensor, tensor.requires_grad

        def __dlpack__(self, **keywords):
            return self.tensor.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

        def detach(self):
            return Older(self.tensor.detach())

    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        tensor = (
            torch.ones(2, 3, dtype=torch.float32).to(dtype).requires_grad_(dtype == torch.float32)
        )
        assert INFO(Older(tensor))[:4] == (str(dtype)[6:], "cpu", (2, 3), (3, 1))
        assert INFO(Older(tensor))[5] == "dlpack"


def test_torch_references(torch):
    tensor, live = torch.zeros(2, 3), _core.alloc_live()
    before = sys.getrefcount(tensor)
    for _ in range(10_000):
        INFO(tensor)
    assert sys.getrefcount(tensor) == before
    assert _core.alloc_live() == live


# -- results of the caller's own kind -----------------------------------------------------------


def test_new_like(torch, fake, memory):
    parameter = torch.nn.Parameter(torch.zeros(2))
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool"):
        made = _core.empty_like(parameter, (2, 3), dtype, "cpu")
        assert type(made) is torch.Tensor and str(made.dtype) == f"torch.{dtype}"
        assert tuple(made.shape) == (2, 3) and made.is_contiguous()
    bits = {"bfloat16": "uint16", "float8_e5m2": "uint8"}
    for dtype in ("float16", "bfloat16", "float8_e5m2", "int32"):
        made = _core.empty_like(np.zeros(1), (3, 0), dtype, "cpu")
        assert type(made) is np.ndarray and made.dtype == bits.get(dtype, dtype)
        assert made.shape == (3, 0)
    for like in (raddle.empty(1), None, fake.Producer(memory.ctypes.data, [4])):
        made = _core.empty_like(like, (2,), "bfloat16", "cpu")
        assert type(made) is raddle.Tensor and made.dtype == "bfloat16"


def test_new_like_when_the_allocator_fails(fake, memory):
    body = {"__dlpack_c_exchange_api__": fake.table("full")}
    producer = type("Empty", (fake.Producer,), body)(memory.ctypes.data, [4])
    with pytest.raises(RuntimeError, match="the pool is empty"):
        _core.empty_like(producer, (2,), "float32", "cpu")


# -- what words mean ----------------------------------------------------------------------------


def test_dtype_words(torch):
    for word in ("float32", np.float32, np.dtype("f4"), torch.float32, "torch.float32"):
        assert raddle.empty(1, word).dtype == "float32"
    for word in (
        "float",
        float,
        3,
        "bf16",
        None,
        np.dtype(">f4"),
        np.complex64,
        torch.complex64,
        "",
        object(),
    ):
        with pytest.raises(errors.DTypeError, match="^dtype: "):
            raddle.empty(1, word)


def test_device_words(torch):
    for word in ("cpu", "cpu:0", torch.device("cpu"), (1, 0)):
        assert raddle.empty(1, device=word).device == "cpu"
    bad = (
        "",
        "gpu",
        "cpu:1",
        "cuda:",
        "cuda:x",
        "cuda:1x",
        "cpux",
        None,
        0,
        (8, 0),
        (1, 1),
        (2, -1),
        (1,),
        ("cpu", 0),
    )
    for word in (*bad, torch.device("meta")):
        with pytest.raises(errors.DeviceError, match="^device: expected a device"):
            raddle.empty(1, device=word)


def test_stream_words():
    class Torch:
        cuda_stream = 7

    class Cupy:
        ptr = 7

    class Core:
        def __cuda_stream__(self):
            return (0, 7)

    target, source = raddle.zeros(2), np.ones(2, np.float32)
    for stream in (None, 0, 1, 2**64 - 1, Torch(), Cupy(), Core()):
        target.zero_(stream)
        assert target.copy_(source, stream) is target
    for stream in (-1, 2**64, 1.0, True, "0", object(), [0]):
        with pytest.raises(errors.ArgumentError, match="^stream: expected"):
            target.copy_(source, stream)
