"""Builds and runs the native tests in tests/c. Needs: gcc, clang; skips for each that is missing.

A test is one file tests/c/test_NAME.c. Its first lines say what it is built from (tests/c/check.h
describes them), so a new test needs no change here. Each is built with every compiler found, under
every sanitizer that it asks for, as C11 with warnings as errors.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests" / "c"
COMPILERS = ["gcc", "clang"]
FLAGS = [
    *["-std=c11", "-O1", "-g", "-fno-omit-frame-pointer", "-Werror", "-Wall", "-Wextra"],
    *["-Wpedantic", "-Wshadow", "-Wstrict-prototypes", "-Wvla"],
    *["-D_GNU_SOURCE", "-DRADDLE_DEBUG=1", '-DRADDLE_VERSION="0.0.0+test"'],
    *(f"-I{ROOT / directory}" for directory in ("csrc", "csrc/include", ".", "kernels", "tests/c")),
]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "allocator_may_return_null=1:die_after_fork=0:atexit_sleep_ms=0",
}


def directives(path):
    """The `// word: values` lines at the top of a test file."""
    found = {"needs": [], "sanitizers": ["address"], "shared": []}
    for line in path.read_text().splitlines():
        if not line.startswith("// ") or ": " not in line:
            break
        word, values = line[3:].split(": ", 1)
        assert word in found, f"{path.name}: unknown directive {word}"
        found[word] = values.split()
    assert found["needs"], f"{path.name}: no `// needs:` line"
    return found


def find_compiler(name):
    """The plain name, else the newest numbered one (clang-14 and the like)."""
    numbered = sorted(
        (int(path.name.rsplit("-", 1)[1]), str(path))
        for folder in os.environ["PATH"].split(os.pathsep)
        for path in Path(folder).glob(f"{name}-[0-9]*")
        if path.name.rsplit("-", 1)[1].isdigit()
    )
    return shutil.which(name) or (numbered[-1][1] if numbered else None)


def run(command, **options):
    done = subprocess.run(
        [str(word) for word in command], text=True, capture_output=True, timeout=300, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


class Builder:
    """Compiles each source once for one compiler and one sanitizer."""

    def __init__(self, name, sanitizer, folder):
        self.compiler = find_compiler(name)
        self.is_clang = name == "clang"
        self.flags = [*FLAGS, *SANITIZERS[sanitizer]]
        self.folder = folder
        self.missing = "" if self.compiler else f"needs {name}: not on the PATH"
        if self.compiler and not self.can_link():
            self.missing = f"needs {name}: it has no {sanitizer} sanitizer here"

    def can_link(self):
        source = self.folder / "empty.c"
        source.write_text("int main(void) {\n    return 0;\n}\n")
        command = [self.compiler, *self.flags, source, "-o", self.folder / "empty"]
        return subprocess.run(map(str, command), capture_output=True).returncode == 0

    def compile(self, source, *flags):
        name = "-".join(source.relative_to(ROOT).with_suffix("").parts)
        obj = self.folder / f"{name}{''.join(flags)}.o"
        if not obj.exists():
            # clang takes 100 s for the widest loops under its sanitizers, 6 s without optimising.
            plain = ["-O0"] if self.is_clang and source.name.startswith("vec_avx512") else []
            run([self.compiler, *self.flags, *plain, *flags, "-c", source, "-o", obj])
        return obj

    def link(self, objects, output, *flags):
        libraries = ["-lm", "-ldl", "-lpthread"]
        run([self.compiler, *self.flags, *flags, *objects, "-o", output, *libraries])


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    made = {}

    def get(name, sanitizer):
        if (name, sanitizer) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{sanitizer}")
            made[name, sanitizer] = Builder(name, sanitizer, folder)
        return made[name, sanitizer]

    return get


NATIVE_TESTS = sorted(TESTS.glob("test_*.c"))
CASES = [
    pytest.param(path, compiler, sanitizer, id=f"{path.stem}-{compiler}-{sanitizer}")
    for path in NATIVE_TESTS
    for compiler in COMPILERS
    for sanitizer in directives(path)["sanitizers"]
]


@pytest.mark.parametrize(("path", "compiler", "sanitizer"), CASES)
def test_native(path, compiler, sanitizer, builders, tmp_path):
    builder = builders(compiler, sanitizer)
    if builder.missing:
        pytest.skip(builder.missing)
    words = directives(path)
    sources = [found for glob in words["needs"] for found in sorted(CSRC.glob(glob))]
    unmatched = [glob for glob in words["needs"] if not any(CSRC.glob(glob))]
    assert not unmatched, f"no file below csrc matches {unmatched}"
    for pair in words["shared"]:
        library, source = pair.split("=")
        builder.link([builder.compile(TESTS / source, "-fPIC")], tmp_path / library, "-shared")
    objects = [builder.compile(source) for source in [path, *dict.fromkeys(sources)]]
    builder.link(objects, tmp_path / path.stem, "-rdynamic")
    environment = {**os.environ, **ENVIRONMENT, "LD_LIBRARY_PATH": str(tmp_path)}
    run([tmp_path / path.stem], cwd=tmp_path, env=environment)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_headers_compile_alone(compiler, builders, tmp_path):
    builder = builders(compiler, "address")
    if builder.missing:
        pytest.skip(builder.missing)
    headers = [*CSRC.glob("**/*.h"), *(ROOT / "kernels").glob("**/*.h")]
    native = [path for path in headers if path.parent != CSRC / "python"]
    assert native
    lines = [builder.compiler, *builder.flags, "-fsyntax-only", "-x", "c"]
    for header in native:
        probe = tmp_path / "probe.c"
        probe.write_text(f'#include "{header}"\ntypedef int probe_is_not_empty;\n')
        run([*lines, probe])


def test_a_failing_check_fails(builders, tmp_path):
    """The macros of check.h do report: a test of nothing, and one that is wrong, return nonzero."""
    builder = builders("gcc", "address")
    if builder.missing:
        pytest.skip(builder.missing)
    for body, code in (("", 1), ("CHECK(1 == 2);", 1), ("CHECK(1 == 1);", 0)):
        source = tmp_path / "probe.c"
        main = f"int main(void) {{ {body} return check_report(); }}\n"
        source.write_text(f'#include "check.h"\n{main}')
        objects = [builder.compile(path) for path in sorted(CSRC.glob("base/*.c"))]
        builder.link([source, *objects], tmp_path / "probe", "-Wno-unused-function")
        assert subprocess.run([tmp_path / "probe"], capture_output=True).returncode == code
