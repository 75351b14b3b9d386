"""The README's own programs run. Needs: numpy; torch for the one that imports it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(block):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, str(README), "exec"), {})
    return printed.getvalue()


def test_numpy_program():
    assert "(3, 8, 64)" in run(BLOCKS[0])


def test_torch_program():
    try:
        import torch  # noqa: F401
    except ImportError:
        pytest.skip("needs torch: it is not installed")
    assert "torch.Size([20, 8, 64]) torch.bfloat16" in run(BLOCKS[1])


def test_every_program_is_run():
    assert len(BLOCKS) == 2
