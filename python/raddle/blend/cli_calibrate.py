"""`python -m raddle calibrate`: times a model's shape on a device, and writes the cost model.

The file is what `python -m raddle schedule --hardware FILE` takes. Exit status: 0, or 1 when
something cannot be done.
"""

import os
import sys

from ..errors import RaddleError, RaddleIOError
from .cost import LLAMA_3_8B, CostModel
from .fit import scaled_gemms
from .plot import need_matplotlib, plot_measured
from .shape import DTYPE_BYTES
from .text import table_text


def add_arguments(parser):
    add = parser.add_argument
    add("--config", metavar="FILE", help="config.json of the model (default: Llama-3-8B's shape)")
    add("--device", default="cuda:0", help="cuda:0 (default), another GPU, or cpu")
    add("--dtype", choices=DTYPE_BYTES, help="of weights, K and V (default: the model's)")
    add("-o", "--output", metavar="FILE", help="write the cost model")
    add("--quick", action="store_true", help="fewer points, shorter")
    add("--plot", metavar="FILE", help="write a PNG of what was measured (needs matplotlib)")


def main(args):
    try:
        _run(args)
    except RaddleError as error:
        print(f"raddle calibrate: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(args):
    if args.plot is not None:
        need_matplotlib()
    for path in (args.output, args.plot):
        if path is not None:
            _need_folder(path)  # said before minutes of work
    cost = CostModel.measure(
        args.config or LLAMA_3_8B,
        args.device,
        args.dtype,
        quick=args.quick,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(report(cost))
    if args.output is not None:
        cost.save(args.output)
        print(f"cost model: {args.output}")
    if args.plot is not None:
        plot_measured(cost, args.plot)


def _need_folder(path):
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise RaddleIOError(f"{path}: cannot be written: {folder} is no folder; make it first")


# -- the table ----------------------------------------------------------------------------------


def report(cost):
    """What was measured and what follows, as text."""
    measured = cost.measured
    machine = ", ".join(f"{name} {value}" for name, value in measured["machine"].items())
    num_layers = measured["model"]["num_hidden_layers"]
    timed = f"{measured['layers']} layers were timed, of {num_layers}"
    return "\n\n".join(
        (
            f"{machine}\n{timed}",
            _rates(cost),
            table_text(_gemm_rows(cost, num_layers)),
            table_text(_decode_rows(cost, num_layers)),
            table_text(_prefill_rows(cost, num_layers)),
            table_text(_beside_rows(measured["beside"])),
            table_text(_bound_rows(measured["bounds"], measured["picked"])),
            table_text(_check_rows((*measured["step_checks"], *measured["beside_checks"]))),
            f"alpha {cost.alpha:.3f}: where computing takes as long as reading K and V, a step is "
            f"done {2 / (1 + cost.alpha):.3f} times as fast with both at once as with one after "
            "the other",
        )
    )


def _rates(cost):
    measured = cost.measured
    weights = measured["weights"]
    rows = (
        ("GEMMs, best", f"{max(cost.gemm_rate) / 1e12:.4g} TFLOP/s"),
        ("prefill", f"{cost.attention_flops_rate / 1e12:.4g} TFLOP/s"),
        ("K and V", f"{cost.read_rate / 1e9:.4g} GB/s"),
        ("weights", f"{weights['bytes'] / weights['seconds'] / 1e9:.4g} GB/s"),
        ("overhead", f"{1e3 * cost.overhead:.4g} ms a step"),
        ("alpha", f"{cost.alpha:.3f}"),
        ("with", _bounds_text(measured)),
    )
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _bounds_text(measured):
    best = measured["best"]
    reads = f"decode attention on at most {best['max_ctas']} CTAs of {measured['ctas']}"
    sms = f", GEMMs cut for {best['max_sms']} SMs of {measured['sms']}" if best["max_sms"] else ""
    return reads + sms


def _gemm_rows(cost, num_layers):
    yield "GEMMs of", "ms, all layers", "the model's", "TFLOP/s"
    for tokens, seconds in scaled_gemms(cost.measured, num_layers):
        model = f"{1e3 * cost.compute_seconds(tokens):.4g}"
        rate = f"{tokens * cost.flops_per_token / seconds / 1e12:.4g}"
        yield f"{tokens} tokens", f"{1e3 * seconds:.4g}", model, rate


def _decode_rows(cost, num_layers):
    yield "decode attention of", "ms, all layers", "GB/s"
    for row in cost.measured["decode"]:
        seconds = row["seconds"] * num_layers / cost.measured["layers"]
        rate = row["batch"] * row["kv_len"] * cost.kv_bytes_per_token / seconds / 1e9
        yield f"{row['batch']} x {row['kv_len']}", f"{1e3 * seconds:.4g}", f"{rate:.4g}"


def _prefill_rows(cost, num_layers):
    yield "prefill attention of", "ms, all layers", "TFLOP/s"
    for row in cost.measured["prefill"]:
        seconds = row["seconds"] * num_layers / cost.measured["layers"]
        rate = row["scores"] * cost.flops_per_score / seconds / 1e12
        yield f"{row['qo_len']} behind {row['cached']}", f"{1e3 * seconds:.4g}", f"{rate:.4g}"


def _beside_rows(cells):
    yield "GEMMs of", "decode", "CTAs", "SMs", "GEMMs ms", "decode ms", "both ms", "of their sum"
    for cell in cells:
        loads = f"{cell['tokens']} tokens", f"{cell['batch']} x {cell['kv_len']}"
        times = (f"{1e3 * cell[name]:.4g}" for name in ("gemms", "reads", "seconds"))
        share = f"{cell['seconds'] / (cell['gemms'] + cell['reads']):.3f}"
        yield *loads, cell["max_ctas"], cell["max_sms"] or "all", *times, share


def _bound_rows(bounds, picked):
    yield "CTAs at most", "SMs of GEMMs", "alpha", "both, of their sum"
    for row in bounds:
        sms = row["max_sms"] or "all"
        yield row["max_ctas"], sms, f"{row['alpha']:.3f}", f"{row['share']:.3f}"
    yield "each load's best", "", f"{picked['alpha']:.3f}", f"{picked['share']:.3f}"


def _check_rows(rows):
    yield "not fitted to", "measured ms", "predicted ms", "error"
    for row in rows:
        decode = f"decode {row['batch']} x {row['kv_len']}"
        if "chunks" in row:
            prompts = "".join(f", prompt {count} behind {at}" for count, at in row["chunks"])
            what = f"step: {decode}{prompts}"
        else:
            what = f"both at once: {decode}, GEMMs of {row['tokens']} tokens"
        times = (f"{1e3 * row[name]:.4g}" for name in ("seconds", "predicted"))
        yield what, *times, f"{row['error']:+.1%}"
