"""A cost model from what was timed.

What is fitted, after sections 5.1 and 6.2 of BlendServe's notes and its paper (arXiv 2411.16102):

    GEMMs      a pass without attention through the model's layers, for each number of tokens, of
               which the lower convex hull is kept; the weights' read is in it
    attention  reading K and V takes a + tokens x bytes / read_rate, prefill takes
               b + scores x FLOPs / attention_flops_rate, both by least squares of relative errors
    overhead   the median of what whole steps of the engine take beyond that, and a for each layer
    alpha      GEMMs and decode attention that take c and s alone, w of c being the weights' read,
               take w + max(c - w, s) + alpha min(c - w, s) on two streams; by least squares of
               relative errors, for each bound on attention's CTAs and on what GEMMs are cut for;
               that of the bounds with the least time is kept
"""

import statistics
from dataclasses import replace

from ..errors import ArgumentError
from .cost import CostModel
from .shape import Shape, with_layers


def fit(measured):
    """The CostModel of all layers of a model, from a survey of a few of them.

    measured: what survey() returns, and "model", the content of a config.json. The result keeps it,
    with what came of it: "weights" (bytes, and seconds of GEMMs of the fewest tokens), "bounds"
    (alpha for each pair), "best" (the pair whose alpha is the model's), "picked" (alpha where each
    load has its own best pair), and in both checks, which nothing is fitted to, "predicted" and
    "error" (of predicted, relative to what was measured). The same times give the same model.
    """
    layers, all_layers = measured["layers"], Shape.from_dict(measured["model"]).num_layers
    few = _fit_rates(measured, layers)
    extra = statistics.median(
        row["seconds"] - few.step_seconds(row["tokens"], row["scores"], row["reads"])
        for row in measured["steps"]
    )
    bounds = fit_alphas(few, measured["beside"])
    best = min(bounds, key=lambda bound: bound["share"])
    few = replace(few, overhead=max(0.0, extra), alpha=best["alpha"])
    start, _ = _fit_reads(measured)
    whole = _fit_rates(measured, all_layers)
    weights = {"bytes": _gemm_bytes(measured["model"]), "seconds": whole.compute_seconds(1)}
    return replace(
        whole,
        overhead=max(0.0, extra + (all_layers - layers) * start),
        alpha=best["alpha"],
        measured={
            **measured,
            "weights": weights,
            "bounds": bounds,
            "best": best,
            "picked": fit_picked(few, measured["beside"]),
            "step_checks": check_steps(few, measured["step_checks"]),
            "beside_checks": check_beside(few, measured["beside_checks"], best),
        },
    )


def _gemm_bytes(config):
    """Of the weights that GEMMs read: all but the embedding table, where logits have their own."""
    from ..engine.config import ModelConfig

    shape, model = Shape.from_dict(config), ModelConfig.from_dict(config)
    table = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return (shape.parameters - table) * shape.dtype_bytes


def _fit_rates(measured, num_layers):
    """A CostModel of so many layers, without overhead, nothing hidden."""
    shape = Shape.from_dict(with_layers(measured["model"], num_layers))
    few = measured["layers"]
    tokens, seconds = lower_hull(scaled_gemms(measured, num_layers))
    if len(tokens) < 2:
        raise ArgumentError(
            "gemms: expected more tokens to take longer, got the least time for the most: "
            "something else ran on the device; measure again when it has nothing else to do"
        )
    score_flops = 4.0 * shape.num_qo_heads * shape.head_dim  # of a layer
    _, score_slope = fit_line(
        [(row["scores"] * score_flops, row["seconds"] / few) for row in measured["prefill"]]
    )
    _, read_slope = _fit_reads(measured)
    flops = 2.0 * shape.active_parameters
    return CostModel(
        flops_per_token=flops,
        flops_per_score=score_flops * num_layers,
        kv_bytes_per_token=float(shape.kv_bytes),
        weight_bytes=float(shape.parameters * shape.dtype_bytes),
        attention_flops_rate=1 / score_slope,
        read_rate=1 / read_slope,
        gemm_rate=tuple(n * flops / s for n, s in zip(tokens, seconds)),
        rate_tokens=tuple(float(n) for n in tokens),
        alpha=1.0,
        weights_in_gemms=True,
    )


def _fit_reads(measured):
    """(seconds that decode attention of a layer takes at least, and for each byte of K and V)."""
    each = Shape.from_dict(with_layers(measured["model"], 1)).kv_bytes
    return fit_line(
        [
            (row["batch"] * row["kv_len"] * each, row["seconds"] / measured["layers"])
            for row in measured["decode"]
        ]
    )


