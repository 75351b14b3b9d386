"""Pictures: of runs, what they compute, read, share and hold over time; of what was measured."""

from ..errors import RaddleIOError, UnsupportedError
from .text import seconds_text

MOST_STAIRS = 64  # of a line: what changes faster hides the other lines


def need_matplotlib():
    """matplotlib, or UnsupportedError with the line that installs it."""
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            "plot: matplotlib is not installed: pip install 'raddle[bench]'"
        ) from None
    return matplotlib


def plot(results, pool_tokens, path):
    """Write a PNG of Results: compute and memory use, prefix sharing and use of K and V, over
    simulated time, a line for each policy. Raises UnsupportedError without matplotlib,
    RaddleIOError."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True)
    titles = (
        "computing",
        "reading memory",
        "prompt tokens found in memory, up to then",
        "K and V in the pool",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylabel("share")
        panel.set_ylim(0, 1.05)
        panel.grid(alpha=0.3)
    for result in results:
        times, shares = _curves(result.timeline, pool_tokens)
        label = f"{result.policy}, {seconds_text(result.seconds)}"
        for panel, share in zip(panels, shares, strict=True):
            panel.stairs(share, times, label=label, baseline=None)
    panels[-1].set_xlabel("simulated seconds")
    if results:
        for panel in panels:
            panel.axvline(results[0].bound_seconds, color="black", linestyle=":", linewidth=1)
        lines, labels = panels[0].get_legend_handles_labels()
        title = f"no order takes less than {seconds_text(results[0].bound_seconds)} (dotted)"
        figure.legend(lines, labels, title=title, loc="outside upper center", ncols=4)
    _save(figure, path)


def plot_measured(cost, path):
    """Write a PNG of a measured CostModel: GEMM time against tokens, as timed and as the model has
    it; and for each load of the overlap grid, what both at once took of their sum against the bound
    on attention's CTAs. Raises UnsupportedError without matplotlib, RaddleIOError."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    gemms, beside = figure.subplots(1, 2)
    _plot_gemms(gemms, cost)
    _plot_beside(beside, cost.measured)
    for panel in (gemms, beside):
        panel.grid(alpha=0.3)
    _save(figure, path)


def _plot_gemms(panel, cost):
    from .fit import scaled_gemms

    points = scaled_gemms(cost.measured, cost.measured["model"]["num_hidden_layers"])
    tokens = [point[0] for point in points]
    panel.loglog(tokens, [1e3 * point[1] for point in points], "o", label="as timed")
    model = [1e3 * cost.compute_seconds(n) for n in tokens]
    panel.loglog(tokens, model, label="the model's: lower convex hull")
    panel.axhline(
        1e3 * cost.read_seconds(0), color="black", linestyle=":", linewidth=1, label="weights' read"
    )
    panel.set_title("GEMMs of a step", loc="left", fontsize=10)
    panel.set_xlabel("tokens")
    panel.set_ylabel("ms")
    panel.legend(fontsize=8)


def _plot_beside(panel, measured):
    """A colour for each load; GEMMs cut for all multiprocessors dotted, for what is left drawn."""
    loads = {}
    for cell in measured["beside"]:
        ratio = cell["reads"] / cell["gemms"]
        load = f"{cell['tokens']} tokens, {cell['batch']} x {cell['kv_len']}, {ratio:.2g} as long"
        share = cell["seconds"] / (cell["gemms"] + cell["reads"])
        lines = loads.setdefault(load, ([], []))
        lines[cell["max_sms"] > 0].append((cell["max_ctas"], share))
    for i, (load, lines) in enumerate(loads.items()):
        for points, style, label in zip(lines, ("o:", "o-"), (load, None), strict=True):
            if points:
                look = {"color": f"C{i}", "markersize": 3, "linewidth": 1, "label": label}
                panel.plot(*zip(*points, strict=True), style, **look)
    panel.axhline(1.0, color="black", linestyle=":", linewidth=1)
    panel.set_title("decode attention beside GEMMs", loc="left", fontsize=10)
    panel.set_xlabel(f"CTAs of decode attention, at most (of {measured['ctas']})")
    panel.set_ylabel("both at once, of their sum")
    panel.legend(fontsize=6, title="GEMMs cut for: all SMs dotted, those left drawn")


def _save(figure, path):
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise RaddleIOError(f"{path}: cannot be written: {error.strerror}") from None


def _curves(line, pool_tokens):
    """Edges of at most MOST_STAIRS stretches, and four shares of each: of its time, of prompts, of
    the pool."""
    import numpy

    together = max(-(-len(line.seconds) // MOST_STAIRS), 1)
    begins = numpy.arange(0, len(line.seconds), together)

    def total(column):
        return numpy.add.reduceat(column, begins)

    seconds, prompts = total(line.seconds), numpy.cumsum(total(line.prompt_tokens))
    hits = numpy.cumsum(total(line.hit_tokens)) / numpy.maximum(prompts, 1)
    shares = (
        total(line.compute_seconds) / seconds,
        total(line.read_seconds) / seconds,
        numpy.where(prompts > 0, hits, numpy.nan),
        total(line.held_tokens * line.steps) / total(line.steps) / pool_tokens,
    )
    return numpy.concatenate([[0.0], numpy.cumsum(seconds)]), shares
