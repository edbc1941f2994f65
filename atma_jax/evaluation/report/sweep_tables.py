"""The main tables of a sweep in Markdown and LaTeX: every setting at every length, and the matched contrasts."""

from __future__ import annotations

from collections.abc import Sequence
import re

from atma_jax.evaluation.report.comparisons import Contrast, Setting

MEASURES = {  # of the main tables: heading, factor, decimals
  "document_loss": ("document loss (nats)", 1, 3), "stream_loss": ("stream loss (nats)", 1, 3),
  "needle_exact": ("needle, all digits right (%)", 100, 0),
  "needle_accuracy": ("needle accuracy (%)", 100, 0), "train_loss": ("training loss (nats)", 1, 3),
}
_LATEX = {"->": "$\\to$", "±": "$\\pm$", "\\": "\\textbackslash{}", "~": "\\textasciitilde{}",
          "^": "\\textasciicircum{}", "<": "$<$", ">": "$>$"}
Table = tuple[str, list[str], list[list[str]]]  # caption, heading, body


def main_tables(settings: Sequence[Setting], contrasts: Sequence[Contrast]) -> list[Table]:
  """One table per measure, and one of the contrasts at the shortest and the longest length."""
  tables = []
  for measure, (title, factor, digits) in MEASURES.items():
    chosen = [s for s in settings if s.measure == measure]
    if not chosen:
      continue
    multiples = sorted({s.multiple for s in chosen})
    cells = {(s.name, s.multiple): s for s in chosen}
    body = [[name, *(_value_text(cells.get((name, m)), factor, digits) for m in multiples)]
            for name in dict.fromkeys(s.name for s in chosen)]
    tables.append((f"{title} at multiples of the training length" + _seeds_text(chosen),
                   ["setting", *(f"{m:g}x" for m in multiples)], body))
  chosen = [c for c in contrasts if c.measure in MEASURES and c.multiple in _extreme_multiples(contrasts, c.measure)]
  if chosen:
    tables.append(("matched contrasts: second level minus first, mean over pairs that agree in all else, 95 % interval",
                   ["factor", "levels", "measure", "length", "difference", "wins of the second"],
                   [[c.axis, f"{c.first} -> {c.second}", MEASURES[c.measure][0], f"{c.multiple:g}x", _difference_text(c),
                     f"{c.wins} of {c.pairs}" + (f", {c.ties} equal" if c.ties else "")] for c in chosen]))
  return tables


def markdown(tables: Sequence[Table]) -> str:
  """All tables in Markdown, each below its caption."""
  parts = []
  for caption, heading, body in tables:
    lines = [f"**{caption}**", "", _markdown_row(heading), _markdown_row(["---"] * len(heading)), *map(_markdown_row, body)]
    parts.append("\n".join(lines))
  return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table]) -> str:
  """All tables in LaTeX, for the package booktabs."""
  parts = []
  for caption, heading, body in tables:
    lines = ["\\begin{table}", f"\\caption{{{_latex_text(caption)}}}", f"\\begin{{tabular}}{{l{'r' * (len(heading) - 1)}}}",
             "\\toprule", _latex_row(heading), "\\midrule", *map(_latex_row, body), "\\bottomrule",
             "\\end{tabular}", "\\end{table}"]
    parts.append("\n".join(lines))
  return "% \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


def _extreme_multiples(contrasts: Sequence[Contrast], measure: str) -> set[float]:
  multiples = [c.multiple for c in contrasts if c.measure == measure]
  return {min(multiples), max(multiples)}


def _value_text(setting: Setting | None, factor: float, digits: int) -> str:
  if setting is None:
    return ""
  text = f"{factor * setting.mean:.{digits}f}"
  return text if setting.high is None else f"{text} ± {factor * (setting.high - setting.mean):.{digits}f}"


def _difference_text(contrast: Contrast) -> str:
  _, factor, digits = MEASURES[contrast.measure]
  text = f"{factor * contrast.difference:+.{digits}f}"
  if contrast.low is None or contrast.high is None:
    return text
  return f"{text} [{factor * contrast.low:+.{digits}f}, {factor * contrast.high:+.{digits}f}]"


def _seeds_text(settings: Sequence[Setting]) -> str:
  counts = sorted({s.seeds for s in settings})
  return "" if counts == [1] else f"; mean ± 95 % interval over {' to '.join(map(str, counts[::max(1, len(counts) - 1)]))} seeds"


def _markdown_row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(map(_markdown_text, cells)) + " |"


def _markdown_text(text: str) -> str:
  """Text that no Markdown reader takes for a mark, a cell's end, a formula or HTML."""
  text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
  return re.sub(r"([\\`*|$\[\]])", r"\\\1", text)


def _latex_row(cells: Sequence[str]) -> str:
  return " & ".join(_latex_text(cell) for cell in cells) + " \\\\"


def _latex_text(text: str) -> str:
  return re.sub(r"->|[&%$#_{}\\~^±<>]", lambda found: _LATEX.get(found[0], f"\\{found[0]}"), " ".join(text.split()))
