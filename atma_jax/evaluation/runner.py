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

from atma_jax.config import UserError, unknown_name
from atma_jax.data.pipeline import heldout_documents, validation_stream
from atma_jax.evaluation import plots
from atma_jax.evaluation.cells import Cell, Inputs
from atma_jax.evaluation.losses import loss_cells
from atma_jax.evaluation.needle import needle_cells
from atma_jax.evaluation.records import ResultsFile
from atma_jax.evaluation.scoring import Scorer
from atma_jax.models import Atma
from atma_jax.sharding import make_mesh
from atma_jax.training.checkpointing import load_model
from atma_jax.training.state import ModelDefinition, params_of

SUITES = {"loss": loss_cells, "needle": needle_cells}


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
  keep_window: bool = False  # of a model trained with one; else every key is seen


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
  model = model if options.keep_window else at_full_context(model)
  directory = pathlib.Path(options.data or config.data.directory)
  if not (directory / "manifest.json").is_file():
    raise UserError(f"--data={directory}: holds no prepared data (manifest.json); name the directory the model was trained on")
  scorer = Scorer(model, mesh, cap=config.model.logit_cap, batch_tokens=options.batch_tokens, chunk=options.chunk)
  length = config.data.sequence_length
  inputs = Inputs(scorer, tokenizer, [document[1:] for document in heldout_documents(directory)],
                  validation_stream(directory), tuple(sorted({m * length for m in options.multiples})), options.trials,
                  options.seed, options.min_documents, options.stream_windows)
  results = ResultsFile(pathlib.Path(output) / "results.jsonl")
  common = {"checkpoint": str(pathlib.Path(checkpoint).absolute()), "step": step, "name": config.name}
  extra = {"training_length": length, "config": config.to_dict(), "jax": jax.__version__,
           "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
  cells = [(suite, cell) for suite in options.suites for cell in SUITES[suite](inputs)]
  records = _run(cells, results, common, extra, scorer)
  print(table(records, length))
  _plot(records, pathlib.Path(output), f"{config.name}, step {step}", length)
  return records


def at_full_context(model: Atma) -> Atma:
  """The same parameters without an attention window, which is a matter of training."""
  if model.config.window is None:
    return model
  return ModelDefinition(dataclasses.replace(model.config, window=None)).merge(params_of(model))


def _run(cells: Sequence[tuple[str, Cell]], results: ResultsFile, common: dict[str, Any], extra: dict[str, Any],
         scorer: Scorer) -> list[dict[str, Any]]:
  records = []
  with tqdm.tqdm(total=sum(cell.tokens for _, cell in cells), unit="tok", unit_scale=True, mininterval=1) as bar:
    for suite, cell in cells:
      identity = {**common, "suite": suite, "settings": cell.settings}
      found = [results.find(identity, measure, length) for measure, length in cell.expected]
      bar.set_description(cell.label)
      if None not in found:
        records += found
        bar.update(cell.tokens)
        continue
      started, compiled = time.perf_counter(), scorer.compile_seconds
      measurements = cell.run(bar.update)
      seconds = time.perf_counter() - started - (scorer.compile_seconds - compiled)
      new = [{**identity, **dataclasses.asdict(m), **extra, "seconds": round(seconds, 3),
              "tokens_per_second": round(cell.tokens / seconds, 1)} for m in measurements]
      results.append(new)
      records += results.records[-len(new):]
  return records


def table(records: Sequence[dict[str, Any]], training_length: int) -> str:
  """One line a length, one column a measure."""
  columns = [m for m in ("document_loss", "stream_loss", "needle_accuracy", "needle_exact", "needle_loss", "absent_accuracy")
             if any(r["measure"] == m for r in records)]
  value = {(r["measure"], r["length"]): r["value"] for r in records}
  lines = ["  ".join(["  length", "     x", *(f"{c:>15}" for c in columns)])]
  for length in sorted({length for _, length in value}):
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
