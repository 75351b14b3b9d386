"""`python -m raddle generate "text"`: one prompt, its answer on stdout as it is written."""

import time

from ..errors import RaddleError
from .cli_model import add_model_arguments, load_engine, model_folder, say
from .sampling import SamplingParams


def add_arguments(parser):
    add = parser.add_argument
    add("prompt", help="text to go on from, or a message with --chat")
    add("--chat", action="store_true", help="render the prompt by the model's chat template")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--max-tokens", type=int, default=128, help="longest answer (default: 128)")
    add("--temperature", type=float, help="0 is greedy (default: the model's own, or 0.7)")
    add("--top-k", type=int, help="0 keeps all (default: the model's own, or 0)")
    add("--top-p", type=float, help="1 keeps all (default: the model's own, or 1)")
    add("--min-p", type=float, help="0 keeps all (default: the model's own, or 0)")
    add("--seed", type=int, help="for the same answer again (default: another each time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")
    add("-n", type=int, default=1, help="number of answers (default: 1)")
    add("--stats", action="store_true", help="say how many tokens, and how fast, on stderr")
    add_model_arguments(parser)


def main(args):
    try:
        engine = load_engine(args, model_folder(args), args.seed)
        params = _params(args, engine.config.sampling_defaults)
        begin = time.monotonic()
        engine.add_request(_prompt(args), params)
        while engine.has_work:
            for output in engine.step():
                _show(output, args.n)
    except RaddleError as error:
        say(f"raddle generate: {error}")
        return 1
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    if args.stats:
        seconds = time.monotonic() - begin
        say(
            f"{engine.num_prompt_tokens} prompt and {engine.num_output_tokens} output tokens in "
            f"{seconds:.2f} s: {engine.num_output_tokens / seconds:.0f} tokens/s on {engine.device}"
        )
    return 0


def _prompt(args):
    if not args.chat:
        return args.prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": args.prompt}]


def _params(args, defaults):
    settings = {"temperature": 0.7, **defaults}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return SamplingParams(
        **settings, max_tokens=args.max_tokens, seed=args.seed, stop=args.stop, n=args.n,
        stream=args.n == 1,
    )  # fmt: skip


def _show(output, n):
    """A piece of the only answer, or a whole one of several under its number."""
    if n > 1:
        print(f"--- {output.index + 1} ({output.finish_reason})\n{output.text}", flush=True)
        return
    print(output.text, end="" if output.finish_reason is None else "\n", flush=True)
