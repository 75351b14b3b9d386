"""`python -m raddle doctor`: what works on this machine, and the cure for what does not.

Each row has a check, a state, a value and a cure. States: "ok"; "absent" (not there, and nothing is
wrong: no GPU, no torch); "limited" (works, not as well as it could); "broken". The command ends
with status 1 when something is broken. Every probe is guarded: one that fails is a row, and the
others still run.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time

from . import __version__, _core
from .errors import DeviceError, RaddleError

__all__ = ["report"]

GIB = 2**30


def report():
    """Run all checks; returns [{"check", "state", "value", "cure"}], in the order of the table."""
    rows = []
    rows += _guard("python", _check_python)
    rows += _guard("raddle", _check_raddle)
    rows += _guard("numpy", _check_numpy)
    rows += _guard("torch", _check_torch)
    rows += _guard("cpu", _check_cpu)
    rows += _guard("cpu attention", _check_cpu_attention)
    rows += _guard("cc", _check_cc)
    driver = _guard("driver", _check_driver)
    rows += driver
    gpus = _find_gpus() if driver[0]["state"] == "ok" else []
    rows += _guard("gpu", _check_gpus, gpus)
    rows += _guard("nvrtc", _check_nvrtc, gpus)
    rows += _guard("cublasLt", _check_blas, gpus)
    rows += _guard("kernel cache", _check_cache)
    rows += _guard("gpu attention", _check_gpu_attention, gpus)
    rows += _guard("notices", _check_notices)
    return rows


def _row(check, state, value, cure=""):
    return {"check": check, "state": state, "value": str(value), "cure": cure}


def _guard(check, probe, *args):
    """The probe's rows; an exception that it did not foresee is a broken row."""
    try:
        found = probe(*args)
        return found if isinstance(found, list) else [found]
    except Exception as error:  # whatever it is, the other checks must run
        name = type(error).__name__
        return [_row(check, "broken", f"{name}: {error}", "report this with the whole table")]


# -- Python and its packages --------------------------------------------------------------------


def _check_python():
    value = f"{platform.python_version()} ({platform.machine()}, {platform.system()})"
    return _row("python", "ok", f"{value}, {sys.executable}")


def _check_raddle():
    settings = {name: value for name, value in os.environ.items() if name.startswith("RADDLE_")}
    words = "".join(f", {name}={value!r}" for name, value in sorted(settings.items()))
    return _row("raddle", "ok", f"{__version__} in {os.path.dirname(_core.__file__)}{words}")


def _check_numpy():
    try:
        import numpy
    except ImportError as error:
        return _row("numpy", "broken", error, "pip install numpy")
    return _row("numpy", "ok", numpy.__version__)


def _check_torch():
    try:
        import torch
    except ImportError:
        return _row("torch", "absent", "not installed", "optional: pip install torch")
    door = _core.tensor_info(torch.zeros(2))[-1]
    value = f"{torch.__version__}, tensors come in by {door}"
    if door == "exchange table":
        return _row("torch", "ok", value)
    return _row("torch", "limited", value, "torch 2.10 or newer passes tensors in nanoseconds")


# -- CPU ----------------------------------------------------------------------------------------


def _check_cpu():
    settings = _core.settings()
    value = f"{settings['cpu_isa']}, {settings['cpu_threads']} threads"
    bad = settings["bad_threads_setting"]
    if bad is not None:
        return _row("cpu", "limited", value, f"RADDLE_THREADS={bad!r} is ignored: 1 to 1024")
    return _row("cpu", "ok", value)


