"""The kernel cache and its commands: path, clear, verify, bundles, warmup, many processes.

Needs: a C compiler for the stub driver and NVRTC. The files themselves are tested natively in
tests/c/test_cache.c.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from raddle import _core, cache, warmup
from raddle.__main__ import main
from raddle.errors import DeviceError, RaddleIOError

from tests.stub_driver import build_stubs, check_script, run_script


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return build_stubs(tmp_path_factory.mktemp("stubs"))


WARM = """
import warnings
from raddle import _core
name, config, _ = _core.kernel_configs()[{index}]
print(_core.warm_kernel(name, config, "sm_90a"))
"""


def warm(stubs, folder, index=0):
    """Where a fresh process found a kernel: compiled, disk or bundle."""
    script = WARM.format(index=index)
    return check_script(script, stubs, RADDLE_CACHE_DIR=str(folder)).strip()


def kernels(folder):
    return sorted(Path(folder).glob("*.kernel"))


# -- one folder, many processes -----------------------------------------------------------------


def test_second_process_finds_it(stubs, tmp_path):
    assert warm(stubs, tmp_path) == "compiled"
    assert warm(stubs, tmp_path) == "disk"
    assert warm(stubs, tmp_path, index=1) == "compiled"
    assert len(kernels(tmp_path)) == 2
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "foreign"])
def test_damaged_files_are_compiled_anew(stubs, tmp_path, damage):
    warm(stubs, tmp_path)
    [path] = kernels(tmp_path)
    whole = path.read_bytes()
    broken = {
        "byte": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "foreign": os.urandom(len(whole)),
    }
    path.write_bytes(broken[damage])
    assert warm(stubs, tmp_path) == "compiled"
    assert warm(stubs, tmp_path) == "disk"
    assert len(path.read_bytes()) == len(whole)


def test_processes_at_once(stubs, tmp_path):
    """All of them get their kernels; what stays is one whole file for each."""
    script = """
from concurrent.futures import ThreadPoolExecutor
from raddle import _core
kernels = [(name, config, "sm_80") for name, config, _ in _core.kernel_configs()[:6]]
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda kernel: _core.warm_kernel(*kernel), kernels * 3))
"""
    variables = {**os.environ, "RADDLE_CACHE_DIR": str(tmp_path)}
    probe = run_script("import sys; print(sys.path)", stubs, **variables)
    assert probe.returncode == 0, probe.stderr
    variables |= {
        "LD_LIBRARY_PATH": str(stubs),
        "PYTHONPATH": str(Path(_core.__file__).parent.parent),
    }
    script = f"import ctypes; ctypes.CDLL({str(stubs / 'libnvrtc.so.13')!r})\n{script}"
    command = [sys.executable, "-c", script]
    running = [
        subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    for process in running:
        _, words = process.communicate(timeout=120)
        assert process.returncode == 0, words
    assert len(kernels(tmp_path)) == 6
    assert not list(tmp_path.glob(".tmp*"))
    verify = "from raddle import cache; print(cache.verify())"
    found = check_script(verify, stubs, RADDLE_CACHE_DIR=str(tmp_path))
    assert "'files': 6" in found and "'damaged': 0" in found


UNWRITABLE = """
import warnings
import raddle
from raddle import _core, attention
spec = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, max_batch=8, max_pages=64,
            dtype="float16", device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    attention.BatchDecode(**spec)
    attention.BatchDecode(**spec | dict(head_dim=128))
