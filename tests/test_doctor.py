"""`python -m raddle doctor`: its rows, states and exit status on good and bad machines.

Needs: a C compiler for the stub driver.
"""

import json
import os
import shutil

import pytest
from raddle import doctor

from tests.stub_driver import build_stubs, run_script

STATES = {"ok", "absent", "limited", "broken"}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("stubs"))


def run_doctor(prelude="", stubs=None, words=("--json",), **environment):
    script = f"{prelude}\nimport sys\nfrom raddle.__main__ import main\n"
    script += f"sys.exit(main(['doctor', *{words!r}]))"
    return run_script(script, stubs, **environment)


def rows_of(done):
    return {row["check"]: row for row in json.loads(done.stdout)}


def test_rows():
    rows = doctor.report()
    checks = [row["check"] for row in rows]
    assert len(set(checks)) == len(checks)
    for wanted in ("python", "numpy", "torch", "cpu", "cpu attention", "cc", "driver", "nvrtc"):
        assert wanted in checks
    assert "kernel cache" in checks and any(check.endswith("attention") for check in checks)
    for row in rows:
        assert set(row) == {"check", "state", "value", "cure"}
        assert row["state"] in STATES and row["value"]


def test_without_a_gpu(tmp_path):
    done = run_doctor(RADDLE_DISABLE_CUDA="1", RADDLE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done)
    assert rows["driver"]["state"] == "absent"
    assert "RADDLE_DISABLE_CUDA" in rows["driver"]["value"]
    assert rows["gpu"]["state"] == rows["gpu attention"]["state"] == "absent"
    assert rows["cpu attention"]["state"] == "ok"
    assert rows["kernel cache"]["state"] == "ok"
    assert "RADDLE_DISABLE_CUDA='1'" in rows["raddle"]["value"]
    table = run_doctor(words=(), RADDLE_DISABLE_CUDA="1", RADDLE_CACHE_DIR=str(tmp_path))
    assert table.returncode == 0
    for row in rows.values():
        assert any(
            line.startswith(row["check"]) and row["state"] in line
            for line in table.stdout.splitlines()
        )


def test_a_gpu_that_computes_nothing_is_broken(stubs, tmp_path):
    """The stub driver runs no kernel: doctor's comparison must find that out."""
    done = run_doctor(stubs=stubs, RADDLE_CACHE_DIR=str(tmp_path))
    rows = rows_of(done)
    assert rows["driver"]["state"] == "ok" and "CUDA 13.0" in rows["driver"]["value"]
    assert rows["cuda:0"]["state"] == rows["cuda:1"]["state"] == "ok"
    assert "compute capability 9.0, 132 SMs" in rows["cuda:0"]["value"]
    assert "machine code for sm_90a" in rows["nvrtc"]["value"]
    assert rows["cuda:0 attention"]["state"] == "broken"
    assert done.returncode == 1


def panel(**fields):
    """Sets fields of the stub driver before raddle opens it; they are ints at its beginning."""
    names = ["version", "num_devices", "arch", "init_result"]
    lines = [
        "import ctypes",
        "lib = ctypes.CDLL('libcuda.so.1')",
        "lib.stub_cuda_panel.restype = ctypes.POINTER(ctypes.c_int)",
        "state = lib.stub_cuda_panel()",
    ]
    lines += [f"state[{names.index(name)}] = {value}" for name, value in fields.items()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("fields", "check", "state", "words", "code"),
    [
        (dict(init_result=100), "driver", "broken", "does not start", 1),
        (dict(version=11040), "driver", "broken", "too old (CUDA 11.4)", 1),
        (dict(num_devices=0), "gpu", "absent", "none", 0),
        (dict(arch=75), "cuda:0", "absent", "compute capability 7.5", 0),
        (dict(arch=130), "nvrtc", "limited", "does not know the GPU cuda:0", 1),
        (dict(version=12080), "nvrtc", "broken", "pip install nvidia-cuda-nvrtc-cu12", 1),
    ],
)
def test_bad_machines(stubs, tmp_path, fields, check, state, words, code):
    # Without the wheels of this environment: what is found is the stub or nothing.
    prelude = panel(**fields) + "\nimport sys\nsys.modules['torch'] = None"
    done = run_doctor(prelude, stubs, RADDLE_CACHE_DIR=str(tmp_path))
    row = rows_of(done)[check]
    assert (row["state"], done.returncode) == (state, code), done.stdout
    assert words in row["value"]


def test_limits(tmp_path):
    settings = dict(RADDLE_DISABLE_CUDA="1", RADDLE_THREADS="many")
    prelude = "import sys; sys.modules['torch'] = None"
    done = run_doctor(prelude, RADDLE_CACHE_DIR="/proc/raddle", **settings)
    rows = rows_of(done)
    assert done.returncode == 0
    assert rows["kernel cache"]["state"] == "limited"
    assert "RADDLE_CACHE_DIR" in rows["kernel cache"]["cure"]
    assert rows["cpu"]["state"] == "limited" and "'many' is ignored" in rows["cpu"]["cure"]
    assert rows["torch"]["state"] == "absent" and "pip install torch" in rows["torch"]["cure"]
    done = run_doctor(prelude, RADDLE_CACHE_DIR="", **settings)
    assert rows_of(done)["kernel cache"]["state"] == "limited"


def test_the_compiler_of_variants(tmp_path):
    def row(compiler):
        done = run_doctor(RADDLE_DISABLE_CUDA="1", RADDLE_CACHE_DIR=str(tmp_path), CC=compiler)
        assert done.returncode == 0, done.stdout  # everything else works
        return rows_of(done)["cc"]

    found = shutil.which("cc") or pytest.skip("needs cc: no C compiler on the PATH")
    for compiler in ("", "cc", f"{found} -O1"):
        good = row(compiler)
        assert good["state"] == "ok" and os.path.realpath(found) in good["value"]
    none = row("no-such-cc -O2")
    assert none["state"] == "absent" and "no no-such-cc:" in none["value"]
    assert "apt install gcc" in none["cure"] and "CC" in none["cure"]
    bad = row("cc -fno-such-flag")
    assert bad["state"] == "limited" and "-fno-such-flag" in bad["value"] and bad["cure"]
    assert row("false")["state"] == "limited"  # a program that says nothing


def test_a_probe_that_fails_is_a_row():
    prelude = """
import raddle.doctor
def fail():
    raise ValueError("of its own")
raddle.doctor._check_numpy = fail
"""
    done = run_doctor(prelude, RADDLE_DISABLE_CUDA="1")
    rows = rows_of(done)
    assert rows["numpy"]["state"] == "broken"
    assert rows["numpy"]["value"] == "ValueError: of its own"
    assert rows["cpu attention"]["state"] == "ok"  # the others still run
    assert done.returncode == 1
