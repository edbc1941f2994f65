"""Runs the code cells of a notebook one after the other, and keeps what they print, return and draw.

    python launch/notebooks/execute.py launch/notebooks/atma_tour.ipynb             # renews the outputs in the file
    python launch/notebooks/execute.py --check launch/notebooks/atma_tour.ipynb     # runs it and leaves the file alone

For notebooks of plain Python; Jupyter is not needed. An error in a cell ends it with a traceback and exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import pathlib
import time
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def run_cell(source: str, name: str, names: dict[str, Any]) -> list[dict[str, Any]]:
  """Runs one cell in the namespace `names` and returns its outputs as a notebook stores them."""
  tree, printed, outputs, value = ast.parse(source, name), io.StringIO(), [], None
  last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
  with contextlib.redirect_stdout(printed):
    exec(compile(tree, name, "exec"), names)
    if isinstance(last, ast.Expr):
      value = eval(compile(ast.Expression(last.value), name, "eval"), names)
  if printed.getvalue():
    outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)})
  for number in plt.get_fignums():
    image = io.BytesIO()
    plt.figure(number).savefig(image, format="png", dpi=70, bbox_inches="tight")
    encoded = base64.b64encode(image.getvalue()).decode()
    outputs.append({"output_type": "display_data", "data": {"image/png": encoded}, "metadata": {}})
  plt.close("all")
  if value is not None and not source.rstrip().endswith(";"):
    outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {},
                    "data": {"text/plain": repr(value).splitlines(keepends=True)}})
  return outputs


def run_notebook(path: pathlib.Path, check: bool) -> None:
  """Runs the cells of a notebook and writes their outputs to it, unless it is only a check; raises what a cell raises."""
  notebook, names, count = json.loads(path.read_text(encoding="utf-8")), {"__name__": "__main__"}, 0
  for cell in notebook["cells"]:
    if cell["cell_type"] == "code":
      count, began = count + 1, time.perf_counter()
      outputs = run_cell("".join(cell["source"]), f"cell {count}", names)
      for output in outputs:
        if "execution_count" in output:
          output["execution_count"] = count
      cell |= {"execution_count": count, "outputs": outputs}
      print(f"cell {count}: {time.perf_counter() - began:.1f} s")
  if not check:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
  """Parses the command line and runs the notebook."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--check", action="store_true", help="leave the file alone")
  parser.add_argument("notebook", type=pathlib.Path)
  arguments = parser.parse_args()
  if not arguments.notebook.is_file():
    parser.error(f"{arguments.notebook}: no such file; legal: a .ipynb file")
  run_notebook(arguments.notebook, arguments.check)


if __name__ == "__main__":
  main()
