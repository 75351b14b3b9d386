"""What is timed for a cost model: pieces of a step, over grids of sizes, on a Rig.

survey() returns a dict of lists, which is what a saved CostModel keeps under "measured": seconds
throughout, of as many layers as "layers" says. fit.py turns it into a model.
"""

from dataclasses import dataclass, replace
from math import ceil

from .. import __version__, _core
from ..errors import ArgumentError, CapacityError
from .cost import read_config
from .fit import fit
from .rig import PAGE_SIZE, Chunk, Rig
from .shape import DTYPE_BYTES, Shape, with_layers

# Of the layers' weights: no cache holds them from one pass to the next, and the logits, which more
# layers share in a whole model, are little beside them.
LEAST_BYTES = 2 << 30


@dataclass(frozen=True)
class Grid:
    """What is timed. Steps are (requests, tokens of K and V of each, Chunks)."""

    window: float  # seconds of a sample, at least
    max_batch: int
    tokens: tuple  # through the GEMMs, at most as many numbers as a CostModel takes
    decode: tuple  # (requests, tokens of each)
    prefill: tuple  # Chunks
    beside: tuple  # (tokens, requests, tokens of each, seconds of attention over those of GEMMs)
    shares: tuple  # of the CTAs of decode attention, as bounds beside GEMMs
    steps: tuple  # for the overhead
    beside_checks: tuple  # as beside; none of the checks is fitted to
    step_checks: tuple


GPU = Grid(
    window=0.05,
    max_batch=256,
    tokens=(1, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192),
    decode=((16, 1024), (64, 1024), (256, 512), (64, 4096), (256, 2048), (16, 16384)),
    prefill=(Chunk(512), Chunk(2048), Chunk(8192), Chunk(512, 4096), Chunk(2048, 8192)),
    beside=tuple(
        (tokens, batch, kv_len, ratio)
        for tokens in (512, 2048)
        for batch, kv_len in ((64, 2048), (256, 1024))
        for ratio in (0.5, 1.0, 2.0)
    ),
    shares=(1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1.0),
    steps=(
        (1, 1024, ()),
        (64, 1024, ()),
        (32, 2048, (Chunk(512),)),
        (64, 1024, (Chunk(1024), Chunk(512, 1024))),
        (8, 512, (Chunk(2048),)),
    ),
    beside_checks=((512, 128, 1024, 1.5), (1536, 32, 4096, 0.75), (768, 200, 1500, 1.0)),
    step_checks=(
        (128, 768, ()),
        (48, 1536, (Chunk(900),)),
        (96, 1024, (Chunk(700, 2000), Chunk(1200))),
        (16, 8192, (Chunk(384),)),
        (200, 1800, (Chunk(1848, 3000),)),
    ),
)

GPU_QUICK = replace(
    GPU,
    window=0.02,
    tokens=(1, 16, 64, 128, 256, 512, 1024, 2048, 4096),
    decode=((16, 1024), (64, 1024), (64, 4096)),
    prefill=(Chunk(512), Chunk(2048), Chunk(512, 4096)),
    beside=tuple((tokens, 64, 2048, ratio) for tokens in (512, 2048) for ratio in (0.5, 1.0, 2.0)),
    shares=(1 / 8, 1 / 4, 1 / 2, 1.0),
    beside_checks=((1024, 128, 1024, 1.5),),
    step_checks=((128, 768, ()), (48, 1536, (Chunk(900),)), (96, 1024, (Chunk(700, 2000),))),
)

CPU = Grid(
    window=0.05,
    max_batch=16,
    tokens=(1, 4, 8, 16, 32, 64, 128, 256, 512),
    decode=((1, 512), (4, 512), (16, 256), (8, 2048)),
    prefill=(Chunk(64), Chunk(256), Chunk(128, 1024)),
    beside=tuple((tokens, 8, 1024, ratio) for tokens in (32, 128) for ratio in (0.5, 1.0, 2.0)),
    shares=(1 / 2, 1.0),
    steps=((1, 256, ()), (8, 512, ()), (4, 512, (Chunk(64),)), (8, 256, (Chunk(128, 512),))),
    beside_checks=((64, 16, 512, 1.5),),
    step_checks=((12, 384, ()), (6, 700, (Chunk(96),)), (3, 1024, (Chunk(200, 300),))),
)

