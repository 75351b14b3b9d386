"""The C core of raddle.blend by itself, for tests that hold its parts against references: built
from csrc with tests/blend_probe.c, called by ctypes.

Needs: a C compiler, else the tests that ask are skipped.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", '-DRADDLE_VERSION="test"', "-O1", "-g", "-shared", "-fPIC"]


def build(folder):
    """The library; skips without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs compiler: cc or gcc on the PATH")
    sources = [CSRC / "base" / f"{name}.c" for name in ("status", "alloc", "hash")]
    sources += [*sorted((CSRC / "blend").glob("*.c")), ROOT / "tests" / "blend_probe.c"]
    target = folder / "blend_probe.so"
    done = subprocess.run(
        [*compiler.split(), *FLAGS, f"-I{CSRC}", f"-I{CSRC / 'include'}", *map(str, sources),
         "-o", str(target), "-lm"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    library.probe_open.restype = ctypes.c_void_p
    for name in ("sums", "density", "survey"):
        getattr(library, f"probe_{name}").restype = ctypes.c_double
    return library


def _at(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


class Probe:
    """Requests (input, output, ids) with max_tokens and groups, in the core."""

    def __init__(self, library, block, rows, cost, most=None, groups=None):
        self._library, self.count = library, len(rows)
        most = [output for _, output, _ in rows] if most is None else most
        groups = [0] * len(rows) if groups is None else groups
        numbers = numpy.array(
            [(row[0], row[1], m, g, len(row[2])) for row, m, g in zip(rows, most, groups)],
            numpy.int32,
        )
        ids = numpy.array([i for _, _, own in rows for i in own] or [0], numpy.uint64)
        names = ("flops_per_token", "flops_per_score", "kv_bytes_per_token", "weight_bytes",
                 "attention_flops_rate", "read_rate", "alpha", "overhead")  # fmt: skip
        fields = [getattr(cost, name) for name in names]
        fields = numpy.array([*fields, *cost.gemm_rate, *cost.rate_tokens], float)
        self._core = ctypes.c_void_p(
            library.probe_open(
                ctypes.c_int32(block), ctypes.c_int64(len(rows)), _at(numbers), _at(ids),
                _at(fields), ctypes.c_int32(len(cost.gemm_rate)),
            )
        )  # fmt: skip
        assert self._core, "the core refused the requests"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._library.probe_close(self._core)

    def tree(self):
        """(nodes [..][parent, end, depth, request_begin, request_end], order, shared_before,
        shared), the last two in that order."""
        nodes = numpy.zeros((self._library.probe_num_nodes(self._core), 5), numpy.int32)
        arrays = [numpy.zeros(self.count, numpy.int32) for _ in range(3)]
        self._library.probe_tree(self._core, _at(nodes), *map(_at, arrays))
        return nodes, *arrays

    def guess(self, seen, so_far=None):
        """[count][mean, square, room]."""
        lengths = numpy.zeros((self.count, 3))
        arrays = [None if a is None else numpy.array(a, numpy.int32) for a in (seen, so_far)]
        assert self._library.probe_guess(self._core, *map(_at, arrays), _at(lengths)) == 0
        return lengths

    def sums(self, lengths=None):
        """(compute, read, tokens): sums over the tree's order, from 0 on."""
        arrays = [numpy.zeros(self.count + 1) for _ in range(2)]
        tokens = self._library.probe_sums(self._core, _at(lengths), *map(_at, arrays))
        return *arrays, tokens

    def density(self, request, cached, lengths=None):
        return self._library.probe_density(
            self._core, _at(lengths), ctypes.c_int32(request), ctypes.c_int64(cached)
        )

    def survey(self, pool, step_tokens):
        """(work, fewest steps, bound in seconds)."""
        work, bound = numpy.zeros(3), numpy.zeros(1)
        least = self._library.probe_survey(
            self._core, ctypes.c_int64(pool), ctypes.c_int32(step_tokens), _at(work), _at(bound)
        )
        return work, least, float(bound[0])

    def plan(self, policy, pool, step_tokens, lengths=None):
        """Streams of requests."""
        order, ends = numpy.zeros(self.count, numpy.int32), numpy.zeros(32, numpy.int32)
        streams = self._library.probe_plan(
            self._core, policy.encode(), ctypes.c_int64(pool), ctypes.c_int32(step_tokens),
            _at(lengths), _at(order), _at(ends),
        )  # fmt: skip
        assert streams >= 0
        return [part.tolist() for part in numpy.split(order, ends[: streams - 1])]


def share_out(library, density, pool, ends):
    """ends [2][density, prompt, output, held] -> [2][memory, budget]."""
    given, found = numpy.array(ends, float), numpy.zeros((2, 2))
    library.probe_share_out(ctypes.c_double(density), ctypes.c_double(pool), _at(given), _at(found))
    return found
