"""Compiling kernels ahead of time: into the cache, or into a file for other machines.

Needs NVRTC, not a GPU. Without `archs` the kernels are those of the GPUs here. What is compiled is
raddle's declared list of configs: the usual dtypes, head dimensions and group sizes. A plan with a
config beyond it compiles its own, in about a second, when it is made.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from . import _core
from .errors import DeviceError, RaddleError

__all__ = ["declared_kernels", "gpu_archs", "warmup"]


def gpu_archs():
    """Architectures of this machine's GPUs, as warmup takes them: ["sm_90a"]. Empty without one."""
    try:
        count = _core.gpu_count()
    except DeviceError:
        return []
    return sorted({_core.gpu_info(i)["kernel_arch"] for i in range(count)})


def declared_kernels(archs):
    """[(name, config, arch)] of the declared configs; kernels that only Hopper runs, for sm_90a."""
    return [
        (name, config, arch)
        for arch in archs
        for name, config, hopper_only in _core.kernel_configs()
        if not hopper_only or arch == "sm_90a"
    ]


def warmup(archs=None, *, bundle=None, progress=None):
    """Compile the declared kernels; returns {"compiled": n, "disk": n, "bundle": n} by origin.

    archs: like ["sm_80", "sm_90a"]; by default those of the GPUs here. bundle: also write them all
    to this file, for raddle.cache.load_bundle or `python -m raddle cache --import`. progress:
    called with (done, total) after each kernel. Raises CompileError (its log has the compiler's
    words), DeviceError when archs is not given and there is no GPU, RaddleIOError for the bundle.
    """
    archs = list(archs) if archs else gpu_archs()
    if not archs:
        raise DeviceError("archs: no GPU is here; name what to compile for, as sm_80 or sm_90a")
    kernels = declared_kernels(archs)
    origins = {"compiled": 0, "disk": 0, "bundle": 0}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(_core.warm_kernel, *kernel) for kernel in kernels]
        try:
            for done, job in enumerate(jobs, 1):
                origins[job.result()] += 1
                if progress:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if bundle is not None:
        _core.write_bundle(os.fspath(bundle), tuple(kernels))
    return origins


# -- python -m raddle warmup --------------------------------------------------------------------


def add_arguments(parser):
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="what to compile for, as sm_80 or sm_90a (default: the GPUs of this machine)",
    )
    parser.add_argument("-o", "--output", metavar="BUNDLE", help="also write them to one file")


def main(args):
    begin = time.monotonic()
    try:
        origins = warmup(args.arch, bundle=args.output, progress=_show if _is_terminal() else None)
    except RaddleError as error:
        print(f"raddle warmup: {error}", file=sys.stderr)
        return 1
    known = origins["disk"] + origins["bundle"]
    print(
        f"{origins['compiled']} kernels compiled, {known} were there, "
        f"{time.monotonic() - begin:.1f} s"
    )
    if args.output:
        print(f"bundle: {args.output} ({os.path.getsize(args.output) / 2**20:.1f} MB)")
    for notice in _core.notices():
        print(f"raddle warmup: {notice}", file=sys.stderr)
    return 0


def _is_terminal():
    return sys.stderr.isatty()


def _show(done, total):
    end = "\n" if done == total else ""
    print(f"\r{done} of {total} kernels", end=end, file=sys.stderr, flush=True)
