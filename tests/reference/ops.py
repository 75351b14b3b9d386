"""The ops family in float64 NumPy. Shares no code with raddle."""

import math

import numpy as np


def rmsnorm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layernorm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def fp8_values(kind):
    """The value of each of the 256 codes of float8_e4m3fn or float8_e5m2, by its definition."""
    mantissa, bias = (3, 7) if kind == "float8_e4m3fn" else (2, 15)
    code = np.arange(256)
    exponent, fraction = (code & 127) >> mantissa, code & ((1 << mantissa) - 1)
    fraction = fraction / (1 << mantissa)
    value = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    if kind == "float8_e4m3fn":
        value[code & 127 == 127] = np.nan
    else:
        value[code & 127 > 124] = np.nan
        value[code & 127 == 124] = np.inf
    return np.where(code & 128, -value, value)


def rope_angles(positions, inv_freq):
    """Complex rotation of every (position, pair)."""
    return np.exp(1j * np.asarray(positions, np.float64)[:, None] * np.asarray(inv_freq))


def rope(x, positions, inv_freq, factor=1.0, interleave=False):
    """x [n, heads, head_dim]; pairs as complex numbers."""
    half = len(inv_freq)
    turn = factor * rope_angles(positions, inv_freq)[:, None, :]
    out = x.copy()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleave
        else (slice(0, half), slice(half, 2 * half))
    )
    z = (x[..., first] + 1j * x[..., second]) * turn
    out[..., first], out[..., second] = z.real, z.imag
    return out


_erf = np.vectorize(math.erf, otypes=[float])


def activation(kind, x):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * 0.5 * (1 + _erf(x / math.sqrt(2)))
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def act_and_mul(kind, x):
    d = x.shape[-1] // 2
    with np.errstate(over="ignore"):
        return activation(kind, x[..., :d]) * x[..., d:]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(logits, temperature=1.0):
    return np.exp(log_softmax(logits / temperature))


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Renormalised probabilities of one row after min_p, top_k and top_p; ties stay together."""
    p = softmax(logits[None], temperature)[0]
    keep = p >= min_p * p.max()
    if top_k > 0:
        order = np.sort(logits[keep])[::-1]
        keep &= logits >= order[min(top_k, len(order)) - 1]
    if top_p < 1:
        candidates = np.unique(logits[keep])[::-1]
        total = p[keep].sum()
        for least in candidates:
            if p[keep & (logits >= least)].sum() >= top_p * total:
                break
        keep &= logits >= least
    p = np.where(keep, p, 0)
    return p / p.sum()


def kept_probs(p, top_k=0, top_p=1.0, min_p=0.0, joint=False):
    """Probabilities of one row after min_p, top_k and top_p, renormalised; ties stay together."""
    keep = (p > 0) & (p >= np.float32(np.float32(min_p) * np.float32(p.max())))
    base = p > 0
    if top_k > 0:
        order = np.sort(p[base if joint else keep])[::-1]
        keep &= p >= order[min(top_k, len(order)) - 1]
    if top_p < 1:
        among = base if joint else keep
        total = p[among].sum()
        above = np.array([p[among & (p > x)].sum() for x in p])
        keep &= above < top_p * total
    p = np.where(keep, p, 0)
    return p / p.sum()


def philox_uniform(seed, offset, stream=0, draw=0):
    """The first 64 bits of Philox4x32-10 as a number in [0, 1)."""
    mask = (1 << 32) - 1
    counter = [offset & mask, offset >> 32 & mask, stream, draw]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            product_1 >> 32 ^ counter[1] ^ key[0],
            product_1 & mask,
            product_0 >> 32 ^ counter[3] ^ key[1],
            product_0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return (counter[0] | counter[1] << 32) / 2.0**64