assert len(caught) == 1, [str(warning.message) for warning in caught]
assert caught[0].category is RuntimeWarning
assert "RADDLE_CACHE_DIR" in str(caught[0].message), caught[0].message
assert _core.notices() == [str(caught[0].message)]
"""


def test_a_folder_that_cannot_be_written_warns_once(stubs):
    check_script(UNWRITABLE, stubs, RADDLE_CACHE_DIR="/proc/raddle")


def test_a_full_disk_warns_once(stubs, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    check_script(limit + UNWRITABLE, stubs, RADDLE_CACHE_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_log_tells_of_kernels(stubs, tmp_path):
    done = run_script(WARM.format(index=0), stubs, RADDLE_CACHE_DIR=str(tmp_path), RADDLE_LOG="2")
    assert done.stderr.startswith("raddle: compiled ")
    done = run_script(WARM.format(index=0), stubs, RADDLE_CACHE_DIR=str(tmp_path), RADDLE_LOG="0")
    assert done.stderr == ""


# -- the folder ---------------------------------------------------------------------------------


def test_where_the_folder_is(tmp_path):
    script = "from raddle import cache; print(cache.path())"
    home = dict(HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert check_script(script, RADDLE_CACHE_DIR="/some/where").strip() == "/some/where"
    assert check_script(script, RADDLE_CACHE_DIR="").strip() == ""
    unset = "import os; os.environ.pop('RADDLE_CACHE_DIR', None)\n" + script
    assert check_script(unset, **home).strip() == f"{tmp_path}/.cache/raddle"
    home["XDG_CACHE_HOME"] = "/xdg"
    assert check_script(unset, **home).strip() == "/xdg/raddle"
    home["XDG_CACHE_HOME"] = "relative"
    assert check_script(unset, **home).strip() == f"{tmp_path}/.cache/raddle"


def test_import_makes_no_folder(tmp_path):
    folder = tmp_path / "cache"
    check_script("import raddle, raddle.cache", RADDLE_CACHE_DIR=str(folder))
    assert not folder.exists()


def command(stubs, folder, *words):
    script = f"import sys; from raddle.__main__ import main; sys.exit(main({list(words)!r}))"
    return run_script(script, stubs, RADDLE_CACHE_DIR=str(folder))


def test_commands(stubs, tmp_path):
    assert command(stubs, tmp_path, "cache", "--path").stdout.strip() == str(tmp_path)
    assert "0 kernels, 0.0 MB of 256" in command(stubs, tmp_path, "cache").stdout
    warm(stubs, tmp_path)
    warm(stubs, tmp_path, index=1)
    (tmp_path / "notes.txt").write_text("not raddle's")
    kernels(tmp_path)[0].write_bytes(b"damaged")
    done = command(stubs, tmp_path, "cache", "--verify")
    assert "2 kernels read, 1 damaged and removed" in done.stdout
    assert "1 kernels read, 0 damaged" in command(stubs, tmp_path, "cache", "--verify").stdout
    assert "1 kernels removed" in command(stubs, tmp_path, "cache", "--clear").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    done = command(stubs, "", "cache", "--clear")
    assert done.returncode == 1 and "there is no folder" in done.stdout
    assert "stay in memory" in command(stubs, "", "cache").stdout
    with pytest.raises(SystemExit):
        main(["cache", "--clear", "--path"])


# -- warmup and bundles -------------------------------------------------------------------------


def test_warmup_and_bundles(stubs, tmp_path):
    first, second, bundle = tmp_path / "first", tmp_path / "second", tmp_path / "kernels.bundle"
    count = sum(not hopper_only for _, _, hopper_only in _core.kernel_configs())
    assert 0 < count < len(_core.kernel_configs())  # some are not for sm_80
    done = command(stubs, first, "warmup", "--arch", "sm_80", "-o", str(bundle))
    assert done.returncode == 0, done.stderr
    assert f"{count} kernels compiled, 0 were there" in done.stdout
    assert len(kernels(first)) == count
    done = command(stubs, first, "warmup", "--arch", "sm_80")
    assert f"0 kernels compiled, {count} were there" in done.stdout

    done = command(stubs, second, "cache", "--import", str(bundle))
    assert f"{count} kernels imported" in done.stdout
    script = WARM.format(index=0).replace("sm_90a", "sm_80")
    found = check_script(script, stubs, RADDLE_CACHE_DIR=str(second))
    assert found.strip() == "bundle"
    in_memory = f"from raddle import cache; print(cache.load_bundle({str(bundle)!r}))\n{script}"
    found = check_script(in_memory, stubs, RADDLE_CACHE_DIR="")
    assert found.split() == [str(count), "bundle"]

    data = bundle.read_bytes()
    for broken in (data[:-1], data[:50], b"", b"x" * 200, data[:100] + b"?" + data[101:]):
        bundle.write_bytes(broken)
        done = command(stubs, second, "cache", "--import", str(bundle))
        assert done.returncode == 1 and "kernels.bundle" in done.stdout
    with pytest.raises(RaddleIOError, match="cannot open"):
        cache.load_bundle(tmp_path / "none")


def test_warmup_needs_to_know_what_for(stubs, tmp_path):
    with pytest.raises(DeviceError, match="sm_80 or sm_90a"):
        if not warmup.gpu_archs():
            warmup.warmup()
        raise DeviceError("sm_80 or sm_90a")  # with a GPU here there is nothing to refuse
    done = command(stubs, tmp_path, "warmup", "--arch", "hopper")
    assert done.returncode == 1 and "arch: expected one like" in done.stderr
    done = command(stubs, tmp_path, "warmup")  # the stub's GPUs are two of one kind
    assert done.returncode == 0, done.stderr


def test_real_nvrtc_to_disk(tmp_path):
    """One kernel by the real compiler: the second process loads it without opening NVRTC."""
    try:
        _core.nvrtc_info()
    except Exception as error:
        pytest.skip(f"needs nvrtc: {error}")
    script = WARM.format(index=0) + "print('libnvrtc.so' in open('/proc/self/maps').read())"
    first = check_script(script, RADDLE_CACHE_DIR=str(tmp_path)).split()
    second = check_script(script, RADDLE_CACHE_DIR=str(tmp_path)).split()
    assert first == ["compiled", "True"]
    assert second[0] == "disk"
    assert second == ["disk", "False"]
