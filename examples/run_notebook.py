"""Runs the code cells of a notebook, in order, in one namespace; a cell that raises stops it.

    python examples/run_notebook.py examples/attention_tour.ipynb [--write]

--write keeps what the cells print and plot in the notebook. Needs: what the notebook imports
(pip install 'raddle[examples]'); neither Jupyter nor a display.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path


def split_last_expression(source):
    """(statements, expression or None): what a notebook runs, and what it shows."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        return tree, None
    tree.body.pop()
    return tree, ast.Expression(last.value)


def run_cell(source, name, namespace):
    """What the cell prints, then the value of its last line."""
    printed = io.StringIO()
    statements, last = split_last_expression(source)
    with contextlib.redirect_stdout(printed):
        exec(compile(statements, name, "exec"), namespace)
        value = eval(compile(last, name, "eval"), namespace) if last else None
        if value is not None:
            print(repr(value))
    return printed.getvalue()


def take_figures():
    """PNG of every open figure; closes them."""
    plots = sys.modules.get("matplotlib.pyplot")
    pictures = []
    for number in plots.get_fignums() if plots else ():
        buffer = io.BytesIO()
        plots.figure(number).savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        pictures.append(buffer.getvalue())
        plots.close(number)
    return pictures


def make_outputs(text, pictures):
    outputs = []
    if text:
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    for picture in pictures:
        data = {"image/png": base64.b64encode(picture).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the outputs in the notebook")
    arguments = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "Agg")
    notebook = json.loads(arguments.notebook.read_text())
    namespace = {"__name__": "__main__"}
    started = time.perf_counter()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        name = f"{arguments.notebook.name}, cell {count}"
        text = run_cell("".join(cell["source"]), name, namespace)
        cell["execution_count"] = count
        cell["outputs"] = make_outputs(text, take_figures())
        print(f"[{count}] {text}", end="" if text.endswith("\n") else "\n")
    print(f"{len(cells)} cells in {time.perf_counter() - started:.1f} s")
    if arguments.write:
        arguments.notebook.write_text(json.dumps(notebook, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
