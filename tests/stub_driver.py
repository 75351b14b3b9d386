"""Runs a script in a process whose CUDA driver and NVRTC are the stubs of tests/c.

Needs: gcc or clang. The stub keeps the driver's books and rules on the host and runs no kernel.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import raddle

ROOT = Path(__file__).resolve().parent.parent

# For scripts: the beginning of the stub's panel (tests/c/stub.h).
PANEL = """
import ctypes

class Panel(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("version", "num_devices", "arch", "init_result")]
    _fields_ += [("free_bytes", ctypes.c_size_t), ("fail_function", ctypes.c_char_p)]
    _fields_ += [(name, ctypes.c_int) for name in ("fail_skip", "fail_result", "fail_work")]

_stub = ctypes.CDLL("libcuda.so.1")
_stub.stub_cuda_panel.restype = ctypes.POINTER(Panel)
panel = _stub.stub_cuda_panel().contents

def fail_call(function, result):  # the next one answers result
    panel.fail_function, panel.fail_skip, panel.fail_result = function, 0, result
"""


def build_stubs(folder, blas=False):
    """The stub libraries in folder, cublasLt with blas; skips without a compiler or a checkout."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs gcc: no C compiler on the PATH")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("needs a checkout: csrc is not here")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-shared", "-fPIC", "-O1"]
    flags += [f"-I{ROOT / name}" for name in ("csrc", "csrc/include", ".", "tests/c")]
    for library, source in (
        ("libcuda.so.1", "stub_cuda.c"),
        ("libnvrtc.so.13", "stub_nvrtc.c"),
        *([("libcublasLt.so.13", "stub_cublaslt.c")] if blas else []),
    ):
        command = [compiler, *flags, ROOT / "tests" / "c" / source, "-o", folder / library]
        subprocess.run([str(word) for word in command], check=True)
    return folder


def run_script(script, stubs=None, **environment):
    """Runs script with this raddle; returns the finished process."""
    package = str(Path(raddle.__file__).resolve().parent.parent)
    paths = [package, str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **environment,
    }
    if stubs is not None:
        variables["LD_LIBRARY_PATH"] = str(stubs)
        script = f"import ctypes; ctypes.CDLL({str(stubs / 'libnvrtc.so.13')!r})\n{script}"
    return subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, env=variables, timeout=120
    )


def check_script(script, stubs=None, **environment):
    """run_script, and the script must succeed; returns what it printed."""
    done = run_script(script, stubs, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
