"""`python -m raddle schedule FILE`: what orders of a file's requests would take, and the order.

FILE is a trace (input_length, output_length, hash_ids a line) or a file of OpenAI batch requests.
Exit status: 0, or 1 when something cannot be done.
"""

import json
import sys

from ..errors import ArgumentError, RaddleError, RaddleIOError
from .cost import LLAMA_3_8B, CostModel, is_saved
from .files import kind_of
from .partition import partition
from .plot import need_matplotlib, plot
from .requests import Requests
from .run import compare, order, policy_names
from .text import seconds_text, table_text

BLOCK_SIZES = {"trace": 512, "openai": 16}
SAMPLE_RATE = 0.01
KV_BYTES = 60e9
COLUMNS = (
    ("policy", "{0.policy}"),
    ("takes", "{3}"),
    ("tokens/s", "{0.tokens_per_s:.0f}"),
    ("x dfs", "{1:.3f}"),
    ("hits", "{0.hit_ratio:.1%}"),
    ("of bound", "{0.share_of_bound:.1%}"),
    ("peak KV", "{0.peak_kv_tokens}"),
    ("preempted", "{0.preemptions}"),
    ("planned in", "{2:.1f} ms"),
)


def add_arguments(parser):
    add = parser.add_argument
    add("file", metavar="FILE", help="a trace or OpenAI batch requests, one JSON object a line")
    add("--block-size", type=int, help="tokens of a block (default: trace 512, OpenAI 16)")
    add("--config", metavar="FILE", help="config.json of the model (default: Llama-3-8B's shape)")
    add(
        "--hardware",
        default="a100",
        metavar="NAME",
        help="a100 (default), h100, a file of `raddle calibrate`, or a JSON file of rates",
    )
    add("--policies", metavar="LIST", help=f"of {','.join(policy_names())} (default: all)")
    add(
        "--lengths", choices=("known", "sample"), default="known", help="of outputs, to the planner"
    )
    add("--sample-rate", type=float, help=f"with --lengths sample (default: {SAMPLE_RATE})")
    add("--seed", type=int, default=0, help="of the sample and of random (default: 0)")
    add("--replicas", type=int, help="also deal the requests out to so many, and say how evenly")
    add("--memory-bytes", type=float, default=KV_BYTES, help="of K and V (default: 60e9)")
    add("--step-tokens", type=int, default=2048, help="the most of a step (default: 2048)")
    add("--model", metavar="DIR", help="folder whose tokenizer reads an OpenAI file's prompts")
    add("--json", metavar="FILE", help="write the numbers")
    add("--order", metavar="FILE", help="write the fastest policy's order, a request a line")
    add("--plot", metavar="FILE", help="write a PNG of the runs over time (needs matplotlib)")


