"""The law of the house: who may include whom, how long a file may be, what no file may hold.

Needs: a checkout (it reads sources and builds nothing). The table is that of the README's layout.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("attention", "ops", "measure", "quest", "atom", "moe", "blend")
LAYERS = ("include", "base", "cuda", "cpu", "runtime", *FAMILIES, "python", "third_party")

# A layer may include its own headers and those of the layers named here. "include" is raddle.h.
COMMON = {"include", "base"}
MAY_INCLUDE = {
    "include": set(),
    "base": {"include", "third_party"},
    "cuda": COMMON,
    "cpu": COMMON,
    "runtime": {*COMMON, "cuda", "cpu"},
    **dict.fromkeys(FAMILIES, {*COMMON, "runtime", "cuda", "cpu"}),
    "blend": COMMON,
    "python": {*COMMON, "runtime", "third_party", *FAMILIES},
    "third_party": set(),
}
CROSS_EDGES = {("quest", "attention"), ("moe", "atom"), ("moe", "ops")}

# System headers that are confined: pattern -> files that may include them, from the root.
CONFINED = {
    r"Python\.h|structmember\.h": r"csrc/python/.*",
    r"numpy/.*": r"csrc/python/tensor_arg\.c",
    r"(cuda|nvrtc|cublas|cub/|cooperative_groups|nv/).*": r"(?!)",
    r"(\w*intrin|arm_neon|arm_sve|cpuid)\.h": r"csrc/cpu/.*",
    r"dlfcn\.h": r"csrc/(cuda/.*|cpu/compile\.c)",
}

TEXT_SUFFIXES = {".c", ".h", ".cu", ".cuh", ".py", ".pyi", ".md", ".toml", ".in", ".sh", ""}
SKIPPED_FOLDERS = {"build", "dist", "results", "__pycache__", "tiny-llama"}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def find(*patterns):
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def name(path):
    return path.relative_to(ROOT).as_posix()


C_FILES = find("csrc/**/*.[ch]", "csrc/**/*.inc")
KERNEL_FILES = find("kernels/**/*.cu", "kernels/**/*.cuh", "kernels/**/*.h")
PYTHON_FILES = find("*.py", "python/**/*.py", "tests/**/*.py", "benchmarks/**/*.py")

if not C_FILES:
    pytest.skip("needs a checkout: csrc is not here", allow_module_level=True)


def includes(path):
    """(quoted, system) names of a file's #include lines."""
    found = INCLUDE.findall(path.read_text())
    return [q for q, _ in found if q], [s for _, s in found if s]


def layer_of(path):
    return path.relative_to(ROOT / "csrc").parts[0]


def quoted_fault(path, quoted):
    """What is wrong with one quoted #include of a file below csrc, or None."""
    layer = layer_of(path)
    top = quoted.split("/", 1)[0]
    if quoted == "raddle.h":
        return None
    if top == "kernels":
        return kernel_header_fault(layer, quoted)
    if top not in LAYERS or not (ROOT / "csrc" / quoted).is_file():
        return "no such header below csrc, csrc/include or kernels"
    if top == "third_party" and quoted != "third_party/dlpack/dlpack.h":
        return "dlpack.h is the only vendored header"
    if top == layer or top in MAY_INCLUDE[layer] or (layer, top) in CROSS_EDGES:
        return None
    return f"{layer} may not know {top}"


def kernel_header_fault(layer, quoted):
    """Families share *_params.h with their own kernels; attention also its variants' headers."""
    _, family, header = quoted.split("/", 2)
    if not (ROOT / quoted).is_file():
        return "no such header"
    if layer not in FAMILIES or family != layer:
        return f"{layer} may not know kernels/{family}"
    if layer != "attention" and not header.endswith("_params.h"):
        return "only *_params.h is shared between host and device"
    return None


def test_c_files_know_only_layers_below():
    faults = []
    for path in C_FILES:
        for quoted in includes(path)[0] if layer_of(path) != "third_party" else []:
            fault = quoted_fault(path, quoted)
            if fault:
                faults.append(f'{name(path)}: "{quoted}": {fault}')
    assert not faults, "\n".join(faults)


