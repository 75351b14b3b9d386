"""Compiles the extension modules that tests need: fake producers, a client of the C table.

Needs: a C compiler and Python's headers, else the tests that ask are skipped.
"""

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def build_module(folder, name, flags, include):
    """The extension module of tests/NAME.c, compiled into folder; skips without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs compiler: cc or gcc on the PATH")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c11", *flags, "-O1", "-g", "-shared", "-fPIC"]
    folders = [f"-I{one}" for one in include]
    done = subprocess.run(
        [*compiler.split(), *flags, *folders, str(HERE / f"{name}.c"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loader = importlib.machinery.ExtensionFileLoader(name, str(target))
    spec = importlib.util.spec_from_file_location(name, target, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
