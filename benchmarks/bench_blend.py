"""Offline runs of one set of requests in the orders of raddle.blend, by the engine and its clock.

Requests are a slice of the development workload DH (Mooncake's conversation and synthetic traces
and Azure's conversations with longer answers), cut by whole sessions, lengths scaled so that a run
takes a minute or less; prompts are made of their block hashes, so that what two requests share in
the trace they share here. Every request's answer has the trace's length (ignore_eos). K and V have
room for a fraction of the prompts. cpu: examples/tiny-llama, float32. cuda: Llama-3-8B's shape,
dummy bf16 weights.

A row's time is that of the whole run for each token of prompts and answers; the peer is the order
`dfs`. Beside it stand the share of prompts' tokens that were found in memory, and the time that
raddle.blend.simulate() predicts with a cost model measured on the device in the same process (or
--cost FILE), nothing overlapped. Greedy answers of all orders are compared.

--traces FOLDER holds mooncake_conversation.jsonl, mooncake_synthetic.jsonl (FAST 2025) and
azure_conversation.csv (2023).
"""

import csv
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import common
from bench_engine import LLAMA_3_8B, TINY_LLAMA

POLICIES = ("dfs", "fcfs", "random", "blend", "paced")
TRACE_BLOCK = 512  # tokens of a hash in Mooncake's traces


@dataclass(frozen=True)
class Setup:
    """What is run, and on how much memory."""

    block: int  # tokens that a block of TRACE_BLOCK becomes; prompts are scaled alike
    counts: tuple  # requests of conversation, synthetic, long answers
    output_scale: float
    long_scale: float  # of the long answers' outputs
    longest: int  # output
    context: int
    pool_tokens: int
    max_batch: int
    step_tokens: int


CPU = Setup(16, (1200, 600, 200), 1 / 8, 1.0, 600, 2048, 24_000, 128, 1024)
CUDA = Setup(64, (800, 400, 100), 1 / 2, 4.0, 3000, 16384, 100_000, 256, 2048)


@dataclass(frozen=True)
class Job:
    """One request: tokens of the prompt that no block holds come last."""

    hash_ids: tuple
    tail: int
    output: int
    source: int


def read_jobs(folder, setup):
    """A slice of each trace, whole sessions, shuffled."""
    import random

    conversation = _mooncake(folder / "mooncake_conversation.jsonl", setup, 0, setup.counts[0])
    synthetic = _mooncake(folder / "mooncake_synthetic.jsonl", setup, 1, setup.counts[1])
    jobs = conversation + synthetic + _azure(folder / "azure_conversation.csv", setup)
    random.Random(0).shuffle(jobs)
    return jobs


