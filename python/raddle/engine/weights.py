"""Where the numbers of a model come from: safetensors files, or a seeded generator.

A source has `names` (a set, or None when it can make up any tensor) and
`read_into(name, out, dtype, shape, rows, cols)`, which fills a piece of host memory with a piece of
one tensor, converted on the way. Nothing is held twice: file bytes go straight into `out` where
the dtypes agree, else through a buffer of a few MiB.

The safetensors library says whether a file is what its header says: eight bytes of length, JSON
(name -> dtype, shape, offsets), data. The data is read here, because NumPy has no bfloat16 for the
library to hand out, and because fused weights want to be read where they will stay.
"""

import json
import os
import zlib
from math import prod
from pathlib import Path

from ..errors import RaddleIOError, ShapeError, UnsupportedError
from .config import read_json
from .tokenizer import need

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FILE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFER_BYTES = 4 << 20
INDEX_NAME = "model.safetensors.index.json"


def open_weights(folder):
    """The safetensors files of a model folder as one source; errors name the file and the cure."""
    folder = Path(folder)
    index_path, single_path = folder / INDEX_NAME, folder / "model.safetensors"
    if index_path.exists():
        return SafetensorsFolder(folder, _read_index(index_path))
    if single_path.exists():
        return SafetensorsFolder(folder, [single_path.name])
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return SafetensorsFolder(folder, found)
    if found:
        raise RaddleIOError(f"{index_path}: no such file, and there is more than one shard")
    others = sorted(path.name for path in folder.glob("*.bin"))
    cure = f" (found {', '.join(others)}: save the model as safetensors)" if others else ""
    raise RaddleIOError(f"{single_path}: no such file{cure}")


def _read_index(path):
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RaddleIOError(f"{path}: weight_map is missing or not an object")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise RaddleIOError(f"{path}: {tensor}: {name!r} is not a file name of this folder")
        if not (path.parent / name).exists():
            raise RaddleIOError(f"{path}: {tensor} is in {name}, which is not in the folder")
    return weight_map


