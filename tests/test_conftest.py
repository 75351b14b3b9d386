"""The test harness itself: skips are told and can be refused, leaks fail, devices can be chosen.

Needs: nothing. Each case is a pytest of its own over a copy of conftest.py and a made-up raddle.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
FAKE_CORE = """
blocks = []
def alloc_live():
    return len(blocks)
"""
SKIPS = """
import pytest
def test_skips():
    pytest.skip("needs nonesuch: not on this machine")
def test_passes():
    pass
"""
SKIPS_MODULE = """
import pytest
pytest.importorskip("nonesuch")
def test_passes():
    pass
"""
LEAKS = """
import pytest
from raddle import _core
def test_leaks():
    _core.blocks.append(1)
def test_gives_back():
    _core.blocks.append(1)
    _core.blocks.pop()
@pytest.mark.keeps_blocks
def test_fills_a_cache():
    _core.blocks.append(1)
"""
LEAKS_AND_FAILS = """
from raddle import _core
def test_fails():
    _core.blocks.append(1)
    assert False, "for another reason"
"""
DEVICES = """
def test_device(device):
    print("ran on", device)
"""


@pytest.fixture
def run(tmp_path):
    def run_pytest(text, *options, **environment):
        (tmp_path / "raddle").mkdir(exist_ok=True)
        (tmp_path / "raddle" / "__init__.py").write_text("")
        (tmp_path / "raddle" / "_core.py").write_text(FAKE_CORE)
        (tmp_path / "test_case.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        shutil.copy(CONFTEST, tmp_path)
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *options]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("RADDLE_", "PYTEST_"))}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**plain, "PYTHONPATH": str(tmp_path), **environment},
            text=True,
            capture_output=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run_pytest


@pytest.mark.parametrize("text", [SKIPS, SKIPS_MODULE])
def test_skips_are_listed(run, text):
    code, output = run(text, RADDLE_REQUIRE="torch,nonesuc")
    assert code in (0, 5), output  # 5: nothing was left to run
    assert "skipped, and why" in output
    assert "nonesuch" in output.split("skipped, and why", 1)[1]


@pytest.mark.parametrize("text", [SKIPS, SKIPS_MODULE])
def test_required_skips_fail(run, text):
    code, output = run(text, RADDLE_REQUIRE="torch,nonesuch")
    assert code in (1, 2), output
    assert "RADDLE_REQUIRE names nonesuch" in output


def test_leaks_fail(run):
    code, output = run(LEAKS)
    assert code == 1, output
    assert "1 blocks of raddle's heap outlived the test" in output
    assert "3 passed, 1 error" in output


def test_a_failure_is_not_called_a_leak(run):
    code, output = run(LEAKS_AND_FAILS)
    assert code == 1, output
    assert "for another reason" in output and "outlived" not in output


def test_device_option(run):
    code, output = run(DEVICES, "--device", "cpu")
    assert code == 0, output
    assert "ran on cpu" in output and "1 passed, 1 deselected" in output
    code, output = run(DEVICES, "--device", "cuda")
    assert "ran on cpu" not in output and "1 deselected" in output
    code, output = run(DEVICES)
    assert code == 0, output
    assert "ran on cuda" in output or "needs gpu: " in output