def test_confined_system_headers():
    faults = []
    for path in [*C_FILES, *KERNEL_FILES]:
        for system in [*includes(path)[0], *includes(path)[1]]:
            for pattern, where in CONFINED.items():
                is_house = (ROOT / "csrc" / system).is_file()
                if re.fullmatch(pattern, system) and not is_house:
                    if not re.fullmatch(where, name(path)):
                        faults.append(f"{name(path)}: {system} is not for this file")
    assert not faults, "\n".join(faults)


def test_kernels_include_only_kernels():
    """And nothing of the toolkit; <stdint.h> stands in abi.h, for the host's side alone."""
    faults = []
    for path in KERNEL_FILES:
        quoted, system = includes(path)
        faults += [f'{name(path)}: "{q}"' for q in quoted if not (ROOT / "kernels" / q).is_file()]
        if path.suffix == ".h":  # C11 as well
            system = [s for s in system if s not in ("stdint.h", "stdbool.h", "string.h", "math.h")]
        faults += [f"{name(path)}: <{s}>" for s in system]
    assert not faults, "\n".join(faults)


def test_outsiders_use_the_public_header():
    faults = []
    for path in find("examples/**/*.c"):
        faults += [f'{name(path)}: "{q}"' for q in includes(path)[0] if q != "raddle.h"]
    assert not faults, "\n".join(faults)


def test_every_c_file_includes_its_own_header_first():
    faults = []
    for path in C_FILES:
        own = path.with_suffix(".h")
        if path.suffix == ".c" and own.is_file():
            first = includes(path)[0][:1]
            if first != [own.relative_to(ROOT / "csrc").as_posix()]:
                faults.append(f"{name(path)}: includes {first} first")
    assert not faults, "\n".join(faults)


def test_file_sizes():
    limits = [(C_FILES, 700), (find("tests/c/*.[ch]"), 700), (KERNEL_FILES, 800)]
    faults = []
    for paths, limit in [*limits, (PYTHON_FILES, 400)]:
        for path in paths:
            count = len(path.read_text().splitlines())
            if count > limit and "third_party" not in path.parts:
                faults.append(f"{name(path)}: {count} lines, at most {limit}")
    assert not faults, "\n".join(faults)


def text_files():
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(p.startswith(".") and p != ".ci" for p in parts)
        if hidden or SKIPPED_FOLDERS & set(parts) or path.suffix not in TEXT_SUFFIXES:
            continue
        if path.is_file() and path != Path(__file__).resolve() and "third_party" not in parts:
            yield path


def test_no_paths_of_one_machine_and_no_marks():
    forbidden = re.compile(r"/(?:work|root|home|tmp|mnt|Users)/|\b(?:TODO|FIXME|XXX|HACK)\b")
    faults = []
    for path in text_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if forbidden.search(line):
                faults.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert not faults, "\n".join(faults)


def test_every_source_says_what_it_is():
    """The first line of a C or CUDA file is a comment that names it."""
    faults = []
    for path in [*C_FILES, *KERNEL_FILES]:
        if "third_party" in path.parts:
            continue
        first = path.read_text().split("\n", 1)[0]
        if not first.startswith(f"/* {path.name} - "):
            faults.append(f"{name(path)}: {first[:60]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("layer", "quoted"),
    [
        ("base", "runtime/plan.h"),
        ("cpu", "cuda/driver.h"),
        ("runtime", "attention/attention.h"),
        ("ops", "attention/attention.h"),
        ("blend", "runtime/plan.h"),
        ("runtime", "kernels/attention/attention_params.h"),
        ("ops", "kernels/attention/attention_params.h"),
        ("python", "cuda/driver.h"),
        ("attention", "attention_params.h"),
    ],
)
def test_the_law_can_be_broken(layer, quoted):
    assert quoted_fault(ROOT / "csrc" / layer / "some.c", quoted)
