"""The tensor boundary: producers that misbehave, and who lets go of what.

Needs: raddle installed, NumPy, a C compiler (for the fake producer).
"""

import sys
import threading

import numpy as np
import pytest
import raddle
from raddle import _core, errors

pytest_plugins = ["tests.producers"]

INFO = _core.tensor_info
CUDA = 2


def values(obj, dtype=None):
    """Elements as raddle reads them, copied out while the memory is known to be alive."""
    return raddle.from_dlpack(obj, dtype).numpy().copy()


# -- odd producers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "door"),
    [("future", "exchange table"), ("future_only", "dlpack"), ("no_export", "dlpack")],
)
def test_table_chain(fake, memory, balanced, kind, door):
    """A newer table leads to an older one; without one, or with NULL slots, a capsule is asked."""
    body = {"__dlpack_c_exchange_api__": fake.table(kind)}
    producer = type("Chain", (fake.Producer,), body)(memory.ctypes.data, [4])
    assert INFO(producer)[5] == door
    np.testing.assert_array_equal(values(producer), np.arange(4))


@pytest.mark.parametrize("table", [None, 0, "text", object(), 1.5])
def test_table_attribute_of_another_kind(fake, memory, balanced, table):
    body = {"__dlpack_c_exchange_api__": table}
    producer = type("Strange", (fake.Producer,), body)(memory.ctypes.data, [4])
    assert INFO(producer)[5] == "dlpack"


def test_table_on_the_instance_is_not_used(fake, memory, balanced):
    producer = type("Late", (fake.Producer,), {})(memory.ctypes.data, [4])
    producer.__dlpack_c_exchange_api__ = fake.table("fails")
    assert INFO(producer)[5] == "dlpack"


@pytest.mark.parametrize(
    ("kind", "words"), [("fails", "BufferError: no view today"), ("silent", "without saying why")]
)
def test_table_that_fails(fake, memory, balanced, kind, words):
    body = {"__dlpack_c_exchange_api__": fake.table(kind)}
    producer = type("Failing", (fake.Producer,), body)(memory.ctypes.data, [4])
    with pytest.raises(errors.ArgumentError, match=f"^tensor: its DLPack export failed.*{words}"):
        INFO(producer)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("raises", "__dlpack__ failed: BufferError: this tensor cannot leave$"),
        ("list", "returned no fresh DLPack capsule but list"),
        ("used", "returned no fresh DLPack capsule but one that was used before"),
    ],
)
def test_capsule_that_fails(fake, memory, balanced, mode, words):
    producer = fake.Producer(memory.ctypes.data, [4], mode=mode)
    with pytest.raises(errors.ArgumentError, match=f"^tensor: .*{words}"):
        INFO(producer)


def test_cause_is_kept(fake, memory):
    with pytest.raises(errors.ArgumentError) as caught:
        INFO(fake.Producer(memory.ctypes.data, [4], mode="raises"))
    assert isinstance(caught.value.__cause__, BufferError)


def test_interrupt_passes(fake, memory):
    class Interrupted(fake.Producer):
        def __dlpack__(self, **keywords):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        INFO(Interrupted(memory.ctypes.data, [4]))


def test_keywords_of_a_host_producer(fake, memory, balanced):
    """No stream for host memory: NumPy refuses one."""
    producer = fake.Producer(memory.ctypes.data, [4])
    INFO(producer)
    assert producer.keywords == {"max_version": (1, 3)}


@pytest.mark.parametrize("mode", ["versioned", "legacy"])
def test_keywords_of_a_cuda_producer(fake, memory, balanced, mode):
    """-1: no synchronisation, which a capture could not bear. The address is never touched."""
    producer = fake.Producer(memory.ctypes.data, [4], device=(CUDA, 3), mode=mode)
    assert INFO(producer)[1] == "cuda:3"
    assert producer.keywords.pop("stream") == -1
    assert producer.keywords == ({} if mode == "legacy" else {"max_version": (1, 3)})


def test_producer_without_device_method(memory):
    class Bare:
        def __dlpack__(self, **keywords):
            assert "stream" not in keywords
            return memory.__dlpack__(**keywords)

    assert INFO(Bare())[5] == "dlpack"


def test_requires_grad_is_detached(fake, memory, balanced):
    class Leaf(fake.Producer):
        requires_grad = True

        def __dlpack__(self, **keywords):
            raise BufferError("use tensor.detach()")

        def detach(self):
            return fake.Producer(memory.ctypes.data, [4])

    np.testing.assert_array_equal(values(Leaf(memory.ctypes.data, [4])), np.arange(4))


def test_host_and_device_tensors_do_not_mix(fake, memory, balanced):
    """A copy between the CPU and a GPU that is not there says so and touches nothing."""
    target = raddle.zeros(4)
    source = fake.Producer(memory.ctypes.data, [4], device=(CUDA, 999))
    with pytest.raises(errors.DeviceError):
        target.copy_(source)
    assert not target.numpy().any()


# -- who lets go of what ------------------------------------------------------------------------


def test_deleter_runs_once_per_call(make, fake):
    producer = make([4])
    exports, deletes, _ = fake.counts()
    for _ in range(100):
        INFO(producer)
    now = fake.counts()
    assert now[0] - exports == now[1] - deletes
    assert now[0] - exports == (0 if make.door in ("full", "no_owned", "integer") else 100)


def test_references_are_unchanged_after_many_calls(make):
    producer, live = make([4], strides=[1]), _core.alloc_live()
    INFO(producer)  # from here on its type is remembered
    before = sys.getrefcount(producer), sys.getrefcount(type(producer))
    for _ in range(10_000):
        INFO(producer)
    assert (sys.getrefcount(producer), sys.getrefcount(type(producer))) == before
    assert _core.alloc_live() == live


def test_held_memory_outlives_the_object(make, fake):
    exports, deletes, _ = fake.counts()
    view = raddle.from_dlpack(make([4]))
    part = view[1:3]
    del view
    assert fake.counts()[1] == deletes
    np.testing.assert_array_equal(part.numpy(), [1, 2])
    del part
    assert fake.counts()[0] - exports == fake.counts()[1] - deletes


def test_exception_on_its_way_survives_the_deleter(fake, memory):
    """A refused tensor is released while its error is pending."""

    class Noisy(fake.Producer):
        def __del__(self):
            try:
                raise RuntimeError("inside a deleter")
            except RuntimeError:
                pass

    with pytest.raises(errors.DTypeError, match="lanes"):
        INFO(Noisy(memory.ctypes.data, [4], lanes=2))


def test_types_come_and_go(fake, memory, balanced):
    """More types than the cache has room for, some of them dead: each still finds its own door."""
    doors = {"dlpack": {}, "exchange table": {"__dlpack_c_exchange_api__": fake.table("full")}}
    kept = []
    for i in range(300):
        door = list(doors)[i % 2]
        producer = type(f"T{i}", (fake.Producer,), doors[door])(memory.ctypes.data, [1 + i % 5])
        assert INFO(producer)[5] == door
        if i % 3:
            kept.append((producer, door))
    for producer, door in kept:
        assert INFO(producer)[5] == door


def test_many_threads(make):
    producer, failures = make([4]), []

    def work():
        for _ in range(2000):
            if INFO(producer)[2] != (4,):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
