"""FlashInfer's decode API, and what surrounds it, on raddle's kernels: a drop-in module.

    import raddle.flashinfer as flashinfer              # in new code, or
    import raddle.flashinfer; raddle.flashinfer.install()   # before a program's `import flashinfer`

Names, argument order, defaults, aliases and results are those of FlashInfer 0.6.18 and 0.7.2: LSE
in base 2, causal masks aligned to the bottom right, empty requests 0 and -inf. Arguments that only
tune are accepted; what would change results and is not there raises UnsupportedError, when it is
used and not when it is imported. Tensors are torch's, on a GPU or on the CPU. `supports` tells
whether a call with given arguments works; the modules say where they differ from FlashInfer.

Like raddle itself, importing it imports no torch.
"""

from importlib import import_module

from ._counting import launch_counts
from ._install import install, uninstall
from ._names import MISSING_MODULES, OWN_MODULES, homes
from ._refuse import missing_module, placeholder
from ._supports import supports
from .version import __git_commit__, __git_version__, __version__

_HOMES = homes()

__all__ = [
    "__git_commit__",
    "__git_version__",
    "__version__",
    "install",
    "launch_counts",
    "supports",
    "uninstall",
    *sorted(_HOMES),
]


def __getattr__(name):
    if name in OWN_MODULES:
        return import_module(f"{__name__}.{name}")
    if name in MISSING_MODULES:
        value = missing_module(name, MISSING_MODULES[name].split())
    elif name not in _HOMES:
        raise AttributeError(f"module 'flashinfer' has no attribute {name!r}")
    elif _HOMES[name] in MISSING_MODULES:
        value = placeholder(name)
    else:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name, None)
        value = placeholder(name) if value is None else value
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__, *OWN_MODULES, *MISSING_MODULES})
