"""Five attention variants, each a few lines of C beside this file, checked against NumPy.

    python examples/variants/variants.py [--device cuda]

Needs: raddle, numpy; on the CPU a C compiler, on a GPU NVRTC. The same text serves both.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import raddle
from raddle.attention import BatchPrefill

HERE = Path(__file__).resolve().parent
QO_HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 16
QO_LEN = 4  # query tokens of each request
KV_LENS = [40, 17, 90]
MOST = max(KV_LENS)


def tanh_cap(rng):
    def logit(row, logits):
        return 3.0 * np.tanh(logits / 3.0)

    return dict(scalars=["cap"]), dict(cap=3.0), dict(logit=logit)


def sigmoid_bias(rng):
    bias = -np.log(64.0)

    def weights(row, logits):
        return 1 / (1 + np.exp(-(logits + bias)))

    return dict(scalars=["bias"], softmax=False), dict(bias=bias), dict(weights=weights)


def relative_bias(rng):
    bias = rng.standard_normal((QO_HEADS, 32)).astype(np.float32)

    def logit(row, logits):
        distance = row["position"] - np.arange(len(logits))
        return logits + bias[row["head"], np.clip(distance, 0, 31)]

    return dict(tensors=["bias"]), dict(bias=bias), dict(logit=logit)


def logit_dump(rng):
    dump = np.zeros((QO_LEN * len(KV_LENS), QO_HEADS, MOST), np.float32)
    want = np.zeros_like(dump)

    def logit(row, logits):
        want[row["token"], row["head"], : len(logits)] = logits
        return logits

    hooks = dict(logit=logit, written=("dump", want))
    return dict(tensors=[("dump", "float32", "w")]), dict(dump=dump), hooks


def token_tree(rng):
    parents = [-1, 0, 0, 2]  # two drafts follow the first one, a fourth follows the third
    tree = np.zeros((QO_LEN, QO_LEN), bool)
    for node in range(QO_LEN):
        above = node
        while above >= 0:
            tree[node, above] = True
            above = parents[above]
    ancestors = np.tile(tree, (len(KV_LENS), 1))

    def mask(row, num_keys):
        return np.concatenate([np.ones(num_keys - QO_LEN, bool), ancestors[row["token"]]])

    return dict(tensors=[("ancestors", "bool")]), dict(ancestors=ancestors), dict(mask=mask)


VARIANTS = [tanh_cap, sigmoid_bias, relative_bias, logit_dump, token_tree]


def in_numpy(q, k, v, hooks):
    """q [tokens, QO_HEADS, DIM], k and v lists of [kv_len, KV_HEADS, DIM] by request."""
    out = np.zeros(q.shape)
    for token in range(len(q)):
        request, i = divmod(token, QO_LEN)
        kv_len = KV_LENS[request]
        for head in range(QO_HEADS):
            row = dict(token=token, head=head, position=kv_len - QO_LEN + i)
            keys, values = (x[request][:, head // (QO_HEADS // KV_HEADS)] for x in (k, v))
            logits = keys @ q[token, head] / np.sqrt(DIM)
            if "logit" in hooks:
                logits = hooks["logit"](row, logits)
            if "mask" in hooks:
                logits = np.where(hooks["mask"](row, kv_len), logits, -np.inf)
            if "weights" in hooks:
                weights = hooks["weights"](row, logits)
            else:
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
            out[token, head] = weights @ values
    return out


def check(make, device):
    """Largest difference between raddle and NumPy, relative to the largest result."""
    rng = np.random.default_rng(0)
    declared, args, hooks = make(rng)
    text = HERE / f"{make.__name__}.c"
    variant = raddle.Variant(make.__name__, text.read_text(), filename=text.name, **declared)
    pages = [-(-n // PAGE) for n in KV_LENS]
    plan = BatchPrefill(
        num_qo_heads=QO_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=PAGE,
        dtype="float16",
        max_batch=len(KV_LENS),
        max_pages=sum(pages),
        max_qo_tokens=QO_LEN * len(KV_LENS),
        max_qo_len=QO_LEN,
        variant=variant,
        device=device,
    )
    indptr = np.concatenate([[0], np.cumsum(pages)])
    plan.plan(
        QO_LEN * np.arange(len(KV_LENS) + 1),
        indptr,
        np.arange(sum(pages)),
        np.array(KV_LENS) - PAGE * (np.array(pages) - 1),
    )
    q = rng.standard_normal((QO_LEN * len(KV_LENS), QO_HEADS, DIM)).astype(np.float16)
    cache = rng.standard_normal((sum(pages), 2, PAGE, KV_HEADS, DIM)).astype(np.float16)
    there = {
        name: raddle.tensor(x, device=device) if isinstance(x, np.ndarray) else x
        for name, x in args.items()
    }
    q_there, cache_there = (raddle.tensor(x, device=device) for x in (q, cache))
    out = plan.run(q_there, cache_there, variant_args=there).to("cpu").numpy()

    k, v = (
        [
            cache[indptr[r] : indptr[r + 1], side].reshape(-1, KV_HEADS, DIM)[:n].astype(float)
            for r, n in enumerate(KV_LENS)
        ]
        for side in range(2)
    )
    want = in_numpy(q.astype(float), k, v, hooks)
    difference = np.abs(out - want).max() / np.abs(want).max()
    if "written" in hooks:
        name, wanted = hooks["written"]
        written = there[name].to("cpu").numpy()
        difference = max(difference, np.abs(written - wanted).max() / np.abs(wanted).max())
    return difference


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args(argv).device
    worst = 0.0
    for make in VARIANTS:
        difference = check(make, device)
        worst = max(worst, difference)
        print(f"{make.__name__:<14} differs from NumPy by {difference:.1e} of the largest result")
    return 0 if worst < 2e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