CPU_QUICK = replace(
    CPU,
    window=0.002,
    tokens=(1, 4, 16, 64, 128),
    decode=((1, 256), (4, 256), (8, 512)),
    prefill=(Chunk(32), Chunk(128), Chunk(64, 256)),
    beside=tuple((32, 8, 256, ratio) for ratio in (0.5, 1.0, 2.0)),
    steps=((1, 128, ()), (8, 256, ()), (4, 256, (Chunk(32),))),
    beside_checks=((64, 4, 512, 1.5),),
    step_checks=((6, 200, ()), (3, 300, (Chunk(48, 100),))),
)


def measure(config, device="cuda:0", dtype=None, *, quick=False, progress=None):
    """What CostModel.measure says."""
    from .. import empty
    from ..engine.config import ModelConfig

    say = progress or (lambda text: None)
    content = dict(read_config(config))
    if dtype is not None:
        if dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ArgumentError(f"dtype: expected one of {known}, got {dtype!r}")
        content["dtype"] = dtype
    device = empty(1, device=device).device  # "cuda" is cuda:0; or an error that says why not
    is_cpu = device == "cpu"
    grid = (CPU_QUICK if quick else CPU) if is_cpu else (GPU_QUICK if quick else GPU)
    num_layers = layers_to_measure(content)
    say(f"{num_layers} layers with random weights on {device}")
    shape = Shape.from_dict(with_layers(content, num_layers))
    pool_tokens = _pool_tokens(grid)
    _check_room(device, shape, pool_tokens)
    rig = Rig(
        ModelConfig.from_dict(with_layers(content, num_layers)),
        device=device,
        max_batch=grid.max_batch,
        max_tokens=_max_tokens(grid),
        max_context=_max_context(grid),
        pool_tokens=pool_tokens,
        window=grid.window,
    )
    facts = {"machine": describe(device), "quick": quick, "model": content}
    return fit(facts | survey(rig, grid, say))


# -- sizes --------------------------------------------------------------------------------------


