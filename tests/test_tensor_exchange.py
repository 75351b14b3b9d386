"""raddle.Tensor: copies between layouts and devices, and leaving by every door.

Needs: raddle installed, NumPy; torch and a GPU where a test says so.
"""

import gc
import hashlib
import itertools
import subprocess
import sys
import weakref

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


# -- copies -------------------------------------------------------------------------------------


def test_copy_between_strides():
    rng = np.random.default_rng(5)
    keys = [np.s_[:], np.s_[::-1, :, ::-1], np.s_[:, 1:2], np.s_[:, :, ::2], np.s_[:0], np.s_[1, 1]]
    for dtype in ("float32", "uint8", "float64", "float16"):
        source = rng.integers(0, 100, (3, 4, 6)).astype(dtype)
        for key in keys:
            for view in (source[key], np.asfortranarray(source)[key]):
                target = raddle.zeros((3, 4, 6), dtype)
                expected = np.zeros((3, 4, 6), dtype)
                expected[key] = view
                assert target[key].copy_(view).shape == view.shape
                np.testing.assert_array_equal(target.numpy(), expected)


def test_copy_of_overlapping_views():
    for shift, step in itertools.product((0, 1, 3), (1, -1)):
        tensor, array = counting(20)
        expected = array.copy()
        expected[shift : shift + 10] = array[5:15][::step].copy()
        tensor[shift : shift + 10].copy_(tensor[5:15][::step])
        np.testing.assert_array_equal(tensor.numpy(), expected)


def test_copy_broadcast_source():
    target = raddle.empty((3, 2))
    target.copy_(np.broadcast_to(np.float32([1, 2]), (3, 2)))
    np.testing.assert_array_equal(target.numpy(), [[1, 2]] * 3)


def test_copy_refuses():
    target = raddle.zeros((2, 3))
    with pytest.raises(errors.ShapeError, match="^src: expected"):
        target.copy_(np.zeros((3, 2), np.float32))
    with pytest.raises(errors.ShapeError, match="^src: expected"):
        target.copy_(np.zeros(6, np.float32))
    with pytest.raises(errors.DTypeError, match="^src: expected dtype float32"):
        target.copy_(np.zeros((2, 3)))
    with pytest.raises(errors.DTypeError, match="^src: expected a tensor"):
        target.copy_([[1.0, 2, 3]] * 2)
    with pytest.raises(TypeError):
        target.copy_()
    assert not target.numpy().any()


def test_read_only_target():
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    view = raddle.from_dlpack(array)
    assert view.read_only and view[1:].read_only and view.reshape(2, 2).read_only
    for write in (view.zero_, lambda: view.copy_(np.ones(4, np.float32)), view[:2].zero_):
        with pytest.raises(errors.ArgumentError, match="read-only"):
            write()
    assert not view.numpy().flags.writeable
    assert not np.from_dlpack(view).flags.writeable
    with pytest.raises(BufferError):
        view.__dlpack__()


def test_zero_of_views():
    for key in (np.s_[:], np.s_[::2], np.s_[:, 1], np.s_[::-1, ::-1], np.s_[1:1]):
        tensor, array = counting((4, 5))
        array[key] = 0
        assert tensor[key].zero_().shape == array[key].shape
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_to_the_same_device():
    tensor = raddle.empty(3)
    assert tensor.to("cpu") is tensor and tensor.to((1, 0)) is tensor


# -- doors out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*PLAIN, *BITS])
def test_numpy_and_buffer(dtype):
    tensor = raddle.zeros((3, 4), dtype)
    array = tensor.numpy()
    assert array.dtype == BITS.get(dtype, dtype) and array.shape == (3, 4)
    assert array.ctypes.data == tensor.data_ptr and array.flags.writeable
    assert np.asarray(tensor).ctypes.data == tensor.data_ptr
    assert tensor[::2, ::-1].numpy().strides == array[::2, ::-1].strides
    assert raddle.zeros((0, 4), dtype).numpy().shape == (0, 4)
    assert raddle.zeros((), dtype).numpy().shape == ()


