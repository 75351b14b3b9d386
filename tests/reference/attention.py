"""Attention in float64 NumPy, one query row at a time: slow, obvious, and no code in common with
raddle."""

import numpy as np


def gather_pages(cache, page_ids, kv_len, layout):
    """K or V of one request as float64 [kv_len, heads, dim] from pages [num_pages, ...]."""
    rows = []
    page_size = cache.shape[1] if layout == "NHD" else cache.shape[2]
    for j in range(kv_len):
        page = cache[page_ids[j // page_size]]
        rows.append(page[j % page_size] if layout == "NHD" else page[:, j % page_size])
    if not rows:
        heads, dim = (
            (cache.shape[2], cache.shape[3])
            if layout == "NHD"
            else (cache.shape[1], cache.shape[3])
        )
        return np.zeros((0, heads, dim))
    return np.stack(rows).astype(np.float64)


def attend(q, k, v, *, sm_scale=None, causal=False, window_left=-1, lse_base="2"):
    """One request: q [qo_len, qo_heads, dim], k [kv_len, kv_heads, dim], v [kv_len, kv_heads,
    dim_vo].

    Returns float64 (out, lse). Rows that see nothing: 0 and -inf.
    """
    qo_len, qo_heads, dim = q.shape
    kv_len, kv_heads, dim_vo = v.shape
    scale = 1.0 / np.sqrt(dim) if sm_scale is None else sm_scale
    out = np.zeros((qo_len, qo_heads, dim_vo))
    lse = np.full((qo_len, qo_heads), -np.inf)
    for i in range(qo_len):
        own = kv_len - qo_len + i
        last = own if causal else kv_len - 1
        first = own - window_left if window_left >= 0 else 0
        visible = np.arange(max(first, 0), min(last, kv_len - 1) + 1)
        if len(visible) == 0:
            continue
        for h in range(qo_heads):
            g = h // (qo_heads // kv_heads)
            logits = k[visible, g] @ q[i, h].astype(np.float64) * scale
            top = logits.max()
            weights = np.exp(logits - top)
            out[i, h] = weights @ v[visible, g] / weights.sum()
            lse[i, h] = top + np.log(weights.sum())
    return out, lse / np.log(2.0) if lse_base == "2" else lse


def merge(v, s, lse_base="2"):
    """v [states, ..., dim], s [states, ...] -> (v, s) over all states, float64."""
    s = s.astype(np.float64) * (np.log(2.0) if lse_base == "2" else 1.0)
    top = s.max(axis=0)
    safe = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(s - safe)
    total = weights.sum(axis=0)
    out = (weights[..., None] * v.astype(np.float64)).sum(axis=0)
    out = np.where(total[..., None] > 0, out / np.where(total > 0, total, 1.0)[..., None], 0.0)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, safe + np.log(total), -np.inf)
    return out, lse / (np.log(2.0) if lse_base == "2" else 1.0)
