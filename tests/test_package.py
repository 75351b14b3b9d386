"""The package as installed: what an import does and does not do, and that the stubs tell the truth.

Needs: raddle installed (or built and on the path).
"""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import raddle
from raddle import _core

PACKAGE = Path(raddle.__file__).parent
STUB = ast.parse((PACKAGE / "_core.pyi").read_text())

QUIET_IMPORT = """
import os, sys
import numpy

def tasks():
    return len(os.listdir("/proc/self/task"))

writes = []

def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        writes.append(arguments[0])
    if event in ("os.mkdir", "os.rename", "socket.connect", "subprocess.Popen", "os.fork"):
        writes.append((event, arguments))

before = tasks()
sys.addaudithook(watch)
import raddle
from raddle import _core
assert tasks() == before, "import started a thread"
assert not writes, writes
heavy = {"torch", "transformers", "tokenizers", "safetensors", "jinja2", "tqdm", "ray"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
maps = open("/proc/self/maps").read()
for library in ("libcuda.so", "libnvrtc", "libcublas"):
    assert library not in maps, library
"""


def test_import_is_quiet(tmp_path):
    """No torch, no GPU library, no thread, and no file written beyond numpy's own import."""
    environment = {**os.environ, "HOME": str(tmp_path), "RADDLE_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", QUIET_IMPORT],
        env=environment,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_typed_and_versioned():
    assert (PACKAGE / "py.typed").is_file()
    assert raddle.__version__ == _core.__version__
    assert raddle.__version__[0].isdigit()


def test_all_resolves():
    assert len(set(raddle.__all__)) == len(raddle.__all__)
    missing = [name for name in raddle.__all__ if not hasattr(raddle, name)]
    assert not missing


def test_only_init_is_exported():
    """The shared library shows PyInit__core and nothing else that could clash."""
    try:
        done = subprocess.run(
            ["nm", "-D", "--defined-only", _core.__file__], text=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs nm: not on the PATH")
    assert done.returncode == 0, done.stderr
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert names - {"_init", "_fini"} == {"PyInit__core"}


# -- the stub file ------------------------------------------------------------------------------


def public(names):
    return {name for name in names if not name.startswith("__")}


def stub_names(body):
    names = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return public(names)


def assert_same(stub, runtime):
    assert not runtime - stub, f"not in _core.pyi: {', '.join(sorted(runtime - stub))}"
    assert not stub - runtime, f"only in _core.pyi: {', '.join(sorted(stub - runtime))}"


def is_property(node):
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def stub_parameters(node):
    a = node.args
    names = [p.arg for p in [*a.posonlyargs, *a.args]]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [p.arg for p in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def runtime_parameters(function):
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    names = [marks.get(p.kind, "") + p.name for p in parameters]
    return [name for name in names if name not in ("self", "cls", "type", "module")]


def stub_functions():
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            yield pytest.param(_core, node, id=node.name)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    owner = getattr(_core, node.name, None)
                    yield pytest.param(owner, method, id=f"{node.name}.{method.name}")


def test_stub_names_are_the_runtime_names():
    assert_same(stub_names(STUB.body), public(vars(_core)))


@pytest.mark.parametrize(
    "node", [pytest.param(n, id=n.name) for n in STUB.body if isinstance(n, ast.ClassDef)]
)
def test_stub_members_are_the_runtime_members(node):
    assert_same(stub_names(node.body), public(vars(getattr(_core, node.name))))


@pytest.mark.parametrize(("owner", "node"), list(stub_functions()))
def test_stub_parameters_are_the_runtime_parameters(owner, node):
    runtime = inspect.getattr_static(owner, node.name)
    if is_property(node):
        assert inspect.isdatadescriptor(runtime)
        return
    assert callable(getattr(owner, node.name))
    assert stub_parameters(node) == runtime_parameters(getattr(owner, node.name))