def test_buffer_of_many_kinds():
    tensor, array = counting((2, 3), "int16")
    assert bytes(tensor) == array.tobytes()
    assert memoryview(tensor).tolist() == array.tolist()
    view = memoryview(tensor[:, ::2])
    assert (view.shape, view.strides, view.tolist()) == ((2, 2), (6, 4), array[:, ::2].tolist())
    assert bytes(view) == array[:, ::2].tobytes()
    assert memoryview(tensor[1]).contiguous and not memoryview(tensor[:, 0]).contiguous
    with pytest.raises(BufferError):
        hashlib.sha256(tensor[:, 0])  # asks for one contiguous block


def test_buffer_keeps_the_memory():
    live = _core.alloc_live()
    array = raddle.zeros(1000).numpy()
    gc.collect()
    array[:] = 3
    assert array.sum() == 3000 and _core.alloc_live() == live + 1
    del array
    assert _core.alloc_live() == live


def test_dlpack_to_numpy():
    tensor, array = counting((3, 4))
    for t, a in ((tensor, array), (tensor[::-1, ::2], array[::-1, ::2]), (tensor[:0], array[:0])):
        np.testing.assert_array_equal(np.from_dlpack(t), a)
    assert np.from_dlpack(tensor).ctypes.data == tensor.data_ptr
    copied = np.from_dlpack(tensor, copy=True)
    assert not np.shares_memory(copied, tensor.numpy())
    np.testing.assert_array_equal(copied, array)


def test_dlpack_words():
    tensor = raddle.empty(3)
    assert tensor.__dlpack_device__() == (1, 0)
    for name, arguments in [
        ("dltensor", {}),
        ("dltensor", {"max_version": None, "stream": None}),
        ("dltensor", {"max_version": (0, 8)}),
        ("dltensor_versioned", {"max_version": (1, 0)}),
        ("dltensor_versioned", {"max_version": (2, 0), "dl_device": (1, 0), "copy": False}),
        ("dltensor_versioned", {"max_version": (1, 1), "copy": True, "stream": -1}),
    ]:
        assert f'"{name}"' in repr(tensor.__dlpack__(**arguments))
    for error, arguments in [
        (TypeError, {"max_version": 1}),
        (TypeError, {"max_version": ("1", 0)}),
        (TypeError, {"nonsense": 1}),
        (BufferError, {"stream": 3}),
        (BufferError, {"dl_device": (2, 0), "copy": False}),
        (errors.DeviceError, {"dl_device": (8, 0)}),
    ]:
        with pytest.raises(error):
            tensor.__dlpack__(**arguments)
    with pytest.raises(TypeError):
        tensor.__dlpack__(None)


def test_unused_capsules_let_go():
    live, tensor = _core.alloc_live(), raddle.empty(3)
    before = sys.getrefcount(tensor)
    for version in (None, (1, 3)):
        capsules = [tensor.__dlpack__(max_version=version) for _ in range(5)]
        assert sys.getrefcount(tensor) == before + 5
        del capsules
        assert sys.getrefcount(tensor) == before
    del tensor
    assert _core.alloc_live() == live


def test_references_are_unchanged_after_many_calls():
    tensor, live = raddle.zeros((4, 4)), None
    before = sys.getrefcount(tensor), sys.getrefcount(raddle.Tensor)
    for _ in range(10_000):
        np.from_dlpack(tensor[1:, ::2].reshape(3, 1, 2))
        _core.tensor_info(tensor)
        tensor.copy_(tensor).zero_()
        with pytest.raises(errors.ShapeError):
            tensor.reshape(3)
        live = live or _core.alloc_live()
    assert (sys.getrefcount(tensor), sys.getrefcount(raddle.Tensor)) == before
    assert _core.alloc_live() == live


