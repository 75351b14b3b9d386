"""Calls that are wrong, one per row: the right class, the argument's name, what came and what was
expected; nothing crashes, and a correct call works afterwards. Needs: numpy; a GPU for cuda.

The engine's bad input (models, request files) is in test_engine_bad_input.py.
"""

import threading

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.attention import (
    BatchDecode,
    BatchPrefill,
    BatchRaggedPrefill,
    append_paged_kv_cache,
    append_slots,
    get_batch_indices_positions,
    get_seq_lens,
    merge_state,
    merge_states,
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

SPEC = dict(
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=64,
    page_size=16,
    dtype="float16",
    max_batch=4,
    max_pages=8,
)


class World:
    """A small correct problem: two requests of 20 and 5 tokens in a cache of 6 pages."""

    def __init__(self, device):
        self.device = device
        rng = np.random.default_rng(3)
        self.indptr = np.array([0, 2, 3], np.int32)
        self.indices = np.array([4, 1, 0], np.int32)
        self.last = np.array([4, 5], np.int32)
        self.cache = self.put(rng.standard_normal((6, 2, 16, 2, 64)).astype(np.float16))
        self.q = self.put(rng.standard_normal((2, 4, 64)).astype(np.float16))
        self.rows = self.put(rng.standard_normal((2, 2, 64)).astype(np.float16))
        self.x = self.put(rng.standard_normal((3, 32)).astype(np.float32))
        self.weight = self.put(rng.standard_normal(32).astype(np.float32))
        self.logits = self.put(rng.standard_normal((2, 50)).astype(np.float32))

    def put(self, array):
        return raddle.tensor(array, device=self.device)

    def zeros(self, shape, dtype="float16"):
        return raddle.zeros(shape, dtype=dtype, device=self.device)

    def decode(self, **changes):
        return BatchDecode(**{**SPEC, "device": self.device, **changes})

    def prefill(self, **changes):
        return BatchPrefill(**{**SPEC, "device": self.device, "max_qo_tokens": 64, **changes})

    def planned(self, **changes):
        plan = self.decode(**changes)
        plan.plan(self.indptr, self.indices, self.last)
        return plan

    def update(self, **changes):
        table = {"indptr": self.indptr, "indices": self.indices, "last_page_len": self.last}
        self.decode().plan(**{**table, **changes})

    def prefill_update(self, qo_indptr):
        self.prefill().plan(np.asarray(qo_indptr), self.indptr, self.indices, self.last)

    def correct(self):
        out, lse = self.planned().run(self.q, self.cache, return_lse=True)
        assert np.isfinite(out.to("cpu").numpy().astype(np.float32)).all()
        assert np.isfinite(lse.to("cpu").numpy()).all()


def ints(*numbers, dtype=np.int32):
    return np.array(numbers, dtype)


def foreign(world):
    """A tensor on no device of this call: needs to be refused, not read."""

    class Foreign:
        shape = (2, 4, 64)

        def __dlpack_device__(self):
            return (10, 0)  # ROCm

        def __dlpack__(self, **_):
            raise BufferError("no")

    return Foreign()


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
    # -- cache and states
    "slot past the cache": (
        lambda w: append_slots(w.rows, w.rows, ints(1, 96), w.cache),
        (ArgumentError, DeviceError),
        "slot_mapping",
    ),
    "slots float": (
        lambda w: append_slots(w.rows, w.rows, w.zeros((2,), "float32"), w.cache),
        DTypeError,
        "slot_mapping.*float32",
    ),
    "append rows differ": (
        lambda w: append_slots(w.rows, w.rows[:1], w.put(ints(1, 2)), w.cache),
        ShapeError,
        "v",
    ),
    "append dtype": (
        lambda w: append_slots(w.zeros((2, 2, 64), "float32"), w.rows, w.put(ints(1, 2)), w.cache),
        DTypeError,
        "k.*float16.*float32",
    ),
    "append head_dim": (
        lambda w: append_slots(w.rows[:, :, :32], w.rows, w.put(ints(1, 2)), w.cache),
        ShapeError,
        "k.*64.*32",
    ),
    "append table float": (
        lambda w: append_paged_kv_cache(
            w.rows,
            w.rows,
            w.put(ints(0, 1)),
            w.put(np.zeros(2, np.float32)),
            w.cache,
            w.put(w.indices),
            w.put(w.indptr),
        ),
        DTypeError,
        "positions.*float32",
    ),
    "seq_lens page_size": (
        lambda w: get_seq_lens(w.put(w.indptr), w.put(w.last), 0),
        ArgumentError,
        "page_size.*0",
    ),
    "positions negative nnz": (
        lambda w: get_batch_indices_positions(w.put(w.indptr), w.put(ints(2, 1)), -1),
        ArgumentError,
        "nnz.*-1",
    ),
    "merge shapes": (
        lambda w: merge_state(
            w.zeros((2, 4, 64)),
            w.zeros((2, 4), "float32"),
            w.zeros((2, 4, 32)),
            w.zeros((2, 4), "float32"),
        ),
        ShapeError,
        "v_b.*64.*32",
    ),
    "merge s dtype": (
        lambda w: merge_state(w.q, w.zeros((2, 4)), w.q, w.zeros((2, 4), "float32")),
        DTypeError,
        "s_a.*float32.*float16",
    ),
    "merge_states rank": (
        lambda w: merge_states(w.q, w.zeros((2, 4), "float32")),
        ShapeError,
        "v, s.*dimensions",
    ),
    # -- ops
    "rmsnorm weight": (lambda w: ops.rmsnorm(w.x, w.weight[:31]), ShapeError, "weight.*32.*31"),
    "rmsnorm int": (
        lambda w: ops.rmsnorm(w.zeros((3, 32), "int32"), w.weight),
        DTypeError,
        "x.*int32",
    ),
    "rmsnorm out": (
        lambda w: ops.rmsnorm(w.x, w.weight, out=w.zeros((3, 31), "float32")),
        ShapeError,
        "out",
    ),
    "silu odd": (lambda w: ops.silu_and_mul(w.x[:, :31]), ShapeError, "x.*31"),
    "rope cache width": (
        lambda w: ops.apply_rope(w.q, None, w.put(ints(0, 1)), w.zeros((4, 128), "float32")),
        ShapeError,
        "cos_sin_cache|rotary",
    ),
    "rope odd dim": (lambda w: ops.rope_cos_sin_cache(8, 5), ArgumentError, "rotary_dim.*5"),
    "rope type": (
        lambda w: ops.rope_cos_sin_cache(8, 4, scaling={"rope_type": "longrope"}),
        UnsupportedError,
        "longrope",
    ),
    "linear width": (
        lambda w: ops.Linear(w.zeros((8, 16), "float32"))(w.x),
        ShapeError,
        "x.*16.*32",
    ),
    "linear weight rank": (lambda w: ops.Linear(w.weight), ShapeError, "weight"),
    "sample temperature": (
        lambda w: ops.sample(w.logits, temperature=-1.0),
        ArgumentError,
        "temperature.*-1",
    ),
    "sample top_p": (lambda w: ops.sample(w.logits, top_p=1.5), ArgumentError, "top_p.*1.5"),
    "sample rank": (lambda w: ops.sample(w.weight), ShapeError, "logits"),
    "sample settings": (
        lambda w: ops.sample(w.logits, temperature=np.ones(3, np.float32)),
        (ShapeError, ArgumentError),
        "temperature.*2",
    ),
    "embedding ids": (
        lambda w: ops.embedding(w.zeros((2,), "float32"), w.logits),
        DTypeError,
        "ids.*float32",
    ),
    # -- tensors
    "empty negative": (lambda w: raddle.empty((2, -1), device=w.device), ShapeError, "-1"),
    "empty huge": (
        lambda w: raddle.empty((1 << 40, 1 << 40), device=w.device),
        (ShapeError, MemoryError),
        "",
    ),
    "reshape": (lambda w: w.x.reshape((5, 5)), ShapeError, "96 elements"),
    "copy shape": (lambda w: w.x.copy_(w.weight), ShapeError, "32"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_call(device, case):
    call, error, words = CASES[case]
    world = World(device)
    with pytest.raises(error, match=f"(?s){words}") as caught:
        call(world)
    message = str(caught.value)
    assert message and message[0].islower() and not message.endswith(".")
    world.correct()


def test_there_are_enough_of_them():
    assert len(CASES) >= 60


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
