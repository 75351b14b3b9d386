"""How a user's attention variant becomes code on the CPU: the compiler that is called, the cache,
what is said without either.

Needs: numpy, a C compiler.
"""

import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import raddle
from raddle.attention import BatchDecode

pytestmark = pytest.mark.keeps_blocks  # compiled variants stay

if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
    pytest.skip("needs cc: there is no C compiler on the PATH", allow_module_level=True)

SCRIPT = """
import sys
import numpy as np
import raddle
from raddle.attention import BatchDecode

source = '''float raddle_variant_output(const raddle_variant *v, const raddle_row *row, int32_t dim,
                            float x) { return x + MARK; }'''.replace("MARK", sys.argv[1])

def run():
    plan = BatchDecode(num_qo_heads=1, num_kv_heads=1, head_dim=8, page_size=1, max_batch=1,
                       max_pages=1, dtype="float32", variant=raddle.Variant("mark", source))
    plan.plan(np.array([0, 0]), np.zeros(0, np.int32), np.array([0]))
    return plan.run(np.zeros((1, 1, 8), "f4"), np.zeros((1, 2, 1, 1, 8), "f4"))[0, 0, 0]

print(run(), run())
EXTRA
"""


def run_script(mark, extra="", **environment):
    script = SCRIPT.replace("EXTRA", extra)
    environment = {**os.environ, "RADDLE_LOG": "2", **environment}
    command = [sys.executable, "-c", script, str(mark)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)


def test_compiled_once_and_kept_on_disk(tmp_path):
    first = run_script(7.5, RADDLE_CACHE_DIR=str(tmp_path))
    assert first.stdout.split() == ["7.5", "7.5"], first.stderr
    assert first.stderr.count("compiled variant mark") == 1
    (kept,) = tmp_path.glob("*.kernel")
    again = run_script(7.5, RADDLE_CACHE_DIR=str(tmp_path), PATH="")
    assert again.stdout.split() == ["7.5", "7.5"] and "compiled" not in again.stderr
    other = run_script(8.5, RADDLE_CACHE_DIR=str(tmp_path))
    assert other.stdout.split() == ["8.5", "8.5"] and "compiled" in other.stderr
    kept.write_bytes(kept.read_bytes()[:-100])
    damaged = run_script(7.5, RADDLE_CACHE_DIR=str(tmp_path))
    assert damaged.stdout.split() == ["7.5", "7.5"] and "compiled" in damaged.stderr


def test_a_cache_that_cannot_be_written_is_a_notice(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_script(7.5, RADDLE_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert done.stdout.split() == ["7.5", "7.5"], done.stderr
    assert "RADDLE_CACHE_DIR" in done.stderr
    assert run_script(7.5, RADDLE_CACHE_DIR="").stdout.split() == ["7.5", "7.5"]


def test_without_a_compiler(tmp_path):
    for words in (dict(PATH=str(tmp_path)), dict(CC="no-such-compiler -O1")):
        done = run_script(7.5, RADDLE_CACHE_DIR="", **words)
        assert "UnsupportedError" in done.stderr and "install" in done.stderr
        assert words.get("CC", "cc").split()[0] in done.stderr


def test_the_compiler_may_be_named_with_flags():
    done = run_script("FROM_CC", CC="cc  -DFROM_CC=2.5f", RADDLE_CACHE_DIR="")
    assert done.stdout.split() == ["2.5", "2.5"], done.stderr


def test_no_more_than_the_level_that_was_asked_for(tmp_path):
    spy = tmp_path / "spy"
    spy.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nexec cc "$@"\n')
    spy.chmod(0o755)
    done = run_script(1.5, CC=str(spy), RADDLE_CACHE_DIR="", RADDLE_ISA="generic")
    assert done.stdout.split() == ["1.5", "1.5"], done.stderr
    assert not re.search(r" -m", (tmp_path / "words").read_text())


def test_a_fork_and_threads_find_it():
    extra = """
import os
pid = os.fork()
if pid == 0:
    sys.argv[1] = "9"
    os._exit(0 if run() == 7.5 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    done = run_script(7.5, extra, RADDLE_CACHE_DIR="")
    assert done.returncode == 0, done.stderr


def test_threads_compile_it_once():
    source = """float raddle_variant_output(const raddle_variant *v, const raddle_row *row,
                            int32_t dim, float x) { return x + 0.125f; }"""
    plans, failures = [], []

    def make():
        try:
            variant = raddle.Variant("shared", source)
            plans.append(
                BatchDecode(
                    num_qo_heads=1,
                    num_kv_heads=1,
                    head_dim=8,
                    page_size=1,
                    max_batch=1,
                    max_pages=1,
                    variant=variant,
                )
            )
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 4 and not failures
