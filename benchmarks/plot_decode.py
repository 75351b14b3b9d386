"""Draw the scan of bench_decode.py: time per byte of K and V against the bytes of a step.

usage: plot_decode.py decode.json decode.png. One panel per side, all on the same axes: a line per
batch size, and the read ceiling of the run. Needs: matplotlib."""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FLAT_FROM_BYTES = 64e6  # from here on the line should be level


def lines(scan, side):
    """{batch: (bytes, microseconds per megabyte)} of one side, in order of bytes."""
    found = {}
    for row in sorted(scan, key=lambda row: row["bytes"]):
        if side in row["sides_us"]:
            xs, ys = found.setdefault(row["batch"], ([], []))
            xs.append(row["bytes"])
            ys.append(row["sides_us"][side] / (row["bytes"] / 1e6))
    return found


def draw(result):
    """The figure."""
    scan = result["scan"]
    sides = sorted({side for row in scan for side in row["sides_us"]}, key=lambda s: s != "raddle")
    figure, panels = plt.subplots(
        1, len(sides), figsize=(1 + 4.5 * len(sides), 4.5), sharey=True, squeeze=False
    )
    floor = 1e3 / result["ceilings"]["read GB/s"]
    for panel, side in zip(panels[0], sides):
        for batch, (xs, ys) in lines(scan, side).items():
            panel.plot(xs, ys, marker="o", markersize=3, label=f"batch {batch}")
        panel.axhline(floor, color="black", linewidth=0.8, linestyle="--", label="read ceiling")
        panel.axvline(FLAT_FROM_BYTES, color="grey", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="bytes of K and V in a step", title=side)
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("microseconds per megabyte")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"decode, bf16, 32/8 heads of 128, page 16, {result['device']}", fontsize=10)
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", help="written by bench_decode.py with its scan")
    parser.add_argument("png", help="the picture to write")
    args = parser.parse_args()
    with open(args.json) as file:
        result = json.load(file)
    if not result.get("scan"):
        parser.error(f"{args.json} holds no scan")
    draw(result).savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
