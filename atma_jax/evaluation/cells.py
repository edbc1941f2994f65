"""What a suite is made of: cells, each computed as a whole, recorded as a whole and skipped once recorded."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import hashlib
from typing import Any

from flax import nnx
from jax.sharding import Mesh
import numpy as np

from atma_jax.config import Config
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.evaluation.options import BabilongOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.scoring import Scorer

Progress = Callable[[int], None]  # called with the number of tokens just done


@dataclasses.dataclass(frozen=True)
class Cell:
  """Measurements that are computed together.

  Attributes:
    label: for the progress bar.
    expected: the (measure, length), or (measure, length, layer, head), of everything that `run` measures.
    settings: what the numbers depend on besides the checkpoint; JSON-ready. Equal settings mean equal cells.
    tokens: processed by `run`.
    run: computes the cell.
  """

  label: str
  expected: tuple[tuple[Any, ...], ...]
  settings: dict[str, Any]
  tokens: int
  run: Callable[[Progress], list[Measurement]]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What suites build their cells from.

  Attributes:
    documents: held-out documents, each (n,) int32 without end-of-text, the longest first.
    stream: the validation stream, (n,) int32.
    lengths: in tokens, ascending.
    config, model: of the checkpoint, for suites that do more than score rows.
    mesh: the devices that `model` lies on.
    depths: of needles in a haystack, from 0 to 1.
    bpb_span: tokens whose bits per byte are measured; 0 chooses.
    babilong: None unless that suite runs.
  """

  scorer: Scorer
  tokenizer: Tokenizer
  documents: list[np.ndarray]
  stream: np.ndarray
  lengths: tuple[int, ...]
  trials: int
  seed: int
  min_documents: int
  stream_windows: int
  config: Config | None = None
  model: nnx.Module | None = None
  mesh: Mesh | None = None
  depths: tuple[float, ...] = (0.1, 0.5, 0.9)
  bpb_span: int = 0
  babilong: BabilongOptions | None = None


def fingerprint(tokens: np.ndarray) -> str:
  """Short hash of the text that a cell reads."""
  return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:16]
