"""Merging attention states, appending to a paged cache, lengths and positions, on both back ends.

Needs: numpy; a GPU for device cuda.
"""

import numpy as np
import pytest
import raddle
from raddle.attention import (
    append_paged_kv_cache,
    append_slots,
    get_batch_indices_positions,
    get_seq_lens,
    merge_state,
    merge_state_in_place,
    merge_states,
)

from tests.attention_cases import assert_close, value
from tests.reference.attention import merge


@pytest.fixture
def rng(request):
    """Numbers that depend on the test's name alone."""
    return np.random.default_rng(sum(request.node.name.encode()))


def merge_case(rng, n, states, heads, dim):
    v = rng.standard_normal((states, n, heads, dim)).astype(np.float32)
    s = (rng.standard_normal((states, n, heads)) * 10).astype(np.float32)
    s[0, 0] = -np.inf  # one side empty
    v[0, 0] = 0.0
    s[:, 1] = -np.inf  # all sides empty
    v[:, 1] = 0.0
    return v, s


@pytest.mark.parametrize("lse_base", ["2", "e"])
def test_merge_state(rng, device, lse_base):
    v, s = merge_case(rng, 5, 2, 3, 40)
    want_v, want_s = merge(v, s, lse_base)
    args = [raddle.tensor(x, device=device) for x in (v[0], s[0], v[1], s[1])]
    got_v, got_s = merge_state(*args, lse_base=lse_base)
    assert_close(value(got_v, "float32"), want_v, "float32")
    assert_close(value(got_s, "float32"), want_s, "float32")
    mask = np.array([1, 1, 0, 1, 0], np.uint8)
    merge_state_in_place(*args, mask=raddle.tensor(mask, device=device), lse_base=lse_base)
    want_v[mask == 0], want_s[mask == 0] = v[0][mask == 0], s[0][mask == 0]
    assert_close(value(args[0], "float32"), want_v, "float32")
    assert_close(value(args[1], "float32"), want_s, "float32")


def test_merge_states(rng, device):
    v, s = merge_case(rng, 6, 7, 2, 24)
    want_v, want_s = merge(v, s)
    v_rows, s_rows = (np.ascontiguousarray(np.moveaxis(x, 0, 1)) for x in (v, s))
    got_v, got_s = merge_states(
        raddle.tensor(v_rows, device=device), raddle.tensor(s_rows, device=device)
    )
    assert_close(value(got_v, "float32"), want_v, "float32")
    assert_close(value(got_s, "float32"), want_s, "float32")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_appends_write_rows_and_nothing_else(rng, device, layout, index_dtype):
    page_size, heads, dim, pages = 5, 3, 16, 9
    shape = (
        (pages, 2, page_size, heads, dim) if layout == "NHD" else (pages, 2, heads, page_size, dim)
    )
    before = rng.standard_normal(shape).astype(np.float16)
    k, v = (rng.standard_normal((6, heads, dim)).astype(np.float16) for _ in range(2))
    indptr, indices = np.array([0, 2, 2, 4]), np.array([7, 1, 0, 4])
    requests, positions = np.array([0, 0, 2, 2, -1, 2]), np.array([4, 5, 0, 9, 0, 3])
    want = before.copy()
    slots = []
    for i, (r, p) in enumerate(zip(requests, positions)):
        page = indices[indptr[r] + p // page_size] if r >= 0 else None
        slots.append(-1 if page is None else page * page_size + p % page_size)
        if page is not None:
            at = (
                (page, slice(None), p % page_size)
                if layout == "NHD"
                else (page, slice(None), slice(None), p % page_size)
            )
            want[at] = np.stack([k[i], v[i]])
    for how in ("table", "slots"):
        cache = raddle.tensor(before, device=device)
        rows = [raddle.tensor(x, device=device) for x in (k, v)]
        index = [x.astype(index_dtype) for x in (requests, positions)]
        if how == "table":
            append_paged_kv_cache(
                *rows,
                *(raddle.tensor(x, device=device) for x in index),
                cache,
                raddle.tensor(indices.astype(index_dtype), device=device),
                raddle.tensor(indptr.astype(index_dtype), device=device),
                kv_layout=layout,
            )
        else:
            append_slots(
                *rows,
                raddle.tensor(np.array(slots, index_dtype), device=device),
                cache,
                kv_layout=layout,
            )
        assert np.array_equal(cache.to("cpu").numpy(), want)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_lengths_and_positions(device, index_dtype):
    def put(numbers):
        return raddle.tensor(np.array(numbers, index_dtype), device=device)

    lens = get_seq_lens(put([0, 2, 2, 5]), put([3, 0, 8]), 8)
    assert lens.to("cpu").numpy().tolist() == [11, 0, 24]
    requests, positions = get_batch_indices_positions(put([0, 2, 2, 5]), put([11, 4, 24]), 7)
    assert requests.to("cpu").numpy().tolist() == [0, 0, 2, 2, 2, -1, -1]
    assert positions.to("cpu").numpy().tolist() == [9, 10, 21, 22, 23, 0, 0]
