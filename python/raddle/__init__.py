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
    "BatchDecode": "attention",
    "BatchPrefill": "attention",
    "BatchRaggedPrefill": "attention",
    "ops": None,
    "graph": None,
    "Graph": "graph",
    "Workspace": "_core",
}

__all__ = [
    "BatchDecode",
    "BatchPrefill",
    "BatchRaggedPrefill",
    "Graph",
    "Tensor",
    "Workspace",
    "__version__",
    "attention",
    "empty",
    "errors",
    "from_dlpack",
    "graph",
    "ops",
    "tensor",
    "zeros",
]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LAZY[name] or name}")
    value = module if _LAZY[name] is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
