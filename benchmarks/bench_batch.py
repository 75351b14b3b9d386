"""What a batch job costs before the model runs: the pass over its file, memory, and plans.

A file of chat-like requests (one of 64 system prompts, a question of their own) for tiny-llama's
tokenizer; each number of lines in a process of its own. A row is microseconds a line of the pass,
of the first plan (tree, order, prediction), and of the five plans that follow as outputs are seen;
its bytes_per_line are what the process has grown by to the end of the pass, and at most within the
plans (resident memory). No peer: other drivers read the whole file. --lines 1000000 by hand.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

TINY_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"
WORDS = "def return class import self value index for while open read write list node".split()


def extend(parser):
    parser.add_argument("--lines", type=int, action="append", help="default: 1000, 10000, 100000")
    parser.add_argument("--child", metavar="FILE", help="measure this file, print JSON, and leave")


def write_requests(path, count):
    rng = random.Random(count)
    systems = [" ".join(rng.choices(WORDS, k=60)) for _ in range(64)]
    with open(path, "w") as file:
        for i in range(count):
            prompt = rng.choice(systems) + " ".join(rng.choices(WORDS, k=rng.randrange(5, 40)))
            body = {"model": "tiny-llama", "prompt": prompt, "max_tokens": rng.randrange(16, 256)}
            line = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(path):
    """The child: seconds and bytes."""
    from raddle.engine import Engine
    from raddle.engine.lines import WAITS, Lines
    from raddle.engine.plan import Limits, Plan, cost_of

    engine = Engine.from_folder(TINY_LLAMA, kv_memory_bytes=64 << 20)
    engine.tokenizer.encode("warm up")
    before = resident_bytes()
    begin = time.perf_counter()
    lines = Lines(path, engine, ["tiny-llama"])
    lines.scan({})
    pass_seconds = time.perf_counter() - begin
    pass_bytes = resident_bytes() - before
    begin = time.perf_counter()
    waits = [state == WAITS for state in lines.states]
    plan = Plan(lines.requests(), lines.request_begin, waits, cost_of(engine), Limits.of(engine))
    first_seconds = time.perf_counter() - begin
    rng, spent = random.Random(0), plan.planning_seconds
    while (line := plan.next()) is not None:
        plan.end(line, rng.randrange(1, lines.max_tokens[line] + 1))
        if plan.is_due:
            plan.make()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "lines": len(lines),
        "file_bytes": Path(path).stat().st_size,
        "block_ids": len(lines.requests()["hash_ids"]),
        "pass_seconds": pass_seconds,
        "first_plan_seconds": first_seconds,
        "later_plans": plan.num_plans - 1,
        "later_plans_seconds": plan.planning_seconds - spent,
        "pass_bytes": pass_bytes,
        "peak_bytes": peak - before,
    }


def main():
    args = common.parse_args(__doc__, extend=extend)
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    report = common.Report("batch", args, {})
    for count in args.lines or ([1000] if args.quick else [1000, 10_000, 100_000]):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "requests.jsonl"
            write_requests(path, count)
            child = [sys.executable, __file__, "--child", str(path)]
            found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)
        facts = {
            "bytes_per_line": found["pass_bytes"] / count,
            "peak_bytes_per_line": found["peak_bytes"] / count,
            **found,
        }
        for name in ("pass", "first_plan", "later_plans"):
            report.add(f"{name}, {count} lines", 1e6 * found[f"{name}_seconds"] / count, **facts)
        print(
            f"  {found['file_bytes'] / count:.0f} bytes a line in the file, "
            f"{found['block_ids'] / count:.1f} block ids; memory {facts['bytes_per_line']:.0f} "
            f"bytes a line after the pass, {facts['peak_bytes_per_line']:.0f} at most in plans; "
            f"{found['later_plans']} later plans"
        )
    report.write()


if __name__ == "__main__":
    main()