def test_weak_references():
    tensor = raddle.empty(3)
    reference = weakref.ref(tensor)
    assert reference() is tensor
    del tensor
    assert reference() is None


def test_torch_by_both_doors():
    torch = pytest.importorskip("torch", reason="needs torch: not installed")
    for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool"):
        tensor = raddle.zeros((3, 4), dtype)
        seen = torch.from_dlpack(tensor)
        assert str(seen.dtype) == f"torch.{dtype}" and seen.data_ptr() == tensor.data_ptr
        seen[1] = 1
        assert raddle.from_dlpack(seen)[1, 2].item() == 1 == tensor[1, 2].item()
    del tensor, seen
    live = _core.alloc_live()
    seen = torch.from_dlpack(raddle.zeros(5)[::2])
    gc.collect()
    assert seen.tolist() == [0, 0, 0]
    del seen
    gc.collect()
    assert _core.alloc_live() == live


def test_program_that_ends_with_tensors_alive():
    """Exports outlive the interpreter's own references without a crash."""
    program = """
import raddle, numpy as np
kept = [raddle.zeros(4) for _ in range(3)]
arrays = [np.from_dlpack(t[1:]) for t in kept] + [t.numpy() for t in kept]
capsules = [t.__dlpack__(max_version=(1, 3)) for t in kept]
cycle = [arrays, kept]; cycle.append(cycle)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_numpy():
    """Tensors work, and NumPy is only imported for those who ask for it."""
    program = """
import sys
import raddle
t = raddle.zeros((2, 3), "bfloat16")
t[0].copy_(raddle.zeros(3, "bfloat16"))
assert memoryview(t).shape == (2, 3) and t[1, 1].item() == 0
assert "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# -- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_host_and_device_copies():
    tensor, array = counting((64, 33))
    there = tensor.to("cuda")
    assert there.device == "cuda:0" and there.shape == tensor.shape
    np.testing.assert_array_equal(there.to("cpu").numpy(), array)
    again = raddle.empty((64, 33), device="cuda").copy_(there)
    again[3:9].zero_()
    array[3:9] = 0
    np.testing.assert_array_equal(raddle.empty((64, 33)).copy_(again).numpy(), array)
    np.testing.assert_array_equal(again[5:20].to("cpu").numpy(), array[5:20])


@pytest.mark.gpu
def test_device_copies_with_gaps_are_refused():
    there = raddle.zeros((8, 8), device="cuda")
    for view in (there[:, ::2], there[::-1], there[:, :4]):
        with pytest.raises(errors.UnsupportedError, match="contiguous"):
            raddle.empty(view.shape).copy_(view)
        with pytest.raises(errors.UnsupportedError):
            view.zero_()


@pytest.mark.gpu
def test_device_elements_are_not_read_by_accident():
    there = raddle.zeros(1, device="cuda")
    for read in (there.item, there.numpy, lambda: np.asarray(there)):
        with pytest.raises(errors.DeviceError, match='use .to\\("cpu"\\)'):
            read()
    with pytest.raises(BufferError):
        memoryview(there)
    assert there.__dlpack_device__() == (2, 0)
    np.testing.assert_array_equal(np.from_dlpack(there, device="cpu"), [0])


@pytest.mark.gpu
def test_torch_on_the_gpu():
    torch = pytest.importorskip("torch", reason="needs torch: not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs torch with CUDA: this torch has none")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        source = torch.arange(1000, device="cuda", dtype=torch.float32) * 2
        copied = raddle.empty(1000, device="cuda").copy_(source)  # on torch's current stream
    stream.synchronize()
    np.testing.assert_array_equal(copied.to("cpu").numpy(), np.arange(1000) * 2)
    assert torch.from_dlpack(copied).sum().item() == 999000
    made = _core.empty_like(source, (3, 2), "bfloat16", "cuda")
    assert made.dtype == torch.bfloat16 and made.is_cuda
