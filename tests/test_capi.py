"""The C table raddle._core._C_API, used by an extension module that is compiled here.

Needs: numpy, a C compiler and Python's headers; g++ for the check that C++ reads the header.
"""

import gc
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
import raddle
from raddle import _core
from raddle.errors import (
    ArgumentError,
    CapacityError,
    DTypeError,
    ShapeError,
)

from tests.attention_cases import Batch, assert_close, from_bits
from tests.native import build_module
from tests.reference.attention import merge

pytest_plugins = ["tests.producers"]

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}  # raddle_dtype
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
HEADERS = [sysconfig.get_path("include"), raddle.get_include()]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The module of capi_client.c, compiled against the installed header."""
    include = [*HEADERS, HERE.parent / "csrc" / "third_party" / "dlpack"]
    return build_module(tmp_path_factory.mktemp("client"), "capi_client", WARNINGS, include)


def results(rows, heads, dim, dtype):
    return np.full((rows, heads, dim), 7, STORAGE[dtype]), np.full((rows, heads), 7, np.float32)


# ---- attention


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged_decode(client, dtype, layout):
    rng = np.random.default_rng(1)
    shape = {"num_qo_heads": 6, "num_kv_heads": 3, "head_dim": 40, "page_size": 5}
    batch = Batch(rng, [1, 130, 0, 17], dtype=dtype, layout=layout, **shape)
    out, lse = results(4, 6, 40, dtype)
    client.attention(
        *(batch.q, batch.kv_cache, None, out, lse),
        *(None, batch.indptr, batch.indices, batch.last_page_len),
        *(DTYPES[dtype], *shape.values(), layout == "HND", False),
    )
    want_out, want_lse = batch.expected()
    assert_close(from_bits(out, dtype), want_out, dtype)
    assert_close(lse, want_lse, dtype)


def test_causal_prefill_of_a_pair(client):
    """K and V apart, several rows a request; no lse, int64 tables, raddle's own tensors."""
    rng = np.random.default_rng(2)
    shape = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 32, "page_size": 8}
    qo_lens = [5, 1, 9]
    batch = Batch(rng, [20, 1, 9], qo_lens=qo_lens, packed=False, dtype="float32", **shape)
    out, _ = results(15, 4, 32, "float32")
    tables = (batch.qo_indptr, batch.indptr, batch.indices, batch.last_page_len)
    client.attention(
        *(raddle.from_dlpack(batch.q), *batch.kv_cache, raddle.from_dlpack(out), None),
        *(table.astype(np.int64) for table in tables),
        *(DTYPES["float32"], *shape.values(), False, True),
    )
    assert_close(out, batch.expected(causal=True)[0], "float32")


