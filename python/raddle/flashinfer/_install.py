"""Making `import flashinfer` mean raddle.flashinfer.

raddle's modules go into sys.modules under FlashInfer's names; a finder in front of the others makes
the modules that raddle has nothing of, and says of every further one that it is not there: the
files of raddle.flashinfer must not be loaded a second time under another name.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

from ..errors import StateError
from ._counting import start_counting, stop_counting
from ._names import MISSING_MODULES, OWN_MODULES
from ._refuse import missing_module

_ROOT = "flashinfer"


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_ROOT + "."):
            return None
        if fullname[len(_ROOT) + 1 :] in MISSING_MODULES:
            return ModuleSpec(fullname, self, is_package=True)
        raise ModuleNotFoundError(
            f"No module named {fullname!r} (raddle.flashinfer is installed)", name=fullname
        )

    def create_module(self, spec):
        name = spec.name[len(_ROOT) + 1 :]
        return missing_module(name, MISSING_MODULES[name].split())

    def exec_module(self, module):
        pass


_finder = _Finder()


def install(count=False):
    """Make `import flashinfer`, and its submodules, resolve to raddle.flashinfer in this process.

    Call it before the program imports flashinfer: StateError when the real one is loaded already.
    What raddle does not have can be imported and raises when it is used. count: also count launches
    of raddle's kernels, on the device and inside CUDA graphs that are captured from now on, for
    launch_counts(); each launch then costs a few microseconds more. Calling it again is harmless.
    """
    package = import_module("raddle.flashinfer")
    loaded = sys.modules.get(_ROOT)
    if loaded is not None and loaded is not package:
        raise StateError(
            "install: flashinfer is imported already; call raddle.flashinfer.install() before that"
        )
    for own, names in OWN_MODULES.items():
        module = import_module(f"raddle.flashinfer.{own}")
        for name in names:
            sys.modules[f"{_ROOT}.{name}"] = module
    sys.modules[_ROOT] = package
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if count:
        start_counting()


def uninstall():
    """Undo install(): `import flashinfer` finds what is on the path again. Objects that a program
    holds stay raddle's."""
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for name in [name for name in sys.modules if name == _ROOT or name.startswith(_ROOT + ".")]:
        del sys.modules[name]
    stop_counting()