def layers_to_measure(config):
    """One layer more than have LEAST_BYTES of weights, at least 2, at most as many as there are."""
    two, one = (Shape.from_dict(with_layers(config, layers)) for layers in (2, 1))
    layer_bytes = (two.parameters - one.parameters) * one.dtype_bytes
    all_layers = Shape.from_dict(config).num_layers
    return max(2, min(all_layers, 1 + -(-LEAST_BYTES // layer_bytes)))


def _all_steps(grid):
    return (*grid.steps, *grid.step_checks)


def _max_tokens(grid):
    chunks = [chunk.count for chunk in grid.prefill]
    steps = [batch + sum(chunk.count for chunk in chunks) for batch, _, chunks in _all_steps(grid)]
    return max(*grid.tokens, *chunks, *steps, grid.max_batch)


def _max_context(grid):
    lengths = [kv_len for _, kv_len in grid.decode]
    lengths += [load[2] for load in (*grid.beside, *grid.beside_checks)]
    lengths += [kv_len + 1 for _, kv_len, _ in _all_steps(grid)]
    chunks = [*grid.prefill, *(chunk for step in _all_steps(grid) for chunk in step[2])]
    return max(*lengths, *(chunk.count + chunk.cached for chunk in chunks), _max_tokens(grid))


def _pool_tokens(grid):
    """Of the largest load, every request's last page counted whole."""

    def pages(batch, kv_len, chunks=()):
        lengths = [kv_len + 1] * batch + [chunk.count + chunk.cached for chunk in chunks]
        return sum(-(-length // PAGE_SIZE) for length in lengths)

    loads = [pages(*load) for load in (*grid.decode, *_all_steps(grid))]
    loads += [pages(load[1], load[2]) for load in (*grid.beside, *grid.beside_checks)]
    loads += [pages(0, 0, [chunk]) for chunk in grid.prefill]
    return PAGE_SIZE * max(*loads, -(-_max_tokens(grid) // PAGE_SIZE))


def _check_room(device, shape, pool_tokens):
    if device == "cpu":
        return
    free = _core.gpu_info(int(device.partition(":")[2] or 0))["free_bytes"]
    needed = pool_tokens * shape.kv_bytes + 2 * shape.parameters * shape.dtype_bytes
    if needed > free:
        raise CapacityError(
            f"device: {device} has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for "
            f"{shape.num_layers} layers and {pool_tokens} tokens of K and V; free memory there, or "
            "pass quick=True (--quick)"
        )


def describe(device):
    """The machine and the versions that times come from."""
    facts = {"device": "cpu", "raddle": __version__}
    settings = _core.settings()
    if device == "cpu":
        return facts | {"isa": settings["cpu_isa"], "threads": settings["cpu_threads"]}
    facts["device"] = _core.gpu_info(int(device.partition(":")[2] or 0))["name"]
    return facts | {"driver": _core.driver_info()[0], "cublaslt": _core.blas_info()[1]}


# -- timing -------------------------------------------------------------------------------------


def survey(rig, grid, say):
    """Times all of a Grid on a Rig, or what stands for one; returns them as a dict of lists of
    dicts. say: called with a line of text before each part."""
    found = {"layers": rig.num_layers, "gemms": [], "decode": [], "prefill": []}
    for tokens in grid.tokens:
        say(f"GEMMs of {tokens} tokens")
        one, all_layers = rig.pass_seconds(tokens)
        found["gemms"].append({"tokens": tokens, "one_layer": one, "seconds": all_layers})
    for batch, kv_len in grid.decode:
        say(f"decode attention of {batch} requests x {kv_len} tokens")
        seconds = rig.decode_seconds(batch, kv_len)
        found["decode"].append({"batch": batch, "kv_len": kv_len, "seconds": seconds})
    for chunk in grid.prefill:
        say(f"prefill attention of {chunk.count} tokens behind {chunk.cached}")
        seconds = rig.prefill_seconds(chunk)
        row = {"qo_len": chunk.count, "cached": chunk.cached, "scores": chunk.scores}
        found["prefill"].append({**row, "seconds": seconds})
    found |= {"ctas": rig.num_ctas(), "sms": rig.num_sms()}
    bounds = bounds_of(grid.shares, found["ctas"], found["sms"])
    for name in ("beside", "beside_checks"):
        found[name] = [
            cell
            for load in getattr(grid, name)
            for cell in _survey_beside(rig, grid, load, bounds, say)
        ]
    for name in ("steps", "step_checks"):
        found[name] = [_survey_step(rig, step, say) for step in getattr(grid, name)]
    return found


def bounds_of(shares, num_ctas, num_sms):
    """[(max_ctas, max_sms)]: bounds on decode attention; with each, GEMMs are cut for all
    multiprocessors, 0, and for those that attention leaves."""
    bounds = []
    for max_ctas in sorted({max(1, round(share * num_ctas)) for share in shares}):
        left = num_sms - ceil(max_ctas * num_sms / num_ctas)
        bounds += [(max_ctas, 0), (max_ctas, left)] if left > 0 else [(max_ctas, 0)]
    return bounds


def _survey_beside(rig, grid, load, bounds, say):
    """A cell for each bound. Both sides are repeated so that attention, alone and unbounded, takes
    `ratio` times what the GEMMs take."""
    tokens, batch, kv_len, ratio = load
    say(
        f"GEMMs of {tokens} tokens beside decode attention of {batch} x {kv_len}, {ratio:g} as long"
    )
    gemms, reads = rig.pass_seconds(tokens)[1], rig.decode_seconds(batch, kv_len)
    passes = max(1, round(grid.window / gemms), round(reads / (ratio * gemms)))
    counts = (passes, max(1, round(ratio * passes * gemms / reads)))
    return [
        {
            "tokens": tokens,
            "batch": batch,
            "kv_len": kv_len,
            "max_ctas": max_ctas,
            "max_sms": max_sms,
            "passes": counts[0],
            "gemms": counts[0] * gemms,
            "reads": counts[1] * reads,
            "seconds": rig.beside_seconds(tokens, batch, kv_len, counts, max_ctas, max_sms),
        }
        for max_ctas, max_sms in bounds
    ]


def _survey_step(rig, step, say):
    batch, kv_len, chunks = step
    read = sum(chunk.count for chunk in chunks)
    say(f"a step of {batch} requests x {kv_len} tokens and {read} tokens of prompts")
    return {
        "batch": batch,
        "kv_len": kv_len,
        "chunks": [[chunk.count, chunk.cached] for chunk in chunks],
        "tokens": batch + read,
        "scores": sum(chunk.scores for chunk in chunks),
        "reads": batch * (kv_len + 1),
        "seconds": rig.step_seconds(batch, kv_len, list(chunks)),
    }
