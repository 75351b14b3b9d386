"""Writing into a paged KV cache, and the lengths and positions that its page table implies."""

from . import _core


def split_cache(kv_cache):
    """(k, v) of a cache given as one tensor (v: None) or as a pair."""
    return kv_cache if isinstance(kv_cache, (tuple, list)) else (kv_cache, None)


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    kv_cache,
    kv_indices,
    kv_indptr,
    *,
    kv_layout="NHD",
    dtype=None,
    stream=None,
):
    """Write rows into a paged cache, in place.

    append_key, append_value: [n, num_kv_heads, head_dim]; row i becomes token positions[i] of
    request batch_indices[i]; a negative batch index skips the row. kv_indptr, kv_indices: the page
    table after the append. dtype names the bits of 16-bit NumPy caches that are no float16. Host
    indices are checked (ArgumentError) before anything is written. On the device, rows that lead to
    no page of the table or the cache are skipped; with RADDLE_CHECK=1 the next append or call on an
    attention plan of that GPU raises ArgumentError for the first of them, and does nothing else."""
    k, v = split_cache(kv_cache)
    _core.attention_append(
        append_key,
        append_value,
        k,
        v,
        batch_indices,
        positions,
        kv_indptr,
        kv_indices,
        kv_layout,
        dtype,
        stream,
    )


def append_slots(k, v, slot_mapping, kv_cache, *, kv_layout="NHD", dtype=None, stream=None):
    """Write rows into a paged cache, in place: row i goes to slot_mapping[i] = page * page_size +
    offset.

    k, v: [n, num_kv_heads, head_dim]; -1 skips a row; other slots outside the cache raise
    ArgumentError when slot_mapping is on the host. On the device they are skipped; with
    RADDLE_CHECK=1 the next append or call on an attention plan of that GPU raises ArgumentError for
    the first of them, and does nothing else. Two rows must not share a slot."""
    k_cache, v_cache = split_cache(kv_cache)
    _core.attention_append_slots(k, v, k_cache, v_cache, slot_mapping, kv_layout, dtype, stream)


def get_seq_lens(kv_indptr, kv_last_page_len, page_size, *, out=None, stream=None):
    """Tokens of each request of a page table.

    int32 [batch] (or out's dtype), where kv_indptr is.
    """
    return _core.attention_seq_lens(kv_indptr, kv_last_page_len, page_size, out, stream)


def get_batch_indices_positions(
    append_indptr, seq_lens, nnz, *, batch_indices=None, positions=None, stream=None
):
    """Request and position of each of nnz appended rows, for append_paged_kv_cache.

    append_indptr [batch + 1]: each request's rows, its last tokens; seq_lens [batch]: lengths after
    the append. Returns int32 [nnz] each (or what is given). Rows past append_indptr[-1] (padding
    under a CUDA Graph) get -1 and 0, which append skips.
    """
    return _core.attention_positions(append_indptr, seq_lens, nnz, batch_indices, positions, stream)