def _small_batch():
    """Three requests over a shuffled page table: q, cache, page table, and the float64 answer."""
    import numpy

    rng = numpy.random.default_rng(7)
    lengths, page_size, kv_heads, group, dim = numpy.array([37, 1, 90]), 16, 2, 4, 64
    pages = -(-lengths // page_size)
    indptr = numpy.concatenate([[0], pages.cumsum()]).astype(numpy.int32)
    indices = rng.permutation(pages.sum()).astype(numpy.int32)
    last_page_len = (lengths - (pages - 1) * page_size).astype(numpy.int32)
    cache = rng.standard_normal((pages.sum(), 2, page_size, kv_heads, dim)).astype(numpy.float16)
    q = rng.standard_normal((3, kv_heads * group, dim)).astype(numpy.float16)
    expected = numpy.empty(q.shape)
    for r, length in enumerate(lengths):
        rows = cache[indices[indptr[r] : indptr[r + 1]]].astype(numpy.float64)
        keys = rows[:, 0].reshape(-1, kv_heads, dim)[:length]
        values = rows[:, 1].reshape(-1, kv_heads, dim)[:length]
        for head in range(kv_heads * group):
            logits = keys[:, head // group] @ q[r, head].astype(numpy.float64) / dim**0.5
            weights = numpy.exp(logits - logits.max())
            expected[r, head] = weights @ values[:, head // group] / weights.sum()
    return q, cache, (indptr, indices, last_page_len), expected


def _run_attention(device):
    """Largest difference from the float64 answer, and the seconds that the plan took to make."""
    import numpy

    from . import attention
    from .tensor import tensor

    q, cache, table, expected = _small_batch()
    begin = time.perf_counter()
    decode = attention.BatchDecode(
        num_qo_heads=q.shape[1],
        num_kv_heads=cache.shape[3],
        head_dim=q.shape[2],
        page_size=cache.shape[2],
        max_batch=len(q),
        max_pages=len(cache),
        dtype="float16",
        device=device,
    )
    seconds = time.perf_counter() - begin
    decode.plan(*table)
    if device == "cpu":
        out = decode.run(q, cache)
    else:
        on_device = [tensor(array, device=device) for array in (q, cache)]
        out = decode.run(*on_device).to("cpu").numpy()
    return float(numpy.abs(out.astype(numpy.float64) - expected).max()), seconds


# float16 results of values around 1: half a unit in the last place, and the rounding of the sums.
TOLERANCE = 2e-3


def _check_cpu_attention():
    error, _ = _run_attention("cpu")
    value = f"decode attention differs from float64 by {error:.1e}"
    if error < TOLERANCE:
        return _row("cpu attention", "ok", value)
    return _row("cpu attention", "broken", value, "try RADDLE_ISA=generic, and report this")


def _check_cc():
    """A library like those that variants become, made by the compiler that variants are given."""
    command = os.environ.get("CC", "").split() or ["cc"]
    cure = "apt install gcc, dnf install gcc, apk add gcc musl-dev; or name a compiler in CC"
    found = shutil.which(command[0])
    if found is None:
        value = f"no {command[0]}: user variants cannot run on the CPU"
        return _row("cc", "absent", value, cure)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c11", "-shared", "-fPIC", "-x", "c", "-", "-lm"]
        done = subprocess.run(
            [found, *command[1:], *flags, "-o", os.path.join(folder, "probe.so")],
            input="#include <math.h>\nfloat probe(float x) { return tanhf(x); }\n",
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "LC_ALL": "C", "LANGUAGE": ""},
        )
    if done.returncode == 0:
        path = os.path.realpath(found)
        return _row("cc", "ok", f"{path}, compiles user variants for the CPU")
    lines = done.stderr.splitlines() or [f"status {done.returncode}"]
    words = next((line for line in lines if "error" in line), lines[0])
    value = f"{found}: user variants cannot run on the CPU: {words}"
    return _row("cc", "limited", value, cure)


# -- GPU ----------------------------------------------------------------------------------------


def _version(number):
    return f"{number // 1000}.{number % 1000 // 10}"


def _check_driver():
    try:
        version, path = _core.driver_info()
    except DeviceError as error:
        is_absent = any(
            words in str(error)
            for words in ("no CUDA driver: lib", "RADDLE_DISABLE_CUDA", "CUDA_ERROR_NO_DEVICE")
        )
        return _row("driver", "absent" if is_absent else "broken", error)
    return _row("driver", "ok", f"CUDA {_version(version)}, {path}")


def _find_gpus():
    """[(index, info or the error)] of what the driver shows."""
    found = []
    for index in range(_core.gpu_count()):
        try:
            found.append((index, _core.gpu_info(index)))
        except RaddleError as error:
            found.append((index, error))
    return found


def _usable(gpus):
    return [(index, info) for index, info in gpus if not isinstance(info, Exception)]


def _check_gpus(gpus):
    rows = []
    for index, info in gpus:
        if isinstance(info, Exception):
            is_old = "compute capability" in str(info)
            rows.append(_row(f"cuda:{index}", "absent" if is_old else "broken", info))
            continue
        free, total = info["free_bytes"] / GIB, info["memory_bytes"] / GIB
        value = f"{info['name']}, compute capability {info['arch'] / 10:.1f}, "
        value += f"{info['num_sms']} SMs, {free:.1f} of {total:.1f} GB free"
        rows.append(_row(f"cuda:{index}", "ok", value))
    return rows or _row("gpu", "absent", "none to be used")


def _check_nvrtc(gpus):
    usable = _usable(gpus)
    try:
        path, version, archs = _core.nvrtc_info()
    except RaddleError as error:
        return _row("nvrtc", "broken" if usable else "absent", error, _core.nvrtc_cure())
    value = f"{_version(version)}, {path}"
    for index, info in usable:
        if info["arch"] not in archs:
            cure = f"{_core.nvrtc_cure()}  (a newer one; this one leaves the work to the driver)"
            return _row("nvrtc", "limited", f"{value}; does not know the GPU cuda:{index}", cure)
    if usable:
        driver = _core.driver_info()[0]
        value += f"; machine code for {', '.join(sorted({i['kernel_arch'] for _, i in usable}))}"
        if version > driver:
            value += f", which the older driver (CUDA {_version(driver)}) takes"
    return _row("nvrtc", "ok", value)


def _check_blas(gpus):
    if not _usable(gpus):
        return _row("cublasLt", "absent", "only looked for with a GPU")
    try:
        path, version = _core.blas_info()
    except RaddleError as error:
        return _row("cublasLt", "broken", error, "linear layers need it; attention does not")
    return _row("cublasLt", "ok", f"{version // 10000}.{version // 100 % 100}, {path}")


def _check_gpu_attention(gpus):
    rows = []
    for index, _ in _usable(gpus):
        check = f"cuda:{index} attention"
        try:
            error, seconds = _run_attention(f"cuda:{index}")
        except RaddleError as failure:
            rows.append(_row(check, "broken", f"{type(failure).__name__}: {failure}"))
            continue
        value = f"decode attention differs from float64 by {error:.1e}, "
        value += f"kernels ready in {seconds:.2f} s"
        state = "ok" if error < TOLERANCE else "broken"
        rows.append(_row(check, state, value, "" if state == "ok" else "report this"))
    return rows or _row("gpu attention", "absent", "no GPU to run on")


# -- the kernel cache ---------------------------------------------------------------------------


def _check_cache():
    folder = _core.settings()["cache_dir"]
    cure = "set RADDLE_CACHE_DIR to a folder that can be written"
    if not folder:
        return _row("kernel cache", "limited", "none: every process compiles its own", cure)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
        found = _core.cache_verify(False)
    except (OSError, RaddleError) as error:
        return _row("kernel cache", "limited", f"{folder}: {error}", cure)
    value = f"{folder}, {found['files']} kernels, {found['bytes'] / 2**20:.1f} MB of 256"
    if found["damaged"]:
        value += f", {found['damaged']} damaged"
        return _row("kernel cache", "limited", value, "python -m raddle cache --verify")
    return _row("kernel cache", "ok", value)


def _check_notices():
    return [_row("notice", "limited", notice) for notice in _core.notices()]


# -- python -m raddle doctor --------------------------------------------------------------------


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="the rows as a JSON array")


def main(args):
    rows = report()
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 1 if any(row["state"] == "broken" for row in rows) else 0


def _print_table(rows):
    widths = [max(len(row[column]) for row in rows) for column in ("check", "state")]
    for row in rows:
        print(f"{row['check']:{widths[0]}}  {row['state']:{widths[1]}}  {row['value']}")
        if row["cure"]:
            print(f"{'':{widths[0]}}  {'':{widths[1]}}  -> {row['cure']}")
