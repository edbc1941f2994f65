"""The evaluation of a checkpoint in one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh

from atma_jax import distributed
from atma_jax.checkpoints.load import LoadedModel, load_model, overridden
from atma_jax.checkpoints.model_hub import located
from atma_jax.checkpoints.overrides import checked_overrides, in_effect
from atma_jax.config import Config, RetentionCap
from atma_jax.data.manifest import load_manifest, load_prepared_tokenizer
from atma_jax.data.pipeline import heldout_documents, validation_stream
from atma_jax.errors import UserError
from atma_jax.evaluation.options import Options, split_options
from atma_jax.evaluation.records import Record, ResultsFile, is_ok
from atma_jax.evaluation.report.console_tables import cap_sweep_text, results_text
from atma_jax.evaluation.resources import code_version, hardware
from atma_jax.evaluation.runner import run_cells
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.suite import Inputs
from atma_jax.evaluation.suites import all_suites, find_suite
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition
from atma_jax.models.retention_cap import capped_heads, with_retention_cap
from atma_jax.sharding import make_mesh


def evaluate(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], *, overrides: Mapping[str, Any] | None = None,
             retention_caps: Sequence[RetentionCap | None] = (), **options: Any) -> list[Record]:
  """Measures a checkpoint at and past its training length.

  Appends the results to ``OUTPUT/results.jsonl`` cell by cell, prints tables and writes PNG plots beside the results. A cell
  that is already recorded for this step and these settings is not run again. One that does not fit into memory is recorded
  with the status "out_of_memory" and without a value, and tried again only on other hardware or within other limits.

  Args:
    checkpoint: a working directory of `train`, its ``checkpoints`` folder, a published checkpoint, or one of these on the hub,
      ``hf:USER/NAME[@REVISION]``.
    output: directory of the results.
    overrides: values of the model's fields that replace those it was trained with, as in `load_model`. Without ``window``
      among them, every key is visible, unless ``keep_window`` is given.
    retention_caps: evaluate under each of these, None meaning without a cap, and compare the results.
    **options: the flags of ``python -m atma_jax.evaluate`` by name, such as ``suite=("loss", "needle")``,
      ``multiples=(1, 2, 4)``, ``trials=8``: the fields of `atma_jax.evaluation.options.Options` and those of the suites'
      own options. A list counts as a tuple, and a single suite may be given as a string.

  Returns:
    One record per number: a dict with ``suite``, ``measure``, ``length``, ``value`` (losses in nats per token, accuracies from
    0 to 1), ``n``, and ``standard_error`` or ``interval`` (95 %), beside settings, code version and hardware.

  Raises:
    UserError: no good checkpoint, an unknown suite or option, an illegal value, or data that is missing or too short.

  Example:
    >>> records = atma_jax.evaluate("runs/quickstart", "runs/needles", suite="needle", multiples=(1, 8, 32))
    >>> {record["length"]: record["value"] for record in records if record["measure"] == "needle_exact"}
  """
  common, suite_options = split_options(options)
  overrides = dict(overrides or {})
  try:
    mesh = make_mesh(context=common.context)
  except ValueError as error:
    raise UserError(f"--context={common.context}: {error}") from error
  single_cap = checked_overrides(overrides).get("retention_cap")
  overrides.pop("retention_cap", None)
  if common.keep_window and "window" in overrides:
    raise UserError("--keep_window and --window: only one of them can be given")
  if single_cap is not None and retention_caps:
    raise UserError("--retention_cap and --retention_cap_sweep: only one of them can be given")
  source, recorded = located(checkpoint)
  loaded = load_model(source, common.step, mesh, ema=common.ema, overrides=overrides)
  keeps_window = common.keep_window or "window" in overrides
  model = loaded.model if keeps_window else overridden(loaded.model, {"window": None})
  inputs = _make_inputs(loaded, model, mesh, common)
  with distributed.agreed():
    results = ResultsFile(pathlib.Path(output) / "results.jsonl", writes=jax.process_index() == 0)
  identity = {"checkpoint": recorded, "step": loaded.step, "name": loaded.config.name,
              **({"ema": True} if common.ema else {}), **in_effect(model.config)}
  length = loaded.config.data.sequence_length
  context = {"training_length": length, "config": loaded.config.to_dict(), "jax": jax.__version__, "code": code_version(),
             "hardware": hardware(), "limits": {name: getattr(common, name) for name in
                                                ("batch_tokens", "chunk", "prefill_chunk", "memory_gib")}}
  by_cap = []
  for cap, settings, capped in _under_caps(inputs, retention_caps or (single_cap,)):
    cells = []
    for name in common.suite:
      built = find_suite(name).cells(capped, suite_options[name])
      cells += [(name, dataclasses.replace(cell, settings=cell.settings | settings)) for cell in built]
    records = run_cells(cells, results, identity, context, capped.scorer)
    by_cap.append((str(cap or "none"), records))
    if jax.process_index() == 0:
      title = f"retention cap {cap.tokens:g} tokens on {settings['retention_cap']['heads']}" if cap else ""
      print(results_text(records, all_suites(), length, title))
  if jax.process_index() == 0:
    if len(by_cap) > 1:
      print("\n" + cap_sweep_text(by_cap, all_suites()))
    _write_plots(by_cap[0][1], pathlib.Path(output), f"{loaded.config.name}, step {loaded.step}", length)
  return [record for _, records in by_cap for record in records]


def check_evaluation(config: Config, **options: Any) -> None:
  """Checks, before a model is trained, that it can be evaluated: the options, and whether the prepared data is long enough.

  Args:
    config: the recipe; ``config.data.directory`` is prepared.
    **options: those of `evaluate`.

  Raises:
    UserError: what `evaluate` would raise it for.
  """
  common, suite_options = split_options(options)
  mesh, definition = make_mesh(context=common.context), ModelDefinition(config.model)
  untrained = definition.merge(jax.jit(definition.init)(jax.random.key(0)))
  model = untrained if common.keep_window else overridden(untrained, {"window": None})
  directory = pathlib.Path(common.data or config.data.directory)
  tokenizer = load_prepared_tokenizer(directory, load_manifest(directory))
  inputs = _make_inputs(LoadedModel(config, model, tokenizer, 0), model, mesh, common)
  for name in common.suite:
    find_suite(name).cells(inputs, suite_options[name])


def _make_inputs(loaded: LoadedModel, model: Atma, mesh: Mesh, options: Options) -> Inputs:
  """What suites work on: the model's scorer and the prepared data."""
  directory = pathlib.Path(options.data or loaded.config.data.directory)
  if not (directory / "manifest.json").is_file():
    raise UserError(f"--data={directory}: holds no prepared data (manifest.json); name the directory the model was trained on")
  limit = None if options.memory_gib is None else int(options.memory_gib * 2**30)
  scorer = Scorer(model, mesh, batch_tokens=options.batch_tokens, chunk=options.chunk, prefill_chunk=options.prefill_chunk,
                  memory_bytes=limit)
  return Inputs(
    scorer=scorer, tokenizer=loaded.tokenizer,
    documents=[document[1:] for document in heldout_documents(directory)[:options.max_documents]],
    stream=validation_stream(directory),
    lengths=tuple(sorted({multiple * loaded.config.data.sequence_length for multiple in options.multiples})),
    seed=options.seed, min_documents=options.min_documents, config=loaded.config, model=model, mesh=mesh,
    trials=options.trials, directory=directory)


