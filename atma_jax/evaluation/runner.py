"""Evaluates a checkpoint directory: builds the cells of the suites, runs those not yet recorded, reports."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

from absl import logging
import jax
import tqdm

from atma_jax.config import RetentionCap, UserError, unknown_name
from atma_jax.data.pipeline import heldout_documents, validation_stream
from atma_jax.evaluation import plots
from atma_jax.evaluation.cells import Cell, Inputs
from atma_jax.evaluation.diagnostics import diagnostics_cells, diagnostics_table
from atma_jax.evaluation.losses import loss_cells
from atma_jax.evaluation.needle import needle_cells
from atma_jax.evaluation.records import ResultsFile
from atma_jax.evaluation.retention import retention_cells, retention_table
from atma_jax.evaluation.scoring import Scorer
from atma_jax.models.retention import capped_heads, with_retention_cap
from atma_jax.sharding import make_mesh
from atma_jax.training.checkpointing import load_model

SUITES = {"loss": loss_cells, "needle": needle_cells, "retention": retention_cells, "diagnostics": diagnostics_cells}

COLUMNS = ("document_loss", "stream_loss", "needle_accuracy", "needle_exact", "needle_loss", "absent_accuracy")  # of tables


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure; `multiples` of the training length, `data` "" for the directory the checkpoint was trained on."""

  suites: tuple[str, ...]
  multiples: tuple[int, ...]
  step: int | None = None
  data: str = ""
  trials: int = 24
  seed: int = 0
  batch_tokens: int = 8192
  chunk: int = 512
  min_documents: int = 4
  stream_windows: int = 8
  retention_caps: tuple[RetentionCap | None, ...] = (None,)  # each evaluated by itself; None leaves the memory as it is