def small(rng):
    shape = {"num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 4}
    return Batch(rng, [6, 3], dtype="float32", **shape), (DTYPES["float32"], *shape.values(), 0, 0)


BAD = {
    "no q": ({"q": None}, ArgumentError, "args: expected q, kv and out, got NULL for q"),
    "no out": ({"out": None}, ArgumentError, "got NULL for out"),
    "no cache": ({"kv_cache": None}, ArgumentError, "k_or_kv: expected an address, got NULL"),
    "no table": ({"indptr": None}, ArgumentError, "indptr: expected .batch . 1. offsets"),
    "no tensor": ({"q": [1.0]}, DTypeError, "q: expected a tensor"),
    "dtype": ({"q": np.zeros((2, 2, 8), np.int8)}, DTypeError, "q: expected dtype float32"),
    "rows": ({"q": np.zeros((3, 2, 8), np.float32)}, ShapeError, r"q: expected shape \[2, 2, 8\]"),
    "page id": ({"indices": np.array([0, 99, 1])}, ArgumentError, "page id 99 at position 1"),
    "capacity": ({"indptr": np.arange(10)}, CapacityError, "9 requests, the plan was made for 8"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_raise_as_in_python(client, name):
    change, error, message = BAD[name]
    batch, words = small(np.random.default_rng(3))
    out, lse = results(2, 2, 8, "float32")
    given = {"q": batch.q, "kv_cache": batch.kv_cache, "v": None, "out": out, "lse": lse}
    given |= {"qo_indptr": None, "indptr": batch.indptr, "indices": batch.indices}
    given["last_page_len"] = batch.last_page_len
    with pytest.raises(error, match=message):
        client.attention(*(given | change).values(), *words)
    assert (out == 7).all()
    client.attention(*given.values(), *words)
    assert_close(out, batch.expected()[0], "float32")


def test_append_and_merge(client):
    rng = np.random.default_rng(4)
    k, v = (rng.standard_normal((5, 2, 8)).astype(np.float32) for _ in range(2))
    cache = np.zeros((3, 2, 4, 2, 8), np.float32)
    client.call("append", (k, v, cache, np.array([11, -1, 0, 5, 6])), 0b100, 4)
    want = np.zeros_like(cache)
    for row, slot in ((0, 11), (2, 0), (3, 5), (4, 6)):
        want[slot // 4, :, slot % 4] = k[row], v[row]
    np.testing.assert_array_equal(cache, want)

    by_table = np.zeros_like(cache)
    tables = [0, 0, 0, 1, -1], [0, 4, 5, 2, 0], [0, 2, 3], [2, 0, 1]
    client.call("append", (k, v, by_table, *map(np.array, tables)), 0b100, 4)
    want[:] = 0
    for row, slot in ((0, 8), (1, 0), (2, 1), (3, 6)):
        want[slot // 4, :, slot % 4] = k[row], v[row]
    np.testing.assert_array_equal(by_table, want)

    states = rng.standard_normal((3, 5, 2, 8)).astype(np.float32)
    sums = rng.standard_normal((3, 5, 2)).astype(np.float32) * 4
    out, lse = results(5, 2, 8, "float32")
    pair = (states[0], sums[0], states[1], sums[1], None, out, lse)
    client.call("merge", pair, 0b1100000, 0)
    for got, expected in zip((out, lse), merge(states[:2], sums[:2])):
        assert_close(got, expected, "float32")
    many = (np.moveaxis(states, 0, 1).copy(), np.moveaxis(sums, 0, 1).copy(), out, lse)
    client.call("merge", many, 0b1100, 0)
    for got, expected in zip((out, lse), merge(states, sums)):
        assert_close(got, expected, "float32")


# ---- tensors


def test_what_was_opened_to_be_read_is_not_written(client):
    v, s = np.ones((2, 1, 8), np.float32), np.zeros((2, 1), np.float32)
    out, lse = results(2, 1, 8, "float32")
    with pytest.raises(ArgumentError, match="given: expected a tensor that may be written"):
        client.call("merge", (v, s, v, s, None, out, lse), 0b1000000, 0)
    assert (out == 7).all()
    cache = np.zeros((3, 2, 4, 1, 8), np.float32)
    with pytest.raises(ArgumentError, match="read-only"):
        client.call("append", (v, v, cache, np.array([0, 1])), 0, 4)


def test_tensors_of_the_callers_own_making(client):
    source = np.arange(24, dtype=np.float32).reshape(3, 8)
    target = np.zeros_like(source)
    addresses = source.ctypes.data, target.ctypes.data
    assert client.copy(*addresses, 3, 8, 1) == ("RADDLE_OK", "")
    np.testing.assert_allclose(target, source, rtol=1e-6)
    for change, status, message in (
        ((*addresses, 3, 8, 0), "RADDLE_ERR_VALUE", "v_out: expected a tensor that may be written"),
        ((*addresses, 3, 8, 4), "RADDLE_ERR_VALUE", "v_out: access: expected RADDLE_READ or"),
        ((addresses[0] + 1, addresses[1], 3, 8, 1), "RADDLE_ERR_SHAPE", "v: "),
        ((*addresses, 1 << 62, 1 << 62, 1), "RADDLE_ERR_SHAPE", "v: "),
    ):
        got = client.copy(*change)
        assert got[0] == status and got[1].startswith(message), got


def test_open_refuses(client):
    array = np.zeros(4, np.float32)
    client.open(array, "x", 1, 0)
    client.open(array, "x" * 500, 0, 1)
    locked = np.zeros(4, np.float32)
    locked.flags.writeable = False
    client.open(locked, "x", 0, 0)
    for arguments, error, message in (
        ((None, "x", 0, 0), ArgumentError, "object: expected an address, got NULL"),
        ((array, None, 0, 0), ArgumentError, "name: expected an address, got NULL"),
        ((array, "x", 2, 0), ArgumentError, "x: access: expected .* or RADDLE_WRITE, got 2"),
        ((locked, "x", 1, 0), ArgumentError, "x: expected a tensor that may be written"),
        ((array, "x", 0, 3), DTypeError, "x: expected dtype bfloat16"),
        ((array, "x", 0, 99), DTypeError, "x: expected dtype none, got float32"),
        ((array, "y" * 500, 0, 3), DTypeError, "^y{63}: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            client.open(*arguments)


@pytest.mark.parametrize("table", ["full", "no_view", "no_owned", None])
def test_streams_and_deleters(client, fake, memory, balanced, table):
    """The producer's current stream where it can say; what it exported is deleted at close."""
    members = {"__dlpack_c_exchange_api__": fake.table(table)} if table else {}
    kind = type("Fake", (fake.Producer,), members)
    on_gpu = client.stream(kind(memory.ctypes.data, [4], device=(2, 3)))
    assert on_gpu == (0x5003 if table in ("full", "no_view") else None)
    assert client.stream(kind(memory.ctypes.data, [4])) is None


def test_nothing_stays_open(client):
    """Of the objects: raddle's own blocks are counted after every test."""
    array = np.zeros(4, np.float32)
    before = sys.getrefcount(array)
    client.open(array, "x", 1, 0)
    with pytest.raises(DTypeError):
        client.open(array, "x", 1, 3)
    gc.collect()
    assert sys.getrefcount(array) == before


def test_scratch_of_the_callers(client):
    told, size, *releases = client.lend(0)
    assert told == ("RADDLE_OK", "") and releases == [0, 1]
    if size == 0:
        pytest.skip("needs 2 CPUs: a plan for one thread has no scratch that could be too small")
    (status, message), _, *releases = client.lend(1)
    assert status == "RADDLE_ERR_CAPACITY" and "bytes needed" in message
    assert releases == [1, 1]


# ---- sizes, addresses, threads


@pytest.mark.parametrize("which", ["spec", "batch", "args"])
def test_structs_of_other_sizes(client, which):
    size = client.sizes()[which]
    same = client.sized(which, size, 0, 0)
    empty = {
        "spec": ("RADDLE_OK", ""),
        "batch": ("RADDLE_ERR_VALUE", "indptr: expected [batch + 1] offsets"),
        "args": ("RADDLE_ERR_STATE", "run: nothing is planned yet"),
    }[which]
    assert same[0] == empty[0] and same[1].startswith(empty[1])
    assert client.sized(which, size + 40, 0, 0) == same  # a newer caller that asks for nothing new
    assert client.sized(which, 1024, 0, 0) == same
    status, message = client.sized(which, size + 40, size + 39, 1)
    assert status == "RADDLE_ERR_UNSUPPORTED"
    assert f"{which}: its struct_size is {size + 40}" in message and "upgrade raddle" in message
    assert client.sized(which, size, size, 1) == same  # not the caller's to be looked at
    for wrong in (0, 3, 1025, 0xFFFFFFFF):
        status, message = client.sized(which, wrong, 0, 0)
        assert status == "RADDLE_ERR_VALUE" and f"sizeof the struct ({size} in this lib" in message
        assert message.endswith(f"got {wrong}")


def test_an_older_callers_spec(client):
    size = client.sizes()["spec"]
    assert client.sized("spec", size - 8, 0, 0) == ("RADDLE_OK", "")  # without variant
    assert client.sized("spec", size - 8, size - 8, 9) == ("RADDLE_OK", "")  # somebody else's byte
    assert client.sized("spec", size - 40, 0, 0) == ("RADDLE_OK", "")  # up to max_ctas
    status, message = client.sized("spec", 16, 0, 0)  # knows a device and q_dtype
    assert status == "RADDLE_ERR_SHAPE" and message.startswith("head_dim: ")
    status, message = client.sized("spec", 4, 0, 0)
    assert status != "RADDLE_OK" and message


def test_null_addresses(client):
    rows = client.nulls(np.zeros((1, 2, 1, 1, 8), np.float32))
    assert len(rows) == 17
    for status, message in rows:
        assert status == "RADDLE_ERR_VALUE", message
        assert "got NULL" in message or "null pointer" in message


def test_the_record_is_the_threads_own(client):
    told = []

    def fail_there():
        told.append(client.last())
        told.append(client.sized("batch", 0, 0, 0))

    here = client.sized("spec", 0, 0, 0)
    thread = threading.Thread(target=fail_there)
    thread.start()
    thread.join()
    assert told[0] == ("RADDLE_OK", "") and told[1][1].startswith("batch: ")
    assert client.last() == here and here[1].startswith("spec: ")


# ---- the capsule and the header


def test_capsule(client, monkeypatch):
    assert 'capsule object "raddle._core._C_API"' in repr(_core._C_API)
    client.import_again()
    size, version = client.sizes()["api"], client.sizes()["version"]
    for changed, fits in (
        ((version, size + 64), True),  # entries were added
        ((version, size - 8), False),
        ((version + 1, size), False),
        ((0, size), False),
    ):
        monkeypatch.setattr(_core, "_C_API", client.table(*changed))
        if fits:
            client.import_again()
            continue
        with pytest.raises(ImportError, match=f"version {changed[0]} and {changed[1]} bytes.*"):
            client.import_again()
    monkeypatch.setattr(_core, "_C_API", object())
    with pytest.raises(AttributeError, match="not valid"):
        client.import_again()


def test_include_folder():
    folder = Path(raddle.get_include())
    assert [path.name for path in folder.glob("*")] == ["raddle.h"]
    source = HERE.parent / "csrc" / "include" / "raddle.h"
    assert (folder / "raddle.h").read_text() == source.read_text()


def test_header_is_cpp_too(tmp_path):
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++: not on the PATH")
    for first in ("", "#include <Python.h>\n"):
        program = tmp_path / "program.cpp"
        program.write_text(first + '#include "raddle.h"\nraddle_attention_spec spec;\n')
        flags = ["-std=c++17", *WARNINGS, *(f"-I{folder}" for folder in HEADERS)]
        done = subprocess.run(
            [compiler, *flags, "-fsyntax-only", str(program)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
