"""What the commands that run a model share: the options that name one, and loading it."""

import sys
from pathlib import Path

import raddle

from ..errors import ArgumentError, RaddleError
from .config import DTYPES
from .engine import Engine

_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_model_arguments(parser):
    add = parser.add_argument
    add("--model", metavar="DIR", help="Hugging Face folder (default: examples/tiny-llama)")
    add("--device", default="auto", help="auto (default: a GPU if there is one), cpu, cuda, cuda:1")
    add("--dtype", choices=DTYPES, help="of weights and KV cache (default: the model's)")
    add("--max-batch", type=int, default=64, help="answers written at once (default: 64)")
    add("--max-tokens-per-step", type=int, default=2048, help="of one pass (default: 2048)")
    add("--max-model-len", type=int, help="longest prompt and answer (default: the context)")
    add("--page-size", type=int, default=16, help="tokens of a KV page (default: 16)")
    add("--kv-memory", metavar="SIZE", type=_bytes, help="of the KV cache, such as 512M or 20G")
    add("--no-prefix-cache", action="store_true", help="compute again what was computed before")


def model_folder(args):
    """The folder of --model, or tiny-llama where it stands; RaddleError with the cure."""
    if args.model is not None:
        folder = Path(args.model)
        if not folder.is_dir():
            raise ArgumentError(f"--model: {folder}: no such folder; name a Hugging Face folder")
        return folder
    checkout = Path(raddle.__file__).resolve().parents[2]
    for root in (Path.cwd(), checkout):
        folder = root / "examples" / "tiny-llama"
        if (folder / "model.safetensors").is_file():
            return folder
    raise ArgumentError(
        "--model: name a model, a Hugging Face folder with config.json, safetensors and "
        "tokenizer.json (examples/tiny-llama, the default, is neither below this folder nor beside "
        "raddle's source)"
    )


def load_engine(args, folder, seed, progress=None):
    """The engine that the options describe."""
    return Engine.from_folder(
        folder,
        device=choose_device(args.device),
        dtype=args.dtype,
        max_batch=args.max_batch,
        max_tokens_per_step=args.max_tokens_per_step,
        max_model_len=args.max_model_len,
        page_size=args.page_size,
        kv_memory_bytes=args.kv_memory,
        prefix_cache=not args.no_prefix_cache,
        seed=seed,
        progress=progress,
    )


def choose_device(name):
    """ "auto" becomes cuda where a GPU answers, else cpu."""
    if name != "auto":
        return name
    try:
        raddle.empty(1, device="cuda")
    except RaddleError:
        return "cpu"
    return "cuda"


def say(text):
    print(text, file=sys.stderr, flush=True)


def _bytes(text):
    import argparse

    number, factor = text, 1
    if text and text[-1].lower() in _SUFFIXES:
        number, factor = text[:-1], _SUFFIXES[text[-1].lower()]
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a size such as 512M, got {text!r}") from None