def _mooncake(path, setup, source, count):
    """Requests of sessions (same second block), in the order in which the sessions begin."""
    sessions = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = max(2, row["input_length"] * setup.block // TRACE_BLOCK)
        output = min(setup.longest, max(1, round(row["output_length"] * setup.output_scale)))
        if prompt + output > setup.context:
            continue
        ids = tuple(row["hash_ids"][: prompt // setup.block])
        job = Job(
            tuple(2 * i + source for i in ids), prompt - len(ids) * setup.block, output, source
        )
        sessions.setdefault(ids[:2], []).append(job)
    jobs = [job for session in sessions.values() for job in session]
    return jobs[:count]


def _azure(path, setup):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))[: setup.counts[2]]
    return [
        Job(
            (),
            max(2, int(row["ContextTokens"]) * setup.block // TRACE_BLOCK),
            min(setup.longest, max(1, round(int(row["GeneratedTokens"]) * setup.long_scale))),
            2,
        )
        for row in rows
    ]


def to_requests(jobs, setup):
    import numpy as np
    from raddle.blend import Requests

    ids = [i for job in jobs for i in job.hash_ids]
    return Requests(
        block_size=setup.block,
        input_lengths=np.array([len(j.hash_ids) * setup.block + j.tail for j in jobs], np.int32),
        output_lengths=np.array([job.output for job in jobs], np.int32),
        sources=np.array([job.source for job in jobs], np.int32),
        hash_ids=np.array(ids, np.int64),
        indptr=np.cumsum([0] + [len(job.hash_ids) for job in jobs]),
    )


def tokens_of(job, index, setup, vocab):
    """A prompt's tokens: the same for the same block, a request's own behind them."""
    import numpy as np

    parts = [np.random.default_rng([1, i]).integers(3, vocab, setup.block) for i in job.hash_ids]
    parts.append(np.random.default_rng([2, index]).integers(3, vocab, job.tail))
    return np.concatenate(parts).tolist()


def run(engine, jobs, order, setup):
    """(seconds, outputs by request) of a run in this order, few requests ahead of the engine."""
    from raddle.engine import SamplingParams

    waiting, answers = iter(order), {}
    begin = time.perf_counter()
    while len(answers) < len(jobs):
        while engine.num_waiting < 8:
            index = next(waiting, None)
            if index is None:
                break
            job = jobs[index]
            params = SamplingParams(
                max_tokens=job.output, temperature=0, ignore_eos=True, stream=False
            )
            prompt = tokens_of(job, index, setup, engine.config.vocab_size)
            engine.add_request(prompt, params, request_id=index)
        for output in engine.step():
            answers[output.request_id] = output.token_ids
    return time.perf_counter() - begin, answers


def make_engine(device, setup):
    """A new one: its prefix cache is empty."""
    from raddle.engine import Engine

    options = dict(
        max_batch=setup.max_batch,
        max_model_len=setup.context,
        max_tokens_per_step=setup.step_tokens,
        page_size=16,
    )
    if device == "cpu":
        # K and V of 6 layers, 2 heads of 64, float32.
        kv = setup.pool_tokens * 6 * 2 * 2 * 64 * 4
        return Engine.from_folder(TINY_LLAMA, dtype="float32", kv_memory_bytes=kv, **options)
    kv = setup.pool_tokens * 32 * 2 * 8 * 128 * 2
    config = {**LLAMA_3_8B, "max_position_embeddings": setup.context}
    return Engine.with_dummy_weights(config, device="cuda", kv_memory_bytes=kv, **options)


def warm_up(engine, setup):
    """Decodes of every batch size: on a GPU, each is captured in a graph at its first use."""
    from raddle.engine import SamplingParams

    params = [
        SamplingParams(max_tokens=2 + i, temperature=0, ignore_eos=True)
        for i in range(setup.max_batch)
    ]
    engine.generate([[5, 6, 7]] * setup.max_batch, params)


def cost_model(args):
    """Measured on this device, all of a step one after the other, as the engine does it."""
    from raddle.blend import CostModel

    if args.cost is not None:
        cost = CostModel.load(args.cost)
    elif args.device == "cpu":
        config = json.loads((TINY_LLAMA / "config.json").read_text())
        cost = CostModel.measure(config, "cpu", "float32", quick=True)
    else:
        cost = CostModel.measure(LLAMA_3_8B, "cuda", quick=True)
    return replace(cost, alpha=1.0)


def bench(report, args, setup):
    from raddle.blend import order, simulate

    jobs = read_jobs(args.traces, setup)
    requests, cost = to_requests(jobs, setup), cost_model(args)
    options = dict(pool_tokens=setup.pool_tokens, step_tokens=setup.step_tokens)
    tokens = requests.prompt_tokens + sum(job.output for job in jobs)
    first = None
    engine = make_engine(args.device, setup)
    warm_up(engine, setup)
    seconds_of = {}
    for policy in args.policies:
        begin = time.perf_counter()
        orders = order(requests, cost, policy, **options).tolist()
        planning = time.perf_counter() - begin
        engine.reset_prefix_cache()
        before = engine.num_hit_tokens, engine.num_preemptions, engine.num_steps
        seconds, answers = run(engine, jobs, orders, setup)
        first = first or answers
        predicted = simulate(requests, cost, policy, **options)
        seconds_of[policy] = seconds
        peer = seconds_of.get("dfs")
        report.add(
            f"{len(jobs)} requests, {policy}",
            seconds * 1e6 / tokens,
            "dfs" if peer else None,
            peer * 1e6 / tokens if peer else None,
            seconds=seconds,
            tokens=tokens,
            hit_ratio=(engine.num_hit_tokens - before[0]) / requests.prompt_tokens,
            most_hit_ratio=requests.shared_tokens / requests.prompt_tokens,
            preemptions=engine.num_preemptions - before[1],
            steps=engine.num_steps - before[2],
            predicted_seconds=predicted.seconds,
            predicted_hit_ratio=predicted.hit_ratio,
            share_of_bound=predicted.bound_seconds / seconds,
            planning_seconds=planning,
            same_answers=sum(answers[i] == first[i] for i in first) / len(first),
        )
        row = report.rows[-1]
        print(
            f"  {seconds:.1f} s, predicted {predicted.seconds:.1f}; found {row['hit_ratio']:.1%} "
            f"of prompts (at most {row['most_hit_ratio']:.1%}, predicted "
            f"{predicted.hit_ratio:.1%}); "
            f"{row['steps']} steps, {row['preemptions']} preemptions; "
            f"{row['same_answers']:.2%} of answers as the first order's",
            flush=True,
        )


def extend(parser):
    shared = Path(__file__).resolve().parents[2] / "shared" / "traces"
    parser.add_argument("--traces", metavar="FOLDER", type=Path, default=shared)
    parser.add_argument("--policies", type=lambda text: text.split(","), default=POLICIES)
    parser.add_argument("--cost", metavar="FILE", help="a saved CostModel")


def main():
    args = common.parse_args(__doc__, extend=extend)
    setup = CPU if args.device == "cpu" else CUDA
    if args.quick:
        setup = replace(setup, counts=tuple(count // 4 for count in setup.counts))
    report = common.Report("blend", args, {})
    bench(report, args, setup)
    report.write()


if __name__ == "__main__":
    main()
