"""What polar attention is told besides q, k and v: learned parameters, and which keys count.

A new per-head scalar is one field of `PolarParams` here, its use in `formula`, its place in the flat signatures of `api` and, if
published weights call it otherwise, its name in `atma_jax.pytorch.published_tensors`. Modules, kernels, rings, caches, sharding
and benchmarks are generic over the fields.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from atma_jax.ops.core import visibility


def _identity(x: jax.Array) -> jax.Array:
  return x


def _scalar(initial: float, transform: Callable[[jax.Array], jax.Array] = _identity) -> dict[str, Any]:
  """Marks a field as one number per head, which starts at `initial` and enters the formula as ``transform(raw)``."""
  return {"initial": initial, "transform": transform}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolarParams:
  """The raw learned parameters of polar attention (arXiv 2606.25156); a pytree.

  Attributes:
    v_null: the value that the null contributes.
    null_base: logit of the null before it grows with the number of visible keys.
    null_slope: raw rate of that growth.
    len_gain: raw rate at which the temperature grows with the logarithm of the number of visible keys.
    mag_beta: raw rate of the magnitude.
  """

  v_null: Float[Array, "H D"]
  null_base: Float[Array, " H"] = dataclasses.field(metadata=_scalar(2.0))
  null_slope: Float[Array, " H"] = dataclasses.field(metadata=_scalar(0.5, jax.nn.softplus))
  len_gain: Float[Array, " H"] = dataclasses.field(metadata=_scalar(-1.0, jax.nn.softplus))
  mag_beta: Float[Array, " H"] = dataclasses.field(metadata=_scalar(-1.5, jax.nn.softplus))

  def scalars(self, dtype: Any = None) -> Scalars:
    """The scalars as the formula takes them, (H,) each: cast to `dtype` if one is given, then transformed."""
    raw = (getattr(self, scalar.name) for scalar in SCALARS)
    cast = (x if dtype is None else x.astype(dtype) for x in raw)
    return Scalars(*(scalar.transform(x) for scalar, x in zip(SCALARS, cast, strict=True)))

  @classmethod
  def initial(cls, heads: int, dim: int, dtype: Any = jnp.float32) -> PolarParams:
    """Parameters as training starts from them."""
    return cls(jnp.zeros((heads, dim), dtype), **{s.name: jnp.full((heads,), s.initial, dtype) for s in SCALARS})


@dataclasses.dataclass(frozen=True)
class Scalar:
  """One per-head scalar: the name of its field, its raw value at the start, and what the formula takes of a raw value."""

  name: str
  initial: float
  transform: Callable[[jax.Array], jax.Array]


SCALARS = tuple(Scalar(field.name, **field.metadata) for field in dataclasses.fields(PolarParams) if field.metadata)
Scalars = collections.namedtuple("Scalars", [scalar.name for scalar in SCALARS])  # the transformed scalars, by name


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Which keys a query sees and how they are counted; static, hashable.

  Attributes:
    window: keys a query may see, its own included; None is all up to its own.
    null_length: visible keys N at which the null's logit stops growing: ``sqrt(log(min(n_i, N) + 1))`` takes the place of
      ``sqrt(log(n_i + 1))``; None is the paper's.
    count_length: visible keys N past which the null and the magnitude are told n_i relative to N, which changes nothing up to
      it. The null's logit is that of N keys, at the temperature of N keys, plus ``log(n_i / N)``: its share stands against n_i
      unmatched keys as it did against N. The magnitude's log(1 + m) is multiplied by ``log(1 + N) / log(1 + n_i)``, and so
      keeps within what N keys can make it. None is the paper's.

  Raises:
    ValueError: a length below 1.
  """

  window: int | None = None
  null_length: int | None = None
  count_length: int | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and value < 1:
        raise ValueError(f"{field.name}={value} must be at least 1, or None")

  def sees(self, distance: Int[Array, " ..."]) -> jax.Array:
    """Whether a query sees a key that lies `distance` positions before it."""
    return visibility.sees(distance, self.window)

  def visible_keys(self, position: Int[Array, " ..."]) -> jax.Array:
    """How many keys the query at `position`, from 0, sees."""
    return visibility.visible_keys(position, self.window)
