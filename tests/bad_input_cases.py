"""A small correct problem that the tables of bad calls spoil one argument at a time.

Needs: numpy.
"""

import numpy as np
import pytest
import raddle
from raddle.attention import BatchDecode, BatchPrefill

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


def check_bad_call(device, call, error, words):
    """call(world) raises error with words in a message of house style; a correct call still
    works."""
    world = World(device)
    with pytest.raises(error, match=f"(?s){words}") as caught:
        call(world)
    message = str(caught.value)
    assert message and message[0].islower() and not message.endswith(".")
    world.correct()
