"""`python -m raddle batch requests.jsonl -o results.jsonl`: a file of requests in OpenAI's format.

Exit status: 0 when every line has its result (error rows are results), 1 when the job could not
begin or go on, 130 after Ctrl-C. The same command goes on where a job was stopped or killed.
"""

import sys

from ..errors import RaddleError
from .batch import BatchJob
from .cli_model import add_model_arguments, load_engine, model_folder, say
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
    parser.add_argument("--seed", type=int, default=0, help="of requests without one (default: 0)")


def main(args):
    try:
        folder = model_folder(args)
        bar = _Bar()
        engine = load_engine(args, folder, args.seed)
        names = [folder.resolve().name, *args.served_model_name, str(args.model or folder)]
        names = list(dict.fromkeys(names))
        job = BatchJob(engine, args.input, args.output, names, seed=args.seed, progress=bar.update)
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
        f"found, {summary.hit_ratio:.1%}"
    )


class _Bar:
    """A tqdm bar when stderr is a terminal, else nothing."""

    def __init__(self):
        self._tqdm = need("tqdm").tqdm if sys.stderr.isatty() else None
        self._bar = None

    def begin(self, summary):
        if self._tqdm is not None:
            self._bar = self._tqdm(
                total=summary.num_lines, initial=summary.num_done, unit="req", dynamic_ncols=True
            )

    def update(self, summary):
        if self._bar is not None:
            rate = summary.output_tokens / max(summary.seconds, 1e-9)
            self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {summary.num_errors} errors", False)
            self._bar.update(summary.num_done - self._bar.n)

    def end(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None
