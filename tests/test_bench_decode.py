"""The cases of bench_decode.py: their bytes, their page tables, their lengths; and a run of it.

Needs: numpy; torch for the run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs a checkout: benchmarks is not here", allow_module_level=True)


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load("decode_cases")
ALL = [*cases.CUDA_ROWS, *cases.CPU_ROWS, *cases.ERROR_CASES]


def test_bytes_of_known_rows():
    rows = {case.name: case.num_bytes for case in cases.CUDA_ROWS}
    assert (
        rows["B64x4096"] == 64 * 4096 * 4096
    )  # 8 heads x 128 x (K and V) x 2 bytes = 4 KiB a token
    assert rows["fp8"] == 64 * 8192 * 2048
    assert rows["mqa"] == 32 * 4096 * 512
    assert rows["skewed"] == (65536 + 63 * 512) * 4096


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_page_tables_hold_every_token_once(case):
    indptr, indices, last = case.page_table()
    assert sorted(indices) == list(range(case.num_pages))
    assert np.array_equal((np.diff(indptr) - 1) * case.page + last, case.lens)
    assert ((1 <= last) & (last <= case.page)).all()


def test_names_are_unique_and_known():
    for rows, quick in ((cases.CUDA_ROWS, cases.CUDA_QUICK), (cases.CPU_ROWS, cases.CPU_QUICK)):
        names = [case.name for case in rows]
        assert len(set(names)) == len(names)
        assert set(quick) <= set(names)
    assert set(cases.BATCH_ATTENTION_ROWS) <= {case.name for case in cases.CUDA_ROWS}


def test_zipf_lengths_are_skewed_within_bounds():
    lens = np.array(cases.zipf_lens(64, 4096))
    assert len(lens) == 64 and lens.min() >= 16 and lens.max() <= 131072
    assert lens.max() > 8 * np.median(lens)


def test_scan_stays_within_its_memory():
    scan = cases.scan_cases()
    assert all(case.num_bytes <= cases.SCAN_MAX_BYTES for case in scan)
    assert {case.batch for case in scan} == set(cases.SCAN_BATCHES)
    assert max(case.lens[0] for case in scan if case.batch == 1) == 131072


def test_bench_runs(tmp_path):
    pytest.importorskip("torch", reason="needs torch: the benches compare with it")
    file = tmp_path / "decode.json"
    argv = ["--quick", "--rows", "B1x4096", "--parts", "rows,errors", "--json", str(file)]
    subprocess.run([sys.executable, str(BENCHMARKS / "bench_decode.py"), *argv], check=True)
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert row["ours_us"] > 0 and row["bytes"] == 4096 * 4096 and row["failed"] == {}
    assert set(row["sides_us"]) == {"raddle", "read", "torch sdpa"}
    errors = {(e["case"], e["side"]): e for e in result["errors"] if "rms" in e}
    ours, peer = (errors["bf16", side] for side in ("raddle", "torch sdpa"))
    assert ours["rms"] < 1.5 * max(peer["rms"], ours["floor_rms"])
