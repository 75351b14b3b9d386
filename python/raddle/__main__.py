"""The command line: `python -m raddle COMMAND`.

Each command is a module with add_arguments() and main().
"""

import argparse
import importlib
import sys

COMMANDS = {
    "batch": ("raddle.engine.cli_batch", "answer a file of OpenAI batch requests"),
    "generate": ("raddle.engine.cli_generate", "answer one prompt"),
    "schedule": ("raddle.blend.cli_schedule", "what orders of a file of requests would take"),
    "calibrate": ("raddle.blend.cli_calibrate", "time a model on a device, for schedule"),
    "doctor": ("raddle.doctor", "say what works on this machine, and the cure for what does not"),
    "warmup": ("raddle.warmup", "compile kernels ahead of time"),
    "cache": ("raddle.cache", "look at or clear the kernel cache"),
}


def main(argv=None):
    """Run one command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m raddle",
        description="LLM serving kernels and schedulers.",
        epilog="\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv[:1])  # prints help or the error, and leaves
    name = argv[0]
    module_name, text = COMMANDS[name]
    module = importlib.import_module(module_name)
    command = argparse.ArgumentParser(prog=f"python -m raddle {name}", description=text)
    module.add_arguments(command)
    return module.main(command.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