class SafetensorsFolder:
    """One or many safetensors files. files: file names, or a map of tensor name to file name."""

    def __init__(self, folder, files):
        self._where = {}  # name -> (file, dtype, shape, offset)
        self._fds = {}
        is_map = isinstance(files, dict)
        for file_name in sorted(set(files.values() if is_map else files)):
            path = str(Path(folder) / file_name)
            fd = self._fds[path] = os.open(path, os.O_RDONLY)
            for name, entry in _read_header(path, fd).items():
                if not is_map or files.get(name) == file_name:
                    self._where[name] = (path, *entry)
        if is_map:
            for name in files:
                if name not in self._where:
                    raise RaddleIOError(f"{Path(folder) / files[name]}: tensor {name} is missing")
        self._place = str(Path(folder) / INDEX_NAME) if is_map else path
        self.names = set(self._where)

    def close(self):
        """Close the files; a second call does nothing."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    __del__ = close

    def read_into(self, name, out, dtype, shape, rows=None, cols=None):
        """Fill out, a C-contiguous array (bfloat16 as uint16), with tensor `name` or a piece of it.

        shape is what the whole tensor must have; rows and cols are (begin, end) of its first and
        second axis, or None for all of it.
        """
        if name not in self._where:
            raise RaddleIOError(f"{self._place}: tensor {name} is missing, expected {list(shape)}")
        path, file_dtype, file_shape, offset = self._where[name]
        if file_shape != tuple(shape):
            raise ShapeError(
                f"{path}: {name}: expected shape {list(shape)} from config.json, "
                f"got {list(file_shape)}"
            )
        if file_dtype not in _FILE_DTYPES:
            raise UnsupportedError(
                f"{path}: {name}: dtype {file_dtype}; this engine reads {', '.join(_FILE_DTYPES)}"
            )
        source = _FILE_DTYPES[file_dtype]
        width = prod(shape[1:])
        begin, end = rows or (0, shape[0])
        row_bytes = width * ITEM_BYTES[source]
        flat = out.reshape(end - begin, -1)
        fd = self._fds[path]
        if source == dtype and cols is None:
            _read_exactly(fd, memoryview(flat).cast("B"), offset + begin * row_bytes, path, name)
            return
        import numpy as np

        step = max(1, _BUFFER_BYTES // max(1, row_bytes))
        buffer = np.empty((min(step, end - begin), width), _storage(source))
        for at in range(begin, end, step):
            part = buffer[: min(step, end - at)]
            _read_exactly(fd, memoryview(part).cast("B"), offset + at * row_bytes, path, name)
            piece = part if cols is None else part[:, cols[0] : cols[1]]
            flat[at - begin : at - begin + len(part)] = convert(piece, source, dtype)


def _read_exactly(fd, view, offset, path, name):
    while view:
        got = os.preadv(fd, [view], offset)
        if not got:
            raise RaddleIOError(f"{path}: {name}: the file ends at byte {offset}: it is truncated")
        view, offset = view[got:], offset + got


def _read_header(path, fd):
    """{name: (dtype, shape, offset in the file)}, after the library found the header to be true."""
    library = need("safetensors")
    try:
        with library.safe_open(path, "np"):  # dtypes, shapes, offsets without gaps, the file's size
            pass
    except (library.SafetensorError, OSError) as error:
        raise RaddleIOError(
            f"{path}: {error} (the file has {os.fstat(fd).st_size} bytes): it is truncated, "
            "damaged or no safetensors file; copy it again"
        ) from None
    size = int.from_bytes(os.pread(fd, 8, 0), "little")
    header = json.loads(os.pread(fd, size, 8))
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


class DummyWeights:
    """Random numbers of the right shape: any model, no file, the same for the same seed.

    A matrix repeats a block of 65521 (a prime, so rows differ) normal numbers of standard deviation
    `std`: gigabytes are made at the speed of a copy.
    """

    names = None
    _BLOCK = 65521

    def __init__(self, seed=0, std=0.02):
        self._seed, self._std = seed, std

    def close(self):
        """Nothing to close."""

    def read_into(self, name, out, dtype, shape, rows=None, cols=None):
        """As SafetensorsFolder.read_into."""
        import numpy as np

        block = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        block = (block.standard_normal(self._BLOCK) * self._std).astype(np.float32)
        if name.endswith("norm.weight"):
            block += 1
        block = convert(block, "float32", dtype)
        width = prod(shape[1:])
        begin, end = rows or (0, shape[0])
        flat = out.reshape(end - begin, -1)
        step = max(1, _BUFFER_BYTES // width)
        for at in range(begin, end, step):
            count = min(step, end - at)
            start = at * width % self._BLOCK
            repeats = -(-(start + count * width) // self._BLOCK)
            piece = np.tile(block, repeats)[start : start + count * width].reshape(count, width)
            flat[at - begin : at - begin + count] = (
                piece if cols is None else piece[:, slice(*cols)]
            )


def _storage(dtype):
    import numpy as np

    return {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]


def convert(array, source, dtype):
    """Numbers of dtype name `source` as `dtype`; bfloat16 is uint16, rounded to nearest even."""
    import numpy as np

    if source == dtype:
        return array
    wide = bfloat16_to_float32(array) if source == "bfloat16" else array.astype(np.float32)
    if dtype == "bfloat16":
        return float32_to_bfloat16(wide)
    with np.errstate(over="ignore"):  # beyond float16's range: infinity, as the cast defines it
        return wide.astype(_storage(dtype))


def bfloat16_to_float32(array):
    """uint16 bits of bfloat16 as float32 of the same shape."""
    import numpy as np

    return (array.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(array):
    """float32 as uint16 bits of bfloat16, ties to even; a NaN stays one."""
    import numpy as np

    array = np.ascontiguousarray(array)
    bits = array.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)