def scaled_gemms(measured, num_layers):
    """[(tokens, seconds)] of a pass through so many layers: one, and the others as the layers that
    were timed take beyond one; noise makes none negative."""
    more = (num_layers - 1) / (measured["layers"] - 1)
    return [
        (row["tokens"], row["one_layer"] + more * max(0.0, row["seconds"] - row["one_layer"]))
        for row in measured["gemms"]
    ]


def lower_hull(points):
    """The lower convex hull of (tokens, seconds), tokens ascending, from its lowest point on: two
    lists. A CostModel takes fewer tokens to take as long as the first.

    Equal steps are the best ones only where the time is convex, and a scheduler's bound rests on
    that. What lies above the hull (a number of tokens that fills tiles badly) is taken for as fast
    as its neighbours.
    """
    lowest = min(range(len(points)), key=lambda i: (points[i][1], -i))
    hull = []
    for point in points[lowest:]:
        while len(hull) >= 2 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [tokens for tokens, _ in hull], [seconds for _, seconds in hull]


def _is_above(left, middle, right):
    """Whether middle lies on or above the line from left to right."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise


def fit_line(points):
    """(start, slope) of y = start + slope x with the least sum of squared relative errors, neither
    negative. points: two or more (x, y), x different, y positive."""
    inverse = sum(1 / y**2 for _, y in points)
    x_mean = sum(x / y**2 for x, y in points) / inverse
    y_mean = sum(1 / y for _, y in points) / inverse
    spread = sum((x - x_mean) ** 2 / y**2 for x, y in points)
    slope = sum((x - x_mean) * (y - y_mean) / y**2 for x, y in points) / spread
    start = y_mean - slope * x_mean
    if start < 0 or slope <= 0:  # the best line through the origin
        return 0.0, sum(x / y for x, y in points) / sum((x / y) ** 2 for x, y in points)
    return start, slope


def fit_alphas(cost, cells):
    """[{"max_ctas", "max_sms", "alpha", "share"}]: the loss of overlap with each pair of bounds,
    and the time of both at once over that of one after the other, on average. ArgumentError where
    nothing could be hidden."""
    bounds = {}
    for cell in cells:
        bounds.setdefault((cell["max_ctas"], cell["max_sms"]), []).append(cell)
    return [
        {"max_ctas": max_ctas, "max_sms": max_sms, **_summary(cost, own)}
        for (max_ctas, max_sms), own in bounds.items()
    ]


def fit_picked(cost, cells):
    """The same, without bounds, of the fastest cell of each load: of an engine that picks them anew
    for each step."""
    loads = {}
    for cell in cells:
        load = tuple(cell[name] for name in ("tokens", "batch", "kv_len", "gemms", "reads"))
        loads.setdefault(load, []).append(cell)
    return _summary(cost, [min(own, key=lambda cell: cell["seconds"]) for own in loads.values()])


def _summary(cost, cells):
    share = statistics.mean(cell["seconds"] / (cell["gemms"] + cell["reads"]) for cell in cells)
    return {"alpha": _fit_alpha(cost, cells), "share": share}


def _fit_alpha(cost, cells):
    above = below = 0.0
    for cell in cells:
        longer, shorter = _sides(cost, cell)
        above += (cell["seconds"] - longer) * shorter / cell["seconds"] ** 2
        below += (shorter / cell["seconds"]) ** 2
    if below == 0:
        raise ArgumentError(
            "beside: expected GEMMs that do more than read their weights, got none: nothing could "
            "be hidden, and alpha cannot be told; measure more tokens"
        )
    return min(1.0, max(0.0, above / below))


def _sides(cost, cell):
    """(seconds that a cell takes at least, of the shorter side what alpha is a share of)."""
    weights = cell["passes"] * cost.read_seconds(0)
    compute = max(cell["gemms"], weights)
    read = weights + cell["reads"]
    return max(compute, read), min(compute, read) - weights


# -- checking -----------------------------------------------------------------------------------


def check_steps(cost, rows):
    """The rows of steps with what the model says of them: the engine runs one thing after the
    other, alpha 1."""
    cost = replace(cost, alpha=1.0)
    return [
        _checked(row, cost.step_seconds(row["tokens"], row["scores"], row["reads"])) for row in rows
    ]


def check_beside(cost, cells, bounds):
    """The cells of one pair of bounds with what the model says of them."""
    checked = []
    for cell in cells:
        if all(cell[name] == bounds[name] for name in ("max_ctas", "max_sms")):
            longer, shorter = _sides(cost, cell)
            checked.append(_checked(cell, longer + cost.alpha * shorter))
    return checked


def _checked(row, predicted):
    return {**row, "predicted": predicted, "error": predicted / row["seconds"] - 1}
