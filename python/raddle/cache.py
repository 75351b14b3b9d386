"""The kernel cache: where compiled kernels are kept, and how to look after it.

Kernels are compiled when a plan first needs them and kept in a folder (RADDLE_CACHE_DIR, else
$XDG_CACHE_HOME/raddle, else ~/.cache/raddle; an empty RADDLE_CACHE_DIR keeps them in memory only).
Any number of processes may use one folder. At 256 MB the files that were unused longest go. A
damaged file is compiled anew; a folder that cannot be written costs a RuntimeWarning and no more.
"""

import os

from . import _core
from .errors import RaddleError

__all__ = ["clear", "import_bundle", "load_bundle", "path", "stats", "verify"]


def path():
    """The folder, or "" when kernels stay in memory."""
    return _core.settings()["cache_dir"]


def stats():
    """{"files": .., "bytes": ..} of the folder. Raises RaddleIOError when it cannot be listed."""
    found = _core.cache_measure()
    return {"files": found["files"], "bytes": found["bytes"]}


def verify(*, remove_damaged=False):
    """Read every file and check it: {"files": .., "bytes": .., "damaged": ..}."""
    return _core.cache_verify(remove_damaged)


def clear():
    """Remove every kernel that raddle wrote, and nothing else; returns their number."""
    return _core.cache_clear()


def load_bundle(bundle):
    """Make the kernels of a bundle known to this process; returns their number.

    bundle: a file written by `python -m raddle warmup -o FILE`, on any machine of this version of
    raddle. It is machine code for a GPU: load only files that you trust. Raises RaddleIOError that
    names what is wrong with the file.
    """
    return _core.load_bundle(os.fspath(bundle), False)


def import_bundle(bundle):
    """load_bundle, and keep the kernels in the cache for the processes to come."""
    return _core.load_bundle(os.fspath(bundle), True)


# -- python -m raddle cache ---------------------------------------------------------------------


def add_arguments(parser):
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--path", action="store_true", help="print the folder, nothing else")
    what.add_argument("--clear", action="store_true", help="remove every kernel")
    what.add_argument("--verify", action="store_true", help="read all; remove what is damaged")
    what.add_argument(
        "--import", dest="bundle", metavar="BUNDLE", help="add the kernels of a bundle (see warmup)"
    )


def main(args):
    try:
        print(_answer(args))
    except RaddleError as error:
        print(f"raddle cache: {error}")
        return 1
    return 0


def _answer(args):
    folder = path()
    if args.path:
        return folder
    if args.clear:
        return f"{folder}: {clear()} kernels removed"
    if args.verify:
        found = verify(remove_damaged=True)
        return f"{folder}: {found['files']} kernels read, {found['damaged']} damaged and removed"
    if args.bundle:
        return f"{folder}: {import_bundle(args.bundle)} kernels imported"
    if not folder:
        return "kernels stay in memory: RADDLE_CACHE_DIR is empty, or there is no home folder"
    found = stats()
    return f"{folder}: {found['files']} kernels, {found['bytes'] / 2**20:.1f} MB of 256"
