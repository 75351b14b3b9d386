"""Runs FlashInfer's own tests against raddle.flashinfer, on a GPU, as they are.

    python tests/run_flashinfer_tests.py FOLDER [--jobs N] [pytest's arguments]

FOLDER holds FlashInfer's tests: a checkout (its tests import `tests.test_helpers`), or the flat
folder that its source archives up to 0.3.1 carry, with the helper modules that those import beside
them. Run are the files below that are found there: decode, page, cascade merge, norm, rope,
activation, sampling, and what they share with prefill. --jobs splits the cases over processes; a
case that finds the GPU's memory taken by the others frees its own, waits and runs again.

Needs: torch with CUDA, pytest, a GPU. FlashInfer's files are no part of raddle.
"""

import argparse
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

FILES = (
    "test_activation.py",
    "test_alibi.py",
    "test_batch_decode_kernels.py",
    "test_cascade_empty_states.py",
    "test_decode_fp8_calibration_scale.py",
    "test_decode_prefill_lse.py",
    "test_logits_cap.py",
    "test_non_contiguous_decode.py",
    "test_norm.py",
    "test_page.py",
    "test_quantization.py",
    "test_rope.py",
    "test_sampling.py",
    "test_shared_prefix_kernels.py",
    "test_tensor_cores_decode.py",
    "test_triton_cascade.py",
)


TRIES, WAIT_SECONDS = 20, 1.0  # of a case that runs out of memory
KEPT_BYTES = 1 << 32  # of torch's cache between cases


class Share:
    """A pytest plugin: every count-th case, from the index-th on, in memory that others use too."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def pytest_collection_modifyitems(self, config, items):
        kept = items[self.index :: self.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        import torch

        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        for left in reversed(range(TRIES if self.count > 1 else 1)):
            try:
                pyfuncitem.obj(**arguments)
                break
            except torch.OutOfMemoryError as error:
                if left == 0:
                    raise
                traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()
            time.sleep(WAIT_SECONDS)
        if torch.cuda.memory_reserved() > KEPT_BYTES:
            torch.cuda.empty_cache()
        return True


def find_files(folder):
    found = [path for name in FILES for path in sorted(folder.rglob(name))]
    if not found:
        sys.exit(f"{folder}: none of FlashInfer's test files is there")
    return found


def run_share(folder, index, count, arguments):
    """Collect and run in this process; pytest's exit status."""
    import raddle.flashinfer

    raddle.flashinfer.install()
    sys.path.insert(0, str(folder))
    named = [one for one in arguments if one.split("::")[0].endswith(".py")]
    files = [] if named else [str(path) for path in find_files(folder)]
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "/dev/null"]
    return pytest.main([*options, *files, *arguments], plugins=[Share(index, count)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--share", type=int, default=None, help=argparse.SUPPRESS)
    known, arguments = parser.parse_known_args()
    folder = known.folder.resolve()
    if known.share is not None or known.jobs == 1:
        return run_share(folder, known.share or 0, known.jobs, arguments)
    shares = [
        subprocess.Popen([sys.executable, *sys.argv, f"--share={index}"])
        for index in range(known.jobs)
    ]
    return max(share.wait() for share in shares)


if __name__ == "__main__":
    sys.exit(main())
