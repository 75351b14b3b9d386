"""Every declared kernel config compiles, without spills, local memory or serialised wgmma.

Needs: NVRTC (a CUDA toolkit or the nvidia-cuda-nvrtc wheel); no GPU. All configs for sm_80 and
sm_90a; for sm_100 and sm_120 one config of every portable kernel.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from raddle import _core
from raddle.errors import CompileError

# What a report must have none of. The CUDA core loops of a serving kernel live in registers.
FORBIDDEN = (
    "spill_store_bytes",
    "spill_load_bytes",
    "stack_bytes",
    "serialised",
    "local_memory",
)
MAX_CONFIGS = 150  # the declared list stays small enough for CI


@pytest.fixture(scope="module", autouse=True)
def nvrtc():
    try:
        return _core.nvrtc_info()
    except CompileError as error:
        pytest.skip(f"needs nvrtc: {error}")


def compile_all(kernels):
    """One line per kernel that does not compile or whose report has something forbidden."""

    def fault(kernel):
        name, config, arch = kernel
        words = " ".join(config.replace("#define RADDLE_", "").split("\n"))
        try:
            image, log = _core.compile_kernel(name, config, arch)
        except CompileError as error:
            return f"{name} {arch} [{words}]: {error}\n{error.log}"
        report = _core.parse_compile_log(log)
        found = {key: report[key] for key in FORBIDDEN if report[key]}
        if found or not image or report["registers"] == 0:
            return f"{name} {arch} [{words}]: {found or 'no report'}\n{log}"
        return None

    with ThreadPoolExecutor(2) as pool:
        return [line for line in pool.map(fault, kernels) if line]


def test_declared_configs_are_few_and_distinct():
    configs = _core.kernel_configs()
    assert 0 < len(configs) <= MAX_CONFIGS
    assert len({(name, config) for name, config, _ in configs}) == len(configs)
    for name, config, _ in configs:
        lines = config.splitlines()
        assert all(line.startswith("#define RADDLE_") for line in lines), name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_all_configs(arch):
    kernels = [
        (name, config, arch)
        for name, config, hopper_only in _core.kernel_configs()
        if not hopper_only or arch == "sm_90a"
    ]
    faults = compile_all(kernels)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_portable_kernels(arch):
    portable = [
        (name, config) for name, config, hopper_only in _core.kernel_configs() if not hopper_only
    ]
    first = [next(group) for _, group in itertools.groupby(sorted(portable), lambda row: row[0])]
    faults = compile_all([(name, config, arch) for name, config in first])
    assert not faults, "\n".join(faults)


def test_a_config_that_the_compiler_refuses():
    name, config, _ = _core.kernel_configs()[0]
    with pytest.raises(CompileError, match=r"error: .*this is no C") as caught:
        _core.compile_kernel(name, config + '#error "this is no C"\n', "sm_80")
    assert "this is no C" in caught.value.log
    with pytest.raises(CompileError, match="gpu-architecture"):
        _core.compile_kernel(name, config, "sm_20")
    with pytest.raises(ValueError, match="arch: expected"):
        _core.compile_kernel(name, config, "sm_80 -G")
    with pytest.raises(ValueError, match="raddle has no kernel attention/none"):
        _core.compile_kernel("attention/none", config, "sm_80")


def test_ptx_for_gpus_that_nvrtc_does_not_know():
    name, config, _ = _core.kernel_configs()[0]
    image, _ = _core.compile_kernel(name, config, "compute_80")
    assert b".target sm_80" in image