def evaluate(checkpoint: str, output: str, options: Options) -> list[dict[str, Any]]:
  """Runs the suites and returns their records, one a number.

  Appends to ``OUTPUT/results.jsonl`` after every cell; a cell already recorded for this step and these settings is not run
  again. Prints a table and writes PNG plots beside the results.

  Raises:
    UserError: an unknown suite, no good checkpoint, data missing or too short.
  """
  for name in options.suites:
    if name not in SUITES:
      raise UserError(unknown_name("--suite", name, SUITES))
  if not options.multiples or min(options.multiples) < 1:
    raise UserError(f"--multiples={','.join(map(str, options.multiples))}: must be whole numbers, each at least 1")
  mesh = make_mesh()
  config, model, tokenizer, step = load_model(checkpoint, options.step, mesh)
  directory = pathlib.Path(options.data or config.data.directory)
  if not (directory / "manifest.json").is_file():
    raise UserError(f"--data={directory}: holds no prepared data (manifest.json); name the directory the model was trained on")
  scorer = Scorer(model, mesh, cap=config.model.logit_cap, batch_tokens=options.batch_tokens, chunk=options.chunk)
  length = config.data.sequence_length
  inputs = Inputs(scorer, tokenizer, [document[1:] for document in heldout_documents(directory)],
                  validation_stream(directory), tuple(sorted({m * length for m in options.multiples})), options.trials,
                  options.seed, options.min_documents, options.stream_windows, config, model, mesh)
  results = ResultsFile(pathlib.Path(output) / "results.jsonl")
  common = {"checkpoint": str(pathlib.Path(checkpoint).absolute()), "step": step, "name": config.name}
  extra = {"training_length": length, "config": config.to_dict(), "jax": jax.__version__,
           "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
  found = []
  for cap in options.retention_caps:
    settings = {} if cap is None else {"retention_cap": {"tokens": cap.tokens, "heads": cap.heads,
                                                         "chosen": [list(pair) for pair in capped_heads(model, cap)]}}
    capped = model if cap is None else with_retention_cap(model, cap)
    of_cap = dataclasses.replace(inputs, model=capped, scorer=scorer if cap is None else scorer.of(capped))
    cells = [(suite, dataclasses.replace(cell, settings=cell.settings | settings))
             for suite in options.suites for cell in SUITES[suite](of_cap)]
    found.append(_run(cells, results, common, extra, of_cap.scorer))
    print(report(found[-1], length, "" if cap is None else f"retention cap {cap.tokens:g} tokens, heads {cap.heads}"))
  if len(found) > 1:
    print("\n" + sweep_table([("none" if cap is None else f"{cap.tokens:g}", records)
                       for cap, records in zip(options.retention_caps, found)]))
  _plot(found[0], pathlib.Path(output), f"{config.name}, step {step}", length)
  return [record for records in found for record in records]


def _run(cells: Sequence[tuple[str, Cell]], results: ResultsFile, common: dict[str, Any], extra: dict[str, Any],
         scorer: Scorer) -> list[dict[str, Any]]:
  records = []
  with tqdm.tqdm(total=sum(cell.tokens for _, cell in cells), unit="tok", unit_scale=True, mininterval=1) as bar:
    for suite, cell in cells:
      identity = {**common, "suite": suite, "settings": cell.settings}
      found = [results.find(identity, *number) for number in cell.expected]
      bar.set_description(cell.label)
      if None not in found:
        records += found
        bar.update(cell.tokens)
        continue
      started, compiled = time.perf_counter(), scorer.compile_seconds
      measurements = cell.run(bar.update)
      seconds = time.perf_counter() - started - (scorer.compile_seconds - compiled)
      new = [{**identity, **dataclasses.asdict(m), **extra, "seconds": round(seconds, 3),
              "tokens_per_second": round(cell.tokens / max(seconds, 1e-9), 1)} for m in measurements]
      results.append(new)
      records += results.records[-len(new):]
  return records


def report(records: Sequence[dict[str, Any]], training_length: int, title: str = "") -> str:
  """The tables of the suites that were run."""
  measures = {record["measure"] for record in records}
  parts = [title] if title else []
  if measures & set(COLUMNS):
    parts.append(table(records, training_length))
  if any(measure.startswith("half_life") for measure in measures):
    parts.append(retention_table(records))
  if any(measure.startswith("residual") for measure in measures):
    parts.append(diagnostics_table(records))
  return "\n\n".join(parts)


def sweep_table(results: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
  """A block a measure: one line a length, one column a retention cap."""
  lines = []
  for measure in COLUMNS:
    values = {(name, r["length"]): r["value"] for name, records in results for r in records if r["measure"] == measure}
    if values:
      lines.append("  ".join([f"{measure:>16}", *(f"{f'cap {name}':>12}" for name, _ in results)]))
      for length in sorted({length for _, length in values}):
        cells = [values.get((name, length)) for name, _ in results]
        lines.append("  ".join([f"{length:>16}", *(f"{'' if v is None else format(v, '.4f'):>12}" for v in cells)]))
  return "\n".join(lines)


def table(records: Sequence[dict[str, Any]], training_length: int) -> str:
  """One line a length, one column a measure."""
  columns = [m for m in COLUMNS if any(r["measure"] == m for r in records)]
  value = {(r["measure"], r["length"]): r["value"] for r in records}
  lines = ["  ".join(["  length", "     x", *(f"{c:>15}" for c in columns)])]
  for length in sorted({length for measure, length in value if measure in columns}):
    cells = [value.get((c, length)) for c in columns]
    lines.append("  ".join([f"{length:>8}", f"{length / training_length:>6g}",
                            *(f"{'' if v is None else format(v, '.4f'):>15}" for v in cells)]))
  return "\n".join(lines)


def _plot(records: Sequence[dict[str, Any]], folder: pathlib.Path, title: str, length: int) -> None:
  def of(measure: str) -> list[dict[str, Any]]:
    return [r for r in records if r["measure"] == measure]

  written = []
  if of("document_loss"):
    plots.plot_loss_vs_length(folder / "loss_vs_length.png", title, length, document=of("document_loss"),
                              stream=of("stream_loss"))
    plots.plot_loss_by_position(folder / "loss_by_position.png", title, length, curve=of("position_loss")[-1])
    written += ["loss_vs_length.png", "loss_by_position.png"]
  if of("needle_accuracy"):
    plots.plot_needle_vs_distance(folder / "needle_vs_distance.png", title, length, accuracy=of("needle_accuracy"),
                                  exact=of("needle_exact"), absent=of("absent_accuracy"))
    written += ["needle_vs_distance.png"]
  logging.info("results: %s; plots: %s", folder / "results.jsonl", ", ".join(written))