def main(args):
    try:
        _run(args)
    except RaddleError as error:
        print(f"raddle schedule: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args):
    names = _policies(args.policies)
    if args.sample_rate is not None and args.lengths != "sample":
        raise ArgumentError("--sample-rate: needs --lengths sample")
    if args.plot is not None:
        need_matplotlib()
    cost, model = _cost(args)
    pool_tokens = _pool_tokens(cost, args.memory_bytes)
    kind = kind_of(args.file)
    requests = _read(args, kind)
    options = {
        "pool_tokens": pool_tokens,
        "step_tokens": args.step_tokens,
        "lengths": args.lengths,
        "sample_rate": SAMPLE_RATE if args.sample_rate is None else args.sample_rate,
        "seed": args.seed,
    }
    # dfs is what the others are compared with, asked for or not.
    found = {
        r.policy: r for r in compare(requests, cost, dict.fromkeys(["dfs", *names]), **options)
    }
    results = [found[name] for name in names]
    print(_describe(args, model, kind, requests, options, found["dfs"].bound_seconds))
    print(_table(results, found["dfs"].seconds))
    shares = _deal(args, requests, cost, options)
    if args.json is not None:
        _write(
            args.json,
            json.dumps(_report(args, kind, requests, cost, options, results, found) | shares),
        )
    if args.order is not None:
        best = min(results, key=lambda result: result.seconds).policy
        _write(args.order, _order_lines(requests, order(requests, cost, best, **options)))
        print(f"order of {best}: {args.order}")
    if args.plot is not None:
        plot(results, pool_tokens, args.plot)


def _cost(args):
    """(cost model, what the model is called). A file of `calibrate` brings its own model."""
    if args.config is None and is_saved(args.hardware):
        return CostModel.load(args.hardware), "the model"
    config = args.config or LLAMA_3_8B
    return CostModel.from_config(config, args.hardware), args.config or "Llama-3-8B"


def _deal(args, requests, cost, options):
    """What --replicas adds to the report; printed too."""
    if args.replicas is None:
        return {}
    names = ("lengths", "sample_rate", "seed")
    dealt = partition(requests, cost, args.replicas, **{name: options[name] for name in names})
    print(
        f"{args.replicas} replicas: {dealt.speedup:.2f} times one at most, "
        f"{dealt.duplicated:.3%} more tokens"
    )
    return {
        "replicas": {
            "count": args.replicas,
            "speedup": dealt.speedup,
            "duplicated": dealt.duplicated,
            "requests": [len(part) for part in dealt.parts],
        }
    }


def _policies(text):
    known = policy_names()
    names = list(dict.fromkeys(known if text is None else text.split(",")))
    for name in names:
        if name not in known:
            raise ArgumentError(f"--policies: {name!r} is not one of {', '.join(known)}")
    return names


def _pool_tokens(cost, memory_bytes):
    tokens = memory_bytes / cost.kv_bytes_per_token
    if not 1 <= tokens < 2**60:
        raise ArgumentError(
            f"--memory-bytes: expected room for a token of K and V, {cost.kv_bytes_per_token:.0f} "
            f"bytes, or more, got {memory_bytes:g}"
        )
    return int(tokens)


def _read(args, kind):
    block_size = BLOCK_SIZES[kind] if args.block_size is None else args.block_size
    if kind == "trace":
        if args.model is not None:
            raise ArgumentError("--model: a trace has no text; leave it out")
        return Requests.from_trace(args.file, block_size)
    from ..engine.cli_model import model_folder
    from ..engine.config import read_json

    folder = model_folder(args)
    context = read_json(folder / "config.json").get("max_position_embeddings")
    return Requests.from_openai(args.file, folder, block_size=block_size, context=context)


def _describe(args, model, kind, requests, options, bound):
    outputs = "max_tokens, taken as output lengths" if kind == "openai" else "the trace's"
    shared = requests.shared_tokens / requests.prompt_tokens
    tree = f"the tree took {1e3 * requests.tree_seconds:.1f} ms"
    known = "known" if args.lengths == "known" else f"sampled, {options['sample_rate']:g}"
    return (
        f"{requests.num_requests} requests, {requests.prompt_tokens} input tokens ({shared:.1%} "
        f"shared), {int(requests.output_lengths.sum())} output tokens ({outputs}; to the planner: "
        f"{known})\n"
        f"simulated: {model} on {args.hardware}, "
        f"{options['pool_tokens']} tokens of K and V, {options['step_tokens']} tokens a step; "
        f"no order takes less than {seconds_text(bound)}; {tree}"
    )


def _table(results, dfs_seconds):
    rows = [[title for title, _ in COLUMNS]]
    for result in results:
        ratio, takes = dfs_seconds / result.seconds, seconds_text(result.seconds)
        rows.append(
            [form.format(result, ratio, 1e3 * result.planning_s, takes) for _, form in COLUMNS]
        )
    return table_text(rows)


def _report(args, kind, requests, cost, options, results, found):
    return {
        "file": args.file,
        "requests": requests.num_requests,
        "input_tokens": requests.prompt_tokens,
        "output_tokens": int(requests.output_lengths.sum()),
        "output_lengths": "max_tokens" if kind == "openai" else "trace",
        "block_size": requests.block_size,
        **options,
        "bound_s": found["dfs"].bound_seconds,
        "cost_model": cost.to_dict(),
        "policies": [
            {
                "policy": result.policy,
                "seconds": result.seconds,
                "tokens_per_s": result.tokens_per_s,
                "ratio_to_dfs": found["dfs"].seconds / result.seconds,
                "hit_ratio": result.hit_ratio,
                "share_of_bound": result.share_of_bound,
                "peak_kv_tokens": result.peak_kv_tokens,
                "preemptions": result.preemptions,
                "planning_s": result.planning_s,
            }
            for result in results
        ],
    }


def _order_lines(requests, indices):
    """Indices, or custom_ids: a line with several prompts stands where its first one does."""
    if requests.custom_ids is None:
        return "\n".join(map(str, indices.tolist()))
    return "\n".join(map(_as_line, dict.fromkeys(requests.custom_ids[i] for i in indices.tolist())))


def _as_line(custom_id):
    """As it is; one that is no line of text, or that begins with a quote, as JSON."""
    is_line = custom_id.splitlines() == [custom_id] and custom_id[0] != '"'
    is_text = not any("\ud800" <= char <= "\udfff" for char in custom_id)  # halves of pairs
    return custom_id if is_line and is_text else json.dumps(custom_id)


def _write(path, text):
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise RaddleIOError(f"{path}: cannot be written: {error.strerror}") from None
