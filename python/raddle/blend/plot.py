"""A picture of runs: what they compute, read, share and hold, over time."""

from ..errors import RaddleIOError, UnsupportedError

MOST_STAIRS = 64  # of a line: what changes faster hides the other lines


def seconds_text(seconds):
    """Four digits, and no powers of ten for hours."""
    return f"{seconds:.0f} s" if seconds >= 1000 else f"{seconds:.4g} s"


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
