"""What an evaluation suite is: the cells it measures, the flags it takes, and how its numbers are shown.

Every file of `atma_jax.evaluation.suites` defines one `Suite` under the name ``SUITE``; nothing else has to know of it. This
module imports no JAX, so that the workers of a sweep can read the defaults of a suite's flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import pathlib
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
import numpy as np

from atma_jax.config import Config
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement, Record

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from atma_jax.evaluation.report.runs import Run
  from atma_jax.evaluation.scoring import Scorer
  from atma_jax.models import Atma

Progress = Callable[[int], object]  # called with the number of tokens that were just processed


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What every suite builds its cells from.

  Attributes:
    scorer: computes losses and predictions of `model`.
    tokenizer: of the checkpoint.
    documents: held-out documents without their end-of-text tokens, longest first.
    stream: the validation documents, concatenated.
    lengths: context lengths in tokens, ascending.
    seed: of everything that a suite draws at random.
    min_documents: fewest documents that are as long as the longest length.
    config: of the checkpoint.
    model: for suites that do more than score rows.
    mesh: the devices that `model` is placed on.
    directory: of the prepared data; None where a suite has been given documents only.
    trials: of every cell of the retrieval suites.
  """

  scorer: Scorer
  tokenizer: Tokenizer
  documents: Sequence[Int[np.ndarray, " n"]]
  stream: Int[np.ndarray, " n"]
  lengths: tuple[int, ...]
  seed: int
  min_documents: int
  config: Config
  model: Atma
  mesh: Mesh
  trials: int
  directory: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
  """A group of measurements that are computed, recorded and skipped together.

  Attributes:
    label: shown by the progress bar.
    expected: the (measure, length) or (measure, length, layer, head) of every measurement that `run` returns.
    settings: everything the numbers depend on besides the checkpoint, JSON-ready. Cells with equal settings are equal.
    tokens: how many tokens `run` processes.
    run: computes the cell.
  """

  label: str
  expected: tuple[tuple[Any, ...], ...]
  settings: dict[str, Any]
  tokens: int
  run: Callable[[Progress], list[Measurement]]


@dataclasses.dataclass(frozen=True)
class Suite:
  """One evaluation suite.

  Attributes:
    help: what it measures, in one line of ``--help``.
    cells: ``cells(inputs, options) -> list of Cell``; raises `UserError` when the data or the options do not allow it.
    options: a frozen dataclass, all of whose fields have defaults. Each field is a flag of the same name.
    columns: measures that are columns of the printed table, in order.
    settings: how the report words those cell settings that tell measurements of equal measure and length apart.
    table: ``table(records of the suite) -> text`` for what does not fit into columns.
    plots: ``plots(records of the suite without failures, title, training length) -> {file name: PNG}``.
    sections: ``{heading: section(runs) -> HTML, or "" for none}`` of the report.
    schema: of its records, as `atma_jax.json_input.mismatch` takes it: the fields that its tables and figures rely on, beyond
      those of every record. Records that do not match are left out of reports.
    order: suites are shown in ascending order, ties by name.
  """

  help: str
  cells: Callable[[Inputs, Any], list[Cell]]
  options: type[CheckedOptions] = CheckedOptions
  columns: tuple[str, ...] = ()
  settings: Mapping[str, Callable[[Any], str]] = dataclasses.field(default_factory=dict)
  table: Callable[[Sequence[Record]], str] | None = None
  plots: Callable[[Sequence[Record], str, int], dict[str, bytes]] | None = None
  sections: Mapping[str, Callable[[Sequence[Run]], str]] = dataclasses.field(default_factory=dict)
  schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  order: int = 1000


def fingerprint(tokens: Int[np.ndarray, " ..."]) -> str:
  """A short hash of the text that a cell reads."""
  return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:16]
