"""`python -m raddle batch requests.jsonl -o results.jsonl`: a file of requests in OpenAI's format.

Exit status: 0 when every line has its result (error rows are results), 1 when the job could not
begin or go on, 3 when the deadline came first, 130 after Ctrl-C. The same command goes on where a
job was stopped or killed.
"""

import sys

from ..blend import policy_names
from ..errors import RaddleError
from .batch import BatchJob
from .cli_model import add_model_arguments, load_engine, model_folder, say
from .plan import POLICY, SAMPLE_RATE, cost_of
from .results import DiskFullError
from .tokenizer import need


def add_arguments(parser):
    parser.add_argument("input", help="requests, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, help="results, one JSON object a line")
    add_model_arguments(parser)
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        action="append",
        default=[],
        help="a name that requests may call the model by, beside its folder's; may be repeated",
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of requests without one (default: 0)")
    add(
        "--schedule",
        choices=policy_names(),
        default=POLICY,
        help=f"the order in which lines are answered (default: {POLICY})",
    )
    add(
        "--sample-rate",
        metavar="SHARE",
        type=float,
        default=SAMPLE_RATE,
        help="of requests that run first, to learn how long answers get; 0: none (default: "
        f"{SAMPLE_RATE})",
    )
    add(
        "--hardware",
        metavar="FILE",
        help="a cost model or rates of the machine, in JSON, or a100 or h100, for plan and ETA "
        "(default: rough rates; what steps take corrects them)",
    )
    add("--deadline", metavar="SECONDS", type=float, help="stop then; the same command goes on")
    add(
        "--errors",
        choices=("row", "stop"),
        default="row",
        help="lines that are wrong: row, an error row each (default); stop, name them all and "
        "run nothing",
    )


def main(args):
    try:
        folder = model_folder(args)
        bar = _Bar()
        engine = load_engine(args, folder, args.seed)
        names = [folder.resolve().name, *args.served_model_name, str(args.model or folder)]
        names = list(dict.fromkeys(names))
        job = BatchJob(
            engine,
            args.input,
            args.output,
            names,
            seed=args.seed,
            progress=bar.update,
            schedule=args.schedule,
            sample_rate=args.sample_rate,
            deadline=args.deadline,
            errors=args.errors,
            cost=cost_of(engine, args.hardware),
        )
    except RaddleError as error:
        say(f"raddle batch: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return _run(job, engine, bar)


def _run(job, engine, bar):
    summary, path = job.summary, job.results.path
    again = "run the same command to go on"
    if summary.num_resumed:
        say(f"{summary.num_resumed} of {summary.num_lines} lines are in {path} already")
    try:
        bar.begin(summary)
        job.run()
    except KeyboardInterrupt:
        bar.end()
        say(f"stopped: {path} keeps {summary.num_done} of {summary.num_lines} results; {again}")
        return 130
    except DiskFullError as error:
        bar.end()
        say(
            f"raddle batch: {error}: {path} keeps {summary.num_done} of {summary.num_lines} "
            f"results; make room and {again}"
        )
        return 1
    except RaddleError as error:
        bar.end()
        say(f"raddle batch: {error}\n{path} keeps {summary.num_done} results; {again}")
        return 1
    finally:
        job.close()
    bar.end()
    print(_describe(summary, engine, path), flush=True)
    if summary.is_late:
        left = summary.num_lines - summary.num_done
        say(f"deadline: {left} of {summary.num_lines} lines are left; {again}")
        return 3
    return 0


def _describe(summary, engine, path):
    seconds = max(summary.seconds, 1e-9)
    pools = [group.pool for group in engine.cache.groups]
    peak = max(pool.peak_used / pool.num_pages for pool in pools)
    total = summary.prompt_tokens + summary.output_tokens
    return (
        f"{summary.num_done} results ({summary.num_errors} errors) in {path}\n"
        f"{summary.prompt_tokens} prompt and {summary.output_tokens} output tokens in "
        f"{summary.seconds:.2f} s: {summary.output_tokens / seconds:.0f} output tokens/s, "
        f"{total / seconds:.0f} in all, on {engine.device} in {engine.dtype}\n"
        f"KV cache: at most {peak:.1%} of {engine.cache_bytes >> 20} MiB in use, "
        f"{engine.num_preemptions} preemptions; prefix cache: {summary.hit_tokens} prompt tokens "
        f"found, {summary.hit_ratio:.1%} of them\n" + _describe_plan(summary)
    )


def _describe_plan(summary):
    text = f"at most {summary.planned_hit_ratio:.1%} could be found, of all lines' prompt tokens"
    if summary.pace is not None:
        text += (
            f"\nsteps took {summary.step_seconds:.2f} s, {summary.pace:.2f} of the "
            f"{summary.predicted_seconds:.2f} s predicted; {summary.num_plans} plans, "
            f"{summary.planning_seconds:.2f} s"
        )
    if summary.share_of_bound is not None:
        text += (
            f"\n{summary.share_of_bound:.1%} of the bound that no order beats, by the cost model "
            "scaled to what steps took"
        )
    return text


class _Bar:
    """A tqdm bar when stderr is a terminal, else nothing."""

    def __init__(self):
        self._tqdm = need("tqdm").tqdm if sys.stderr.isatty() else None
        self._bar = None

    def begin(self, summary):
        if self._tqdm is not None:
            self._bar = self._tqdm(
                total=summary.num_lines,
                initial=summary.num_done,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def update(self, summary):
        if self._bar is not None:
            rate = summary.output_tokens / max(summary.seconds, 1e-9)
            left = summary.seconds_left
            left = "?" if left is None else self._tqdm.format_interval(left)
            self._bar.set_postfix_str(
                f"{left} left, {rate:.0f} tokens/s, {summary.num_errors} errors", False
            )
            self._bar.update(summary.num_done - self._bar.n)

    def end(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None
