"""The examples run, and find what they compute to be right.

Needs: a checkout, numpy, a C compiler; a GPU for device cuda.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.keeps_blocks  # compiled variants stay

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
VARIANTS = EXAMPLES / "variants" / "variants.py"
BLEND_SCHEDULER = EXAMPLES / "blend_scheduler.py"

if not VARIANTS.is_file():
    pytest.skip("needs a checkout: examples is not here", allow_module_level=True)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants(device, capsys):
    if device == "cpu" and shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
        pytest.skip("needs cc: there is no C compiler on the PATH")
    example = load(VARIANTS)
    assert example.main(["--device", device]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [make.__name__ for make in example.VARIANTS]
    texts = {path.stem for path in VARIANTS.parent.glob("*.c")}
    assert texts == {make.__name__ for make in example.VARIANTS}


def test_variants_can_be_wrong(capsys, monkeypatch):
    """The example's own check fails on a wrong result."""
    example = load(VARIANTS)

    def other_cap(rng):
        declared, args, hooks = example.tanh_cap(rng)
        return declared, dict(cap=1.0), hooks

    other_cap.__name__ = "tanh_cap"
    if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
        pytest.skip("needs cc: there is no C compiler on the PATH")
    monkeypatch.setattr(example, "VARIANTS", [other_cap])
    assert example.main([]) == 1


def test_blend_scheduler(capsys):
    assert load(BLEND_SCHEDULER).main(["--requests", "6000"]) == 0
    first, dfs, paced, last = capsys.readouterr().out.splitlines()
    assert first.startswith("6000 requests") and "simulated" in first
    assert dfs.split()[0] == "dfs" and paced.split()[0] == "paced"
    assert 0.5 < float(last.split()[2]) < 1  # of the time


def test_blend_scheduler_can_be_wrong(capsys, monkeypatch):
    """The example's own check fails when a request ends too early."""
    example = load(BLEND_SCHEDULER)
    run = example.run

    def run_less(*arguments, **options):
        scheduler, seconds, given = run(*arguments, **options)
        given[len(given) // 2] -= 1
        return scheduler, seconds, given

    monkeypatch.setattr(example, "run", run_less)
    assert example.main(["--requests", "200"]) == 1
