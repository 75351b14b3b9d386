"""A toy engine that raddle.blend.Scheduler drives: no model, a clock that a cost model moves.

    python examples/blend_scheduler.py [--requests 20000]

Requests of three kinds, one file behind another: questions about long documents that several of
them share, chats behind one system prompt, and problems whose short prompts have long answers. How
long an answer gets is drawn at random: the engine finds out when it ends, the scheduler guesses
from a few that ran before. Depth first through the tree of prefixes ("dfs") is compared with
"paced", which keeps the sharing and runs requests that compute much beside requests that read much.
Needs: raddle, numpy.
"""

import argparse
import sys

import numpy as np
from raddle.blend import CostModel, Requests, Scheduler
from raddle.blend.cost import LLAMA_3_8B

BLOCK = 64
MAX_TOKENS = 4096
# kind: share of the requests, blocks of the prompt, requests that share all but the last of these
# on average, tokens of an answer on average
KINDS = [(0.50, 48, 4, 60), (0.25, 12, 1e9, 250), (0.25, 4, 1, 1500)]


def make_requests(count, rng):
    """The requests, and the answers' lengths, which nobody but the engine learns."""
    kind = np.sort(rng.choice(len(KINDS), count, p=[share for share, *_ in KINDS]))
    _, blocks, sharing, answer = np.array(KINDS)[kind].T
    blocks = blocks.astype(np.int64)
    group = rng.integers(0, 1 + count // sharing)
    ids = []
    for i in range(count):  # equal ids: the same block; the last one is a request's own
        first = int(10**9 * kind[i] + 1000 * group[i])
        ids += [*range(first, first + blocks[i] - 1), 10**12 + i]
    outputs = 1 + rng.exponential(answer).astype(np.int32)
    requests = Requests(
        block_size=BLOCK,
        input_lengths=blocks * BLOCK + rng.integers(1, BLOCK, count),
        max_tokens=np.full(count, MAX_TOKENS),
        sources=kind,
        hash_ids=np.array(ids),
        indptr=np.concatenate([[0], np.cumsum(blocks)]),
    )
    return requests, np.minimum(outputs, MAX_TOKENS)


def run(requests, outputs, cost, policy, pool_tokens):
    """Run them all; returns the scheduler, seconds of the clock and tokens given."""
    seen = np.full(len(outputs), -1, np.int32)
    sample = requests.sample(0.01, quota=20)
    seen[sample] = outputs[sample]  # as if these had run before
    scheduler = Scheduler(
        requests, cost, policy=policy, pool_tokens=pool_tokens, lengths="guess", seen=seen
    )
    seconds = 0.0
    given = np.zeros(len(outputs), np.int32)
    decodes = np.zeros(len(outputs), bool)
    while not scheduler.done:
        step = scheduler.step()
        decodes[step.preempted] = False  # an engine frees their pages
        # Here an engine takes pages for step.admitted, computes the chunks and a token of each that
        # decodes, and samples.
        seconds += step.seconds
        decodes[step.chunk_request[step.chunk_is_last]] = True
        given += decodes
        ended = np.flatnonzero(decodes & (given == outputs)).astype(np.int32)
        scheduler.retire(ended)
        decodes[ended] = False
    return scheduler, seconds, given


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    count = parser.parse_args(arguments).requests
    cost = CostModel.from_config(LLAMA_3_8B, "a100")
    requests, outputs = make_requests(count, np.random.default_rng(0))
    prompts = requests.prompt_tokens
    print(
        f"{count} requests, {prompts} tokens in, {outputs.sum()} out, Llama-3-8B, A100 (simulated)"
    )
    is_right, times = True, []
    for policy in ("dfs", "paced"):
        scheduler, seconds, given = run(requests, outputs, cost, policy, pool_tokens=400_000)
        counts = scheduler.counts()
        hits, tokens = counts["hit_tokens"], prompts + outputs.sum()
        computed = hits + counts["computed_tokens"] - counts["recomputed_tokens"]
        is_right &= (given == outputs).all() and computed == tokens - count
        times.append(seconds)
        print(
            f"{policy:6} {counts['steps']} steps, {seconds:.0f} s, "
            f"{tokens / seconds:.0f} tokens/s; {hits / prompts:.1%} of the prompts found, "
            f"{counts['preemptions']} stepped back"
        )
    print(f"paced takes {times[1] / times[0]:.3f} of the time of dfs")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
