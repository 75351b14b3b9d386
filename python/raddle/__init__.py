"""raddle: attention and what stands around it for serving language models, on CPUs and GPUs.

Importing it opens no GPU, starts no thread, writes no file and imports neither NumPy nor torch;
families are loaded when they are first named.
"""

from importlib import import_module

from . import errors
from ._core import __version__
from .tensor import Tensor, empty, from_dlpack, tensor, zeros

# Name -> the module that has it (None: it is that submodule). Loaded on first use.
_LAZY = {
    "attention": None,
    "blend": None,
    "BatchDecode": "attention",
    "BatchPrefill": "attention",
    "BatchRaggedPrefill": "attention",
    "Variant": "variant",
    "ops": None,
    "graph": None,
    "Graph": "graph",
    "Stream": "_core",
    "Workspace": "_core",
}

__all__ = [
    "BatchDecode",
    "BatchPrefill",
    "BatchRaggedPrefill",
    "Graph",
    "Stream",
    "Tensor",
    "Variant",
    "Workspace",
    "__version__",
    "attention",
    "blend",
    "empty",
    "errors",
    "from_dlpack",
    "get_include",
    "graph",
    "ops",
    "tensor",
    "zeros",
]


def get_include():
    """The folder of raddle.h, for extension modules that use the C table raddle._core._C_API.

    Raises RaddleIOError when the header was not installed with the package."""
    from pathlib import Path

    here = Path(__file__).resolve().parent
    for folder in (here / "include", here.parents[1] / "csrc" / "include"):  # installed, editable
        if (folder / "raddle.h").is_file():
            return str(folder)
    raise errors.RaddleIOError(f"{here}/include/raddle.h: no such file; install raddle anew")


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LAZY[name] or name}")
    value = module if _LAZY[name] is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
