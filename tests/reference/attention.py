"""Attention in float64 NumPy, one query row at a time: slow, obvious, and no code in common with
raddle."""

from dataclasses import dataclass

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


@dataclass
class Row:
    """Where a query row stands, as the hooks of a variant are told."""

    token: int
    request: int
    qo_index: int
    qo_len: int
    kv_len: int
    qo_head: int
    kv_head: int

    @property
    def position(self):
        return self.kv_len - self.qo_len + self.qo_index


@dataclass
class Variant:
    """What a logit, a row of q or K, a sum or a result goes through, in float64.

    soft_cap, alibi, rope (theta, scale), sinks [qo_heads], sigmoid, k_scale and v_scale (numbers or
    [kv_heads]) are the built-ins. Hooks: query(row, x), key(request, kv_index, kv_head, x),
    logit(row, keys, logits), mask(row, keys) -> bool, state(row, max, sum) -> (max, sum),
    output(row, x). softmax=False: logits are weights.
    """

    soft_cap: float = 0.0
    alibi: bool = False
    rope: tuple | None = None
    sinks: np.ndarray | None = None
    sigmoid: bool = False
    softmax: bool = True
    k_scale: object = 1.0
    v_scale: object = 1.0
    query: object = None
    key: object = None
    logit: object = None
    mask: object = None
    state: object = None
    output: object = None


def alibi_slopes(heads):
    """Of arXiv 2108.12409: powers of 2^(-8/n), n the largest power of two up to heads, then every
    second of those of 2n."""
    whole = 2 ** int(np.floor(np.log2(heads)))
    slopes = [2.0 ** (-8.0 / whole * (i + 1)) for i in range(whole)]
    extra = [2.0 ** (-4.0 / whole * (i + 1)) for i in range(0, 2 * (heads - whole), 2)]
    return np.array(slopes + extra)


def rotate(x, positions, theta, scale):
    """x [..., dim] by the angles of positions [...], halves as pairs."""
    half = x.shape[-1] // 2
    angles = np.expand_dims(positions, -1) * theta ** (-np.arange(half) / half) / scale
    low, high = x[..., :half], x[..., half:]
    sine, cosine = np.sin(angles), np.cos(angles)
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)


def _keys(k, request, variant):
    if variant.rope:
        k = rotate(k, np.arange(len(k))[:, None], *variant.rope)
    if variant.key:
        k = np.array(
            [
                [variant.key(request, j, g, x) for g, x in enumerate(heads)]
                for j, heads in enumerate(k)
            ]
        ).reshape(k.shape)
    return k


def _of_head(scale, kv_head):
    return scale if np.ndim(scale) == 0 else scale[kv_head]


def _logits(row, q, k, keys, scale, variant, num_qo_heads):
    if variant.rope:
        q = rotate(q, row.position, *variant.rope)
    if variant.query:
        q = variant.query(row, q)
    logits = k @ q * scale * _of_head(variant.k_scale, row.kv_head)
    if variant.soft_cap:
        logits = variant.soft_cap * np.tanh(logits / variant.soft_cap)
    if variant.alibi:
        logits = logits + alibi_slopes(num_qo_heads)[row.qo_head] * (keys - row.position)
    return variant.logit(row, keys, logits) if variant.logit else logits


def _row(row, q, k, v, keys, scale, variant, num_qo_heads):
    """(out, natural lse) of one row and head over its keys."""
    if variant.mask:
        keys = keys[np.asarray(variant.mask(row, keys), bool)]
    logits = _logits(row, q, k[keys], keys, scale, variant, num_qo_heads)
    values = v[keys]
    if variant.sigmoid or not variant.softmax:
        weights = np.exp(-np.logaddexp(0, -logits)) if variant.sigmoid else logits
        return weights @ values, np.nan
    top = logits.max() if len(logits) else -np.inf
    weights = np.exp(logits - top) if len(logits) else logits
    total = weights.sum()
    accumulated = weights @ values
    if variant.sinks is not None:
        new_top = max(top, variant.sinks[row.qo_head])
        total = total * np.exp(top - new_top) + np.exp(variant.sinks[row.qo_head] - new_top)
        accumulated, top = accumulated * np.exp(top - new_top), new_top
    if variant.state:
        new_top, total = variant.state(row, top, total)
        if new_top != top:
            accumulated, top = accumulated * np.exp(top - new_top), new_top
    if total == 0:
        return np.zeros(v.shape[-1]), -np.inf
    return accumulated / total, top + np.log(total)


def attend(
    q,
    k,
    v,
    *,
    sm_scale=None,
    causal=False,
    window_left=-1,
    lse_base="2",
    variant=None,
    request=0,
    first_token=0,
):
    """One request: q [qo_len, qo_heads, dim], k [kv_len, kv_heads, dim], v [kv_len, kv_heads,
    dim_vo].

    Returns float64 (out, lse). Rows that see nothing: 0 and -inf. first_token: row of q[0] in the
    batch, for hooks.
    """
    variant = variant or Variant()
    qo_len, qo_heads, dim = q.shape
    kv_len, kv_heads, dim_vo = v.shape
    scale = 1.0 / np.sqrt(dim) if sm_scale is None else sm_scale
    q, v = q.astype(np.float64), v.astype(np.float64)
    k = _keys(k.astype(np.float64), request, variant)
    out = np.zeros((qo_len, qo_heads, dim_vo))
    lse = np.full((qo_len, qo_heads), -np.inf)
    for i in range(qo_len):
        own = kv_len - qo_len + i
        last = own if causal else kv_len - 1
        first = own - window_left if window_left >= 0 else 0
        keys = np.arange(max(first, 0), min(last, kv_len - 1) + 1)
        for h in range(qo_heads):
            g = h // (qo_heads // kv_heads)
            row = Row(first_token + i, request, i, qo_len, kv_len, h, g)
            x, lse[i, h] = _row(row, q[i, h], k[:, g], v[:, g], keys, scale, variant, qo_heads)
            x = x * _of_head(variant.v_scale, g)
            out[i, h] = variant.output(row, x) if variant.output else x
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
