"""Makes attention problems that are unkind: shuffled pages, NaN wherever nothing may be read, odd
strides.

Needs: numpy. Data is made in float32 and rounded to the dtype under test, so that the reference
sees the same numbers."""

import functools

import numpy as np
import raddle

# (relative, absolute) of the result against float64, for inputs that are exact in the dtype.
TOLERANCE = {
    "float32": (2e-5, 2e-5),
    "float16": (2e-3, 2e-3),
    "bfloat16": (1.6e-2, 1.6e-2),
}


FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@functools.cache
def float8_values(dtype):
    """float64 [256]: the value of each byte. e4m3fn has no infinities and one NaN per sign, e5m2 is
    the upper half of a float16."""
    codes = np.arange(256)
    if dtype == "float8_e5m2":
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size))


def to_float8(x, dtype):
    """The byte of the nearest value, of the largest where that is past the end; NaN as 0x7f."""
    values = float8_values(dtype)
    codes = np.flatnonzero(np.isfinite(values) & (np.arange(256) < 128))
    middles = (values[codes][1:] + values[codes][:-1]) / 2
    code = codes[np.searchsorted(middles, np.abs(np.nan_to_num(x)))]
    return np.where(np.isnan(x), 127, code | np.where(x < 0, 128, 0)).astype(np.uint8)


def to_bits(x, dtype):
    """float32 array -> the array a NumPy user would hold: bfloat16 as uint16, rounded to nearest
    even; float8 as uint8."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype in FLOAT8:
        return to_float8(x, dtype)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(x), 0x7FC0, rounded)
    return rounded.astype(np.uint16)


def from_bits(x, dtype):
    """The float64 value of what to_bits made."""
    if dtype in FLOAT8:
        return float8_values(dtype)[x]
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


class Batch:
    """A paged batch with its tables, its cache full of NaN where no token lies, and the reference's
    answer."""

    def __init__(
        self,
        rng,
        kv_lens,
        *,
        qo_lens=None,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=64,
        head_dim_vo=None,
        page_size=16,
        layout="NHD",
        dtype="bfloat16",
        kv_dtype=None,
        packed=True,
    ):
        self.kv_lens = list(kv_lens)
        self.qo_lens = [1] * len(self.kv_lens) if qo_lens is None else list(qo_lens)
        self.dtype, self.kv_dtype = dtype, kv_dtype or dtype
        self.layout, self.page_size = layout, page_size
        dim_vo = head_dim_vo or head_dim
        pages = [-(-n // page_size) for n in self.kv_lens]
        total = sum(pages)
        self.num_pages = total + 3
        self.indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        ids = rng.permutation(self.num_pages)[:total].astype(np.int32)
        self.indices = ids
        self.last_page_len = np.array(
            [n - (p - 1) * page_size if p else 0 for n, p in zip(self.kv_lens, pages)], np.int32
        )
        self.qo_indptr = np.concatenate([[0], np.cumsum(self.qo_lens)]).astype(np.int32)
        self.q = to_bits(rng.standard_normal((sum(self.qo_lens), num_qo_heads, head_dim)), dtype)
        shape = (self.num_pages, page_size, num_kv_heads)
        k = np.full((*shape, head_dim), np.nan, np.float32)
        v = np.full((*shape, dim_vo), np.nan, np.float32)
        for r, n in enumerate(self.kv_lens):
            for j in range(n):
                page = ids[self.indptr[r] + j // page_size]
                k[page, j % page_size] = rng.standard_normal((num_kv_heads, head_dim))
                v[page, j % page_size] = rng.standard_normal((num_kv_heads, dim_vo))
        k, v = to_bits(k, self.kv_dtype), to_bits(v, self.kv_dtype)
        if layout == "HND":
            k, v = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (k, v))
        self.k, self.v = k, v
        self.kv_cache = np.stack([k, v], axis=1) if packed and head_dim == dim_vo else (k, v)

    def block_table(self, width, padding):
        """[batch, width] page ids with padding behind each request's own."""
        table = np.full((len(self.kv_lens), width), padding, np.int32)
        for r in range(len(self.kv_lens)):
            own = self.indices[self.indptr[r] : self.indptr[r + 1]]
            table[r, : len(own)] = own
        return table

    def expected(self, **options):
        """float64 (out, lse) of the whole batch."""
        from tests.reference.attention import attend, gather_pages

        q = from_bits(self.q, self.dtype)
        k, v = from_bits(self.k, self.kv_dtype), from_bits(self.v, self.kv_dtype)
        outs, lses = [], []
        for r, n in enumerate(self.kv_lens):
            ids = self.indices[self.indptr[r] : self.indptr[r + 1]]
            out, lse = attend(
                q[self.qo_indptr[r] : self.qo_indptr[r + 1]],
                gather_pages(k, ids, n, self.layout),
                gather_pages(v, ids, n, self.layout),
                request=r,
                first_token=self.qo_indptr[r],
                **options,
            )
            outs.append(out)
            lses.append(lse)
        return np.concatenate(outs), np.concatenate(lses)


def assert_close(got, want, dtype, factor=1):
    """got (float64) against the reference, within factor times the table's tolerance; -inf must
    match exactly."""
    rtol, atol = (factor * x for x in TOLERANCE[dtype])
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(got), finite)
    assert np.array_equal(got[~finite], want[~finite])
    np.testing.assert_allclose(got[finite], want[finite], rtol=rtol, atol=atol)


def place(x, dtype, device):
    """NumPy bits where the test runs: as they are on the CPU, a raddle.Tensor on CUDA."""
    if isinstance(x, tuple):
        return tuple(place(part, dtype, device) for part in x)
    return x if device == "cpu" else raddle.tensor(x, dtype=dtype, device=device)


def value(x, dtype):
    """float64 value of a result."""
    x = x.to("cpu").numpy() if isinstance(x, raddle.Tensor) else x
    return from_bits(x, dtype)
