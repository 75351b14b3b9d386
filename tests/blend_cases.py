"""Requests for the tests of raddle.blend: random ones and the workloads of the traces; a trie in
plain Python to compare with."""

import csv
import json
from pathlib import Path

import numpy
from raddle.blend import CostModel, Requests
from raddle.blend.cost import LLAMA_3_8B

# Where this project is built, beside the checkout; a clone alone does not have them.
TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
BLOCK = 64
LONGEST = 16384
COST = CostModel.from_config(LLAMA_3_8B, "a100")
POOL = 20_000


def load_mooncake(name, first_id):
    """(input, output, ids): prompts / 8, full blocks of 64 tokens; ids from first_id on."""
    rows = []
    for line in (TRACES / f"mooncake_{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        length = max(row["input_length"] // 8, 1)
        ids = [first_id + i for i in row["hash_ids"][: length // BLOCK]]
        rows.append((length, max(row["output_length"], 1), ids))
    return rows


def load_azure(name, first_id, stretch=1):
    """(input, output, ids): a system block in front, the same for all; outputs x stretch."""
    with open(TRACES / f"azure_{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (
            BLOCK + int(row["ContextTokens"]),
            max(1, min(int(row["GeneratedTokens"]) * stretch, LONGEST)),
            [first_id],
        )
        for row in rows
    ]


def repeat(rows, count, kept=None):
    """count rows; ids of each further round differ, but for the one that is kept."""
    found = []
    for i in range(count):
        length, output, ids = rows[i % len(rows)]
        shift = i // len(rows) * 1_000_000
        found.append((length, output, [x if x == kept else x + shift for x in ids]))
    return found


def workload(name, share=1.0):
    """DH or SL (README.md of the traces), or a share of its requests, as arguments of Requests."""
    far = 10**12  # ids of one source are not those of another
    code, talk = load_azure("code", far), load_azure("conversation", 2 * far)
    long = load_azure("conversation", 3 * far, stretch=16)
    if name == "DH":
        parts = [
            (load_mooncake("conversation", 0), 40000, 0),
            (load_mooncake("synthetic", 4 * far), 50000, None),
            (long, 2400, 3 * far),
        ]
    else:
        parts = [(code, 60000, far), (talk, 30000, 2 * far), (long, 18500, 3 * far)]
    rows, sources = [], []
    for source, (own, count, kept) in enumerate(parts):
        count = int(count * share)
        rows += repeat(own, count, kept)
        sources += [source] * count
    return arrays_of(rows, sources)


def arrays_of(rows, sources=None):
    """Arguments of Requests for (input, output, ids)."""
    lengths = [len(ids) for _, _, ids in rows]
    return dict(
        block_size=BLOCK,
        input_lengths=numpy.array([row[0] for row in rows], numpy.int32),
        output_lengths=numpy.array([row[1] for row in rows], numpy.int32),
        sources=None if sources is None else numpy.array(sources, numpy.int32),
        hash_ids=numpy.array([i for _, _, ids in rows for i in ids], numpy.uint64),
        indptr=numpy.concatenate([[0], numpy.cumsum(lengths, dtype=numpy.int64)]),
    )


def random_rows(seed, count, sharing=True):
    """(input, output, ids) of many shapes: whole prompts that are shared, prompts without a full
    block, ids that come back at another depth, outputs of one token."""
    rng = numpy.random.default_rng(seed)
    rows = []
    for _ in range(count):
        depth = int(rng.integers(0, 9))
        first = int(rng.integers(0, 4)) if sharing else len(rows) * 100
        ids = [first if i < 3 else int(rng.integers(0, 2)) for i in range(depth)]
        ids = ids if sharing else [first + i for i in range(depth)]
        tail = int(rng.choice([0, 1, BLOCK - 1, 3 * BLOCK])) if depth else int(rng.integers(1, 70))
        output = int(rng.choice([1, 2, 7, 64, 300]))
        rows.append((depth * BLOCK + tail, output, ids))
    return rows


def make(rows, **changes):
    return Requests(**{**arrays_of(rows), **changes})


def run(requests, policy="dfs", pool_tokens=POOL, step_tokens=512, seed=0, seen=None):
    """All numbers of the C core."""
    return requests._core.simulate(policy, COST.to_dict(), pool_tokens, step_tokens, seed, seen)


def numbers(found):
    return {k: v for k, v in found.items() if k not in ("planning_seconds", "timeline")}


def prefixes(rows):
    return {tuple(ids[: i + 1]) for _, _, ids in rows for i in range(len(ids))}


def hits_in_order(rows, indices):
    """Tokens found when requests come in this order and nothing is forgotten."""
    seen, hits = set(), 0
    for i in indices:
        length, _, ids = rows[i]
        known = 0
        while known < len(ids) and tuple(ids[: known + 1]) in seen:
            known += 1
        hits += min(known * BLOCK, length - 1)  # the last token is always computed
        seen |= {tuple(ids[: j + 1]) for j in range(len(ids))}
    return hits
