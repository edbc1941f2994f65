"""Mixers: how a block moves information between tokens. One file a kind, found by its name (`atma_jax.config.MIXERS`).

A file holds everything that is the mixer's: the module, the cache of a layer, the operations it costs and how it starts. A mixer
may as well be defined elsewhere, such as in a notebook: the decorator makes its kind legal in ``config.model.block_pattern``, and
it trains, is saved, restored and decodes like the others. It is to be registered before a configuration or a checkpoint that
names it is read.

    @register_mixer("decay")
    class DecayMixer(Mixer):
      ...
"""

from __future__ import annotations

from collections.abc import Callable
import importlib
from typing import TYPE_CHECKING, ClassVar, TypeVar

from flax import nnx
from jaxtyping import Array, Float

from atma_jax.config import MIXERS, ModelConfig

if TYPE_CHECKING:
  from atma_jax.models.cache import LayerCache, Rings, TokenSpan
  from atma_jax.models.layers import LinearSum
  from atma_jax.models.memory import Memory

Trace = dict[str, Array]
"""Arrays of one block by name: its ``input`` and ``output`` (B, T, C), ``mixer_input`` (its normed input, B, T, C), and what its
mixer and the mixer's memory put there."""


class Mixer(nnx.Module):
  """The interface of a mixer: ``Mixer(config, rngs=rngs)`` maps (B, T, C) to (B, T, C), causally."""

  accepts_padded_rows: ClassVar[bool] = False
  """Whether decoding may pass more rows than the span has, which fill the smallest tile of a GPU's matrix units. The mixer drops
  them as soon as it has multiplied; its output may have only the rows of the span."""

  accepts_documents: ClassVar[bool] = False
  """Whether calls over whole sequences may pass ``starts``, the positions at which each token's document starts in rows that pack
  several (`atma_jax.ops.document_starts`). Nothing of a document may then reach another one."""

  memory: Memory | None = None  # the gated-delta memory beside the mixer, if there is one
  foreign_keys: int = 0  # keys of other rows that attention over whole sequences sees before a row's own, see `ModelDefinition`

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    raise NotImplementedError

  def __call__(self, x: Float[Array, "B T C"], cache: LayerCache | None = None, span: TokenSpan | None = None,
               trace: Trace | None = None) -> tuple[Array | LinearSum, LayerCache | None]:
    """Mixes whole sequences, or T new tokens that follow cached ones.

    Args:
      x: the normed residual stream, in the activation dtype.
      cache: what `init_cache` made and earlier calls updated; None for whole sequences.
      span: where the new tokens stand, with a cache. Padding may not change the cache, whatever comes of it otherwise.
      trace: receives intermediate arrays by name, for taps and auxiliary losses.

    A mixer that `accepts_documents` takes ``starts`` (B, T) besides; it is passed only in training with document masks.

    Returns:
      The output (B, T, C), and the update of the cache (see `LayerCache`), or None without one.
    """
    raise NotImplementedError

  @classmethod
  def init_cache(cls, config: ModelConfig, batch: int, rings: Rings) -> LayerCache:
    """The cache of one layer before the first token, its arrays (batch, ...); `rings` is for mixers that keep keys and values."""
    raise NotImplementedError

  @classmethod
  def operations(cls, config: ModelConfig, sequence_length: int) -> float:
    """Operations a token of a forward pass over whole sequences, besides matrix products with parameters and filters."""
    del config, sequence_length
    return 0.0

  def fuse_projections(self) -> None:
    """Replaces matrices that belong together by one, for unrolled decoding; by default there are none."""

  def distractor_loss(self, trace: Trace, inputs: Float[Array, "R C"]) -> Float[Array, ""] | None:
    """The loss for random `inputs` that no query should find (see `atma_jax.config.AuxiliaryConfig`), or None by default."""
    del trace, inputs
    return None


M = TypeVar("M", bound=type[Mixer])
_CLASSES: dict[str, type[Mixer]] = {}


def register_mixer(kind: str) -> Callable[[M], M]:
  """Class decorator that makes a mixer available as `kind`; a cell of a notebook may be run again.

  Args:
    kind: its name in ``config.model.block_pattern``.

  Returns:
    The decorator, which returns the class as it is.

  Raises:
    ValueError: the kind is that of a mixer in another module.

  Example:
    >>> from atma_jax.models.mixers import MIXERS, Mixer
    >>> NoMixer = register_mixer("nothing")(type("NoMixer", (Mixer,), {"__module__": "notebook"}))
    >>> MIXERS.pop("nothing")
    'notebook'
  """
  def register(cls: M) -> M:
    if MIXERS.setdefault(kind, cls.__module__) != cls.__module__:
      raise ValueError(f"mixer {kind!r} of {cls.__module__}: the name is taken by {MIXERS[kind]}")
    _CLASSES[kind] = cls
    return cls

  return register


def without_documents(config: ModelConfig) -> str | None:
  """The first kind of mixer in a model that lets the documents of a row see each other, or None."""
  return next((kind for kind in config.layer_kinds if not mixer_class(kind).accepts_documents), None)


def mixer_class(kind: str) -> type[Mixer]:
  """The class of a kind of mixer.

  Raises:
    ValueError: there is no such kind.
  """
  if kind not in MIXERS:
    raise ValueError(f"mixer {kind!r} does not exist; legal: {', '.join(MIXERS)}")
  if kind not in _CLASSES:
    importlib.import_module(MIXERS[kind])
  return _CLASSES[kind]
