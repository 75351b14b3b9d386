"""What FlashInfer has and raddle has not: names that can be imported and that raise when used.

A placeholder is a class, so that it can stand in annotations, in isinstance and as an attribute of
a module; calling it or anything reached through it raises UnsupportedError.
"""

import types

from ..errors import UnsupportedError


class _PlaceholderType(type):
    def __call__(cls, *args, **kwargs):
        raise UnsupportedError(
            f"flashinfer.{cls.__qualname__}: raddle does not have this; "
            "raddle.flashinfer.supports(name, ...) tells what it has"
        )

    def __truediv__(cls, other):  # of a folder that has no files here
        cls()

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = placeholder(f"{cls.__qualname__}.{name}")
        setattr(cls, name, value)
        return value

    def __repr__(cls):
        return f"<flashinfer.{cls.__qualname__}, which raddle does not have>"


def placeholder(name):
    """A class of that dotted name below flashinfer that raises UnsupportedError when called."""
    short = name.rpartition(".")[2]
    return _PlaceholderType(short, (), {"__qualname__": name, "__module__": "raddle.flashinfer"})


def is_placeholder(value):
    return isinstance(value, _PlaceholderType)


def refuser(module, *names):
    """The __getattr__ of a module of raddle.flashinfer: a placeholder for each of names."""
    known = frozenset(names)
    made = {}

    def refuse(name):
        if name not in known:
            raise AttributeError(f"module 'flashinfer.{module}' has no attribute {name!r}")
        if name not in made:
            made[name] = placeholder(f"{module}.{name}")
        return made[name]

    return refuse


def missing_module(name, names):
    """A module flashinfer.<name> of placeholders."""
    module = types.ModuleType(f"flashinfer.{name}", f"flashinfer.{name}: raddle has none of it.")
    module.__getattr__ = refuser(name, *names)
    module.__all__ = sorted(names)
    module.__path__ = []
    return module
