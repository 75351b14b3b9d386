"""Plans and runs that are wrong, one per row: the right class, the argument's name, what came and
what was expected; nothing crashes, and a correct call works afterwards.

The rows for caches, states, ops and tensors are in test_bad_input_ops.py, those for models and
request files in test_engine_bad_input.py. Needs: numpy; a GPU for cuda."""

import threading

import numpy as np
import pytest
from raddle.attention import (
    BatchDecode,
    BatchRaggedPrefill,
)
from raddle.errors import (
    ArgumentError,
    CapacityError,
    DeviceError,
    DTypeError,
    ShapeError,
    StateError,
    UnsupportedError,
)

from tests.bad_input_cases import SPEC, World, check_bad_call, foreign, ints

# name: (call, exception, words that its message must hold)
CASES = {
    # -- making a plan
    "head_dim 12": (lambda w: w.decode(head_dim=12), ShapeError, "head_dim.*multiple of 8.*12"),
    "head_dim 0": (lambda w: w.decode(head_dim=0), ShapeError, "head_dim.*0"),
    "head_dim 264": (lambda w: w.decode(head_dim=264), ShapeError, "head_dim.*256.*264"),
    "head_dim_vo 7": (lambda w: w.decode(head_dim_vo=7), ShapeError, "head_dim_vo.*7"),
    "heads no multiple": (lambda w: w.decode(num_qo_heads=5), ShapeError, "num_qo_heads.*2.*5"),
    "no kv heads": (lambda w: w.decode(num_kv_heads=0), ShapeError, "num_kv_heads.*0"),
    "negative heads": (lambda w: w.decode(num_qo_heads=-4), ShapeError, "num_qo_heads.*-4"),
    "page_size 0": (lambda w: w.decode(page_size=0), ArgumentError, "page_size.*0"),
    "page_size huge": (lambda w: w.decode(page_size=1 << 20), ArgumentError, "page_size"),
    "dtype unknown": (lambda w: w.decode(dtype="float12"), DTypeError, "dtype.*float12"),
    "dtype int32": (lambda w: w.decode(dtype="int32"), DTypeError, "dtype.*int32"),
    "kv_dtype int8": (lambda w: w.decode(kv_dtype="int8"), DTypeError, "kv_dtype.*int8"),
    "layout": (lambda w: w.decode(kv_layout="DHN"), ArgumentError, "kv_layout.*NHD.*DHN"),
    "lse_base": (lambda w: w.decode(lse_base="10"), ArgumentError, "lse_base.*10"),
    "sm_scale nan": (lambda w: w.decode(sm_scale=float("nan")), ArgumentError, "sm_scale.*nan"),
    "sm_scale 0": (lambda w: w.decode(sm_scale=0.0), ArgumentError, "sm_scale.*None for"),
    "sm_scale negative": (lambda w: w.decode(sm_scale=-1.0), ArgumentError, "sm_scale.*-1"),
    "fixed_chunk 100": (lambda w: w.decode(fixed_chunk=100), ArgumentError, "fixed_chunk.*64.*100"),
    "max_ctas": (lambda w: w.decode(max_ctas=-1), ArgumentError, "max_ctas.*-1"),
    "max_batch 0": (lambda w: w.decode(max_batch=0), ArgumentError, "max_batch.*0"),
    "max_pages -1": (lambda w: w.decode(max_pages=-1), ArgumentError, "max_pages.*-1"),
    "max_qo_tokens 0": (lambda w: w.prefill(max_qo_tokens=0), ArgumentError, "max_qo_tokens"),
    "device word": (lambda w: w.decode(device="tpu"), DeviceError, "device.*tpu"),
    "device index": (lambda w: w.decode(device="cpu:3"), DeviceError, "cpu:3"),
    "device absent": (lambda w: w.decode(device="cuda:97"), DeviceError, "97|driver|libcuda"),
    # -- planning a batch
    "indptr from 1": (lambda w: w.update(indptr=ints(1, 2, 3)), ArgumentError, "indptr.*0.*1"),
    "indptr falls": (
        lambda w: w.update(indptr=ints(0, 3, 2)),
        ArgumentError,
        "indptr.*non-decreasing.*2 after 3.*position 2",
    ),
    "indptr past indices": (
        lambda w: w.update(indptr=ints(0, 2, 5), last_page_len=ints(1, 1)),
        ShapeError,
        "indices.*at least 5.*got 3",
    ),
    "indptr 2-D": (lambda w: w.update(indptr=np.zeros((1, 3), np.int32)), ShapeError, "indptr"),
    "indptr float": (
        lambda w: w.update(indptr=np.zeros(3, np.float32)),
        DTypeError,
        "indptr.*float32",
    ),
    "indptr missing": (lambda w: w.decode().plan(), ArgumentError, "indptr"),
    "indptr a list": (lambda w: w.update(indptr=[0, 2, 3]), DTypeError, "indptr.*list"),
    "indptr int16": (lambda w: w.update(indptr=np.array([0, 2, 3], np.int16)), DTypeError, "int16"),
    "indices missing": (
        lambda w: w.decode().plan(w.indptr, None, w.last),
        ArgumentError,
        "indices, last_page_len.*both",
    ),
    "page id negative": (
        lambda w: w.update(indices=ints(4, -1, 0)),
        ArgumentError,
        "indices.*-1 at position 1",
    ),
    "page id past 31 bits": (
        lambda w: w.update(indices=ints(4, 1 << 40, 0, dtype=np.int64)),
        ArgumentError,
        "indices.*1099511627776 at position 1",
    ),
    "page id past the cache": (
        lambda w: (lambda p: (p.plan(w.indptr, ints(4, 6, 0), w.last), p.run(w.q, w.cache)))(
            w.decode()
        ),
        ArgumentError,
        "indices.*6 at position 1.*6 pages",
    ),
    "last_page_len 0": (
        lambda w: w.update(last_page_len=ints(0, 5)),
        ArgumentError,
        "last_page_len.*1 to page_size.*position 0.*got 0",
    ),
    "last_page_len 17": (
        lambda w: w.update(last_page_len=ints(4, 17)),
        ArgumentError,
        "last_page_len.*position 1.*got 17",
    ),
    "last_page_len short": (
        lambda w: w.update(last_page_len=ints(4)),
        ShapeError,
        "last_page_len.*2.*1",
    ),
    "last_page_len of none": (
        lambda w: w.update(indptr=ints(0, 3, 3), last_page_len=ints(4, 1)),
        ArgumentError,
        "last_page_len.*expected 0.*position 1",
    ),
    "too many requests": (
        lambda w: w.update(indptr=np.zeros(6, np.int32), last_page_len=np.zeros(5, np.int32)),
        CapacityError,
        "5 requests.*made for 4.*max_batch",
    ),
    "too many pages": (
        lambda w: w.update(indptr=ints(0, 9), indices=np.zeros(9, np.int32), last_page_len=ints(1)),
        CapacityError,
        "9 pages.*made for 8.*max_pages",
    ),
    "too many rows": (
        lambda w: w.prefill_update([0, 60, 65]),
        CapacityError,
        "qo_indptr.*65.*64.*max_qo_tokens",
    ),
    "qo_indptr short": (lambda w: w.prefill_update([0, 3]), ShapeError, r"qo_indptr.*\[3\].*\[2\]"),
    "qo_indptr falls": (
        lambda w: w.prefill_update([0, 3, 1]),
        ArgumentError,
        "qo_indptr.*1 after 3",
    ),
    "qo_indptr from 2": (lambda w: w.prefill_update([2, 3, 4]), ArgumentError, "qo_indptr.*0.*2"),
    "qo_len past max_qo_len": (
        lambda w: w.prefill(max_qo_len=2).plan(ints(0, 3, 4), w.indptr, w.indices, w.last),
        CapacityError,
        "request 0 has 3.*made for 2",
    ),
    "block_table and indptr": (
        lambda w: w.decode().plan(
            w.indptr, block_table=np.zeros((2, 2), np.int32), seq_lens=ints(1, 1)
        ),
        ArgumentError,
        "block_table",
    ),
    "block_table alone": (
        lambda w: w.decode().plan(block_table=np.zeros((2, 2), np.int32)),
        ArgumentError,
        "block_table.*seq_lens",
    ),
    "seq_lens past the table": (
        lambda w: w.decode().plan(block_table=np.zeros((2, 2), np.int32), seq_lens=ints(33, 1)),
        ArgumentError,
        "seq_lens.*32.*got 33",
    ),
    "seq_lens negative": (
        lambda w: w.decode().plan(block_table=np.zeros((2, 2), np.int32), seq_lens=ints(3, -1)),
        ArgumentError,
        "seq_lens.*position 1.*-1",
    ),
    "block_table past max_pages": (
        lambda w: w.decode().plan(block_table=np.zeros((3, 3), np.int32), seq_lens=ints(1, 1, 1)),
        CapacityError,
        "block_table.*9.*8",
    ),
    # -- running
    "run before plan": (lambda w: w.decode().run(w.q, w.cache), StateError, "plan"),
    "schedule before plan": (lambda w: w.decode().schedule(), StateError, "plan"),
    "q rows": (
        lambda w: w.planned().run(w.zeros((3, 4, 64)), w.cache),
        ShapeError,
        "q.*2, 4, 64.*3, 4, 64",
    ),
    "q heads": (
        lambda w: w.planned().run(w.zeros((2, 8, 64)), w.cache),
        ShapeError,
        "q.*2, 4, 64.*2, 8, 64",
    ),
    "q rank": (lambda w: w.planned().run(w.zeros((2, 256)), w.cache), ShapeError, "q"),
    "q dtype": (
        lambda w: w.planned().run(w.zeros((2, 4, 64), "bfloat16"), w.cache),
        DTypeError,
        "q.*float16.*bfloat16",
    ),
    "q None": (lambda w: w.planned().run(None, w.cache), DTypeError, "q.*None"),
    "q a string": (lambda w: w.planned().run("q", w.cache), DTypeError, "q.*str"),
    "q on no device": (
        lambda w: w.planned().run(foreign(w), w.cache),
        (DeviceError, ArgumentError),
        "q",
    ),
    "cache rank": (
        lambda w: w.planned().run(w.q, w.zeros((6, 16, 2, 64))),
        ShapeError,
        "kv_cache.*5",
    ),
    "cache page_size": (
        lambda w: w.planned().run(w.q, w.zeros((6, 2, 8, 2, 64))),
        ShapeError,
        "kv_cache.*16.*8",
    ),
    "cache heads": (
        lambda w: w.planned().run(w.q, w.zeros((6, 2, 16, 4, 64))),
        ShapeError,
        "kv_cache.*2 heads.*4",
    ),
    "cache dtype": (
        lambda w: w.planned().run(w.q, w.zeros((6, 2, 16, 2, 64), "bfloat16")),
        DTypeError,
        "kv_cache.*float16.*bfloat16",
    ),
    "cache v pages": (
        lambda w: w.planned().run(w.q, (w.zeros((6, 16, 2, 64)), w.zeros((5, 16, 2, 64)))),
        ShapeError,
        "6.*5",
    ),
    "cache inner stride": (
        lambda w: w.planned().run(w.q, w.zeros((6, 2, 16, 2, 128))[:, :, :, :, ::2]),
        UnsupportedError,
        "kv_cache.*stride",
    ),
    "out shape": (
        lambda w: w.planned().run(w.q, w.cache, out=w.zeros((2, 4, 32))),
        ShapeError,
        "out.*2, 4, 64.*2, 4, 32",
    ),
    "out dtype": (
        lambda w: w.planned().run(w.q, w.cache, out=w.zeros((2, 4, 64), "float32")),
        DTypeError,
        "out.*float16.*float32",
    ),
    "out overlaps itself": (
        lambda w: w.planned().run(
            w.q,
            w.cache,
            out=np.lib.stride_tricks.as_strided(
                np.zeros((1, 4, 64), np.float16), (2, 4, 64), (0, 128, 2)
            ),
        ),
        (ShapeError, DeviceError),
        "out",
    ),
    "lse dtype": (
        lambda w: w.planned().run(w.q, w.cache, lse=w.zeros((2, 4))),
        DTypeError,
        "lse.*float32.*float16",
    ),
    "lse shape": (
        lambda w: w.planned().run(w.q, w.cache, lse=w.zeros((4, 2), "float32")),
        ShapeError,
        "lse.*2, 4.*4, 2",
    ),
    "workspace small": (
        lambda w: w.prefill(
            workspace=w.zeros((w.prefill(max_qo_tokens=4096).workspace_size // 2 + 1,), "uint8")[:1]
        ),
        CapacityError,
        "workspace.*bytes needed, 1 given",
    ),
    "workspace strided": (
        lambda w: w.decode(workspace=w.zeros((64, 1 << 16), "uint8")[::2]),
        ShapeError,
        "workspace.*contiguous",
    ),
    "ragged k rows": (
        lambda w: (
            lambda p: (
                p.plan(ints(0, 2), ints(0, 5)),
                p.run(w.zeros((2, 4, 64)), w.zeros((4, 2, 64)), w.zeros((4, 2, 64))),
            )
        )(
            BatchRaggedPrefill(
                num_qo_heads=4,
                num_kv_heads=2,
                head_dim=64,
                max_batch=1,
                max_qo_tokens=4,
                max_kv_tokens=8,
                dtype="float16",
                device=w.device,
            )
        ),
        ShapeError,
        "k.*5 rows.*got 4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_call(device, case):
    check_bad_call(device, *CASES[case])


def test_read_only_out(device):
    world = World(device)
    if device == "cuda":
        pytest.skip("NumPy arrays are the read-only producers here, and live on the CPU")
    out = np.zeros((2, 4, 64), np.float16)
    out.flags.writeable = False
    with pytest.raises(ArgumentError, match="out.*read-only"):
        world.planned().run(world.q, world.cache, out=out)


def test_tensors_of_the_other_device(device):
    if device == "cpu":
        pytest.skip("needs gpu: on the CPU there is no other device")
    world = World(device)
    q = np.zeros((2, 4, 64), np.float16)
    with pytest.raises(DeviceError, match="q.*cuda.*cpu"):
        world.planned().run(q, world.cache)
    with pytest.raises(DeviceError, match="kv_cache.*cuda.*cpu"):
        world.planned().run(world.q, np.zeros((6, 2, 16, 2, 64), np.float16))
    world.correct()


def test_two_threads_in_one_plan():
    """One of two threads that run one plan at once is told so; no result is torn."""
    world = World("cpu")
    rng = np.random.default_rng(0)
    pages = 512
    plan = BatchDecode(**{**SPEC, "max_pages": pages, "max_batch": 1})
    plan.plan(ints(0, pages), np.arange(pages, dtype=np.int32), ints(16))
    cache = rng.standard_normal((pages, 2, 16, 2, 64)).astype(np.float16)
    q = rng.standard_normal((1, 4, 64)).astype(np.float16)
    want = plan.run(q, cache)
    refused, wrong = [], []

    def work():
        for _ in range(100):
            try:
                if not np.array_equal(plan.run(q, cache), want):
                    wrong.append(1)
            except StateError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert refused and all("another thread" in text for text in refused)
    world.correct()