def _under_caps(inputs: Inputs,
                caps: Sequence[RetentionCap | None]) -> Iterator[tuple[RetentionCap | None, dict[str, Any], Inputs]]:
  """Each cap, the settings it adds to cells, and the inputs under it; "worst" is recorded as the head it stands for."""
  for cap in caps:
    if cap is None:
      yield cap, {}, inputs
      continue
    heads = cap.heads if cap.heads == "all" else ",".join(f"{layer}:{head}" for layer, head in capped_heads(inputs.model, cap))
    model = with_retention_cap(inputs.model, cap)
    yield (cap, {"retention_cap": {"tokens": cap.tokens, "heads": heads}},
           dataclasses.replace(inputs, model=model, scorer=inputs.scorer.for_model(model)))


def _write_plots(records: Sequence[Record], folder: pathlib.Path, title: str, training_length: int) -> None:
  """Writes the plots of all suites and logs where they are."""
  written = []
  for name, suite in all_suites().items():
    own = [record for record in records if record["suite"] == name and is_ok(record)]
    for file, content in (suite.plots(own, title, training_length) if suite.plots and own else {}).items():
      try:
        (folder / file).write_bytes(content)
      except OSError as error:
        raise UserError(f"--output: cannot write {folder / file}: {error.strerror or error}") from error
      written.append(file)
  logging.info("results: %s; plots: %s", folder / "results.jsonl", ", ".join(written) or "none")
