"""The decode cases that bench_decode.py measures: shapes, page tables, bytes counted by hand.

Plain NumPy, so that the numbers by which others are judged can be tested alone."""

import dataclasses
import itertools

import numpy as np

ELEMENT_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
FP8 = "float8_e4m3fn"
SCAN_BATCHES = (1, 4, 16, 64, 256)
SCAN_LENGTHS = tuple(256 << i for i in range(10))  # to 131072
SCAN_MAX_BYTES = 20e9  # of K and V in one case


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: lengths of the requests in tokens, heads, types; qo_len query tokens each."""

    name: str
    lens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    qo_len: int = 1  # more than one: causal
    q_scale: float = 1.0  # of the random queries: larger ones make the softmax peaked

    @property
    def batch(self):
        return len(self.lens)

    @property
    def num_pages(self):
        return sum(-(-length // self.page) for length in self.lens)

    @property
    def num_bytes(self):
        """K and V of all tokens, read once."""
        return sum(self.lens) * self.kv_heads * self.dim * 2 * ELEMENT_BYTES[self.kv_dtype]

    @property
    def cache_shape(self):
        return (self.num_pages, 2, self.page, self.kv_heads, self.dim)

    @property
    def is_contiguous(self):
        """Whether the cache's memory can be seen as K and V of equal, unpaged requests."""
        return len(set(self.lens)) == 1 and self.lens[0] % self.page == 0

    def page_table(self):
        """(indptr, indices, last_page_len), pages shuffled."""
        lens = np.array(self.lens)
        pages = -(-lens // self.page)
        indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        indices = np.random.default_rng(0).permutation(indptr[-1]).astype(np.int32)
        return indptr, indices, (lens - (pages - 1) * self.page).astype(np.int32)

    def qo_indptr(self):
        return (np.arange(self.batch + 1) * self.qo_len).astype(np.int32)


def equal(batch, kv_len, name=None, **shape):
    """A batch of equal requests."""
    return Case(name or f"B{batch}x{kv_len}", (kv_len,) * batch, **shape)


def zipf_lens(batch, mean):
    """Lengths drawn from Zipf's law with exponent 1.5, scaled to a mean before they are bounded."""
    ranks = np.random.default_rng(0).zipf(1.5, batch * 4).astype(float)
    ranks = ranks[ranks < 1e4][:batch]
    return tuple(int(max(16, min(131072, x))) for x in ranks / ranks.mean() * mean)


CUDA_ROWS = [
    equal(64, 4096),
    equal(64, 16384),
    equal(16, 8192),
    equal(1, 32768),
    equal(1, 131072),
    equal(1, 1024),
    equal(1, 4096),
    equal(4, 2048),
    equal(8, 1024),
    equal(16, 1024),
    equal(64, 1024),
    Case("skewed", (65536,) + (512,) * 63),
    Case("zipf", zipf_lens(64, 4096)),
    equal(64, 4096, "page1", page=1),
    equal(64, 4096, "page64", page=64),
    equal(32, 4096, "mha", kv_heads=32),
    equal(32, 4096, "gqa64", heads=64),
    equal(32, 4096, "mqa", kv_heads=1),
    equal(64, 8192, "fp8", kv_dtype=FP8),
    equal(64, 4096, "causal4", qo_len=4),
    equal(32, 4096, "dim64", dim=64),
]
BATCH_ATTENTION_ROWS = ("B64x4096", "skewed", "zipf")  # that FlashInfer's BatchAttention takes too
CUDA_QUICK = ("B64x4096", "B1x1024", "skewed", "fp8")

CPU_SHAPES = ((1, 4096), (8, 4096), (16, 4096), (1, 32768))
CPU_ROWS = [
    *(equal(*shape) for shape in CPU_SHAPES),
    *(equal(*shape, f"fp8-B{shape[0]}x{shape[1]}", kv_dtype=FP8) for shape in CPU_SHAPES),
    equal(8, 4096, "e5m2-B8x4096", kv_dtype="float8_e5m2"),
    equal(1, 4096, "f32-B1x4096", dtype="float32", kv_dtype="float32"),
    equal(8, 4096, "f32-B8x4096", dtype="float32", kv_dtype="float32"),
]
CPU_QUICK = ("B1x4096", "B8x4096")

UNEQUAL = (1, 17, 333, 4096, 777)
ERROR_CASES = [
    Case("bf16", UNEQUAL),
    Case("bf16, peaked", UNEQUAL, q_scale=4.0),
    Case("fp8 K/V", UNEQUAL, kv_dtype=FP8),
    Case("bf16, causal 4", (4, 17, 333, 4096, 777), qo_len=4),
]


def scan_cases():
    """Batches x lengths, without those that need more memory than SCAN_MAX_BYTES."""
    grid = (equal(batch, length) for batch, length in itertools.product(SCAN_BATCHES, SCAN_LENGTHS))
    return [case for case in grid if case.num_bytes <= SCAN_MAX_BYTES]
