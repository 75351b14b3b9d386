"""Calls of the cache, state, ops and tensor functions that are wrong, one per row; see
test_bad_input.py.

Needs: numpy; a GPU for cuda.
"""

import numpy as np
import pytest
import raddle
from raddle import ops
from raddle.attention import (
    append_paged_kv_cache,
    append_slots,
    get_batch_indices_positions,
    get_seq_lens,
    merge_state,
    merge_states,
)
from raddle.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    ShapeError,
    UnsupportedError,
)

from tests.bad_input_cases import check_bad_call, ints

CASES = {
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
    check_bad_call(device, *CASES[case])
