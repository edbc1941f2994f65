"""What the published code cannot compute: the fields of a model that a file in its format does not carry over to it.

The public loaders read the fields that they know and ignore the rest. So these are carried: sizes, the attention core, window,
taps, the biases of the memory's gates, and for Raven slots and top_k. The rest is fixed in the public code. A model with another
value can be written only in fields and tensor names of this package (``--lossy``), which this package reads back and the public
code ignores, or refuses to load.
"""

from __future__ import annotations

from flax import nnx

from atma_jax.config import ModelConfig, shown
from atma_jax.models import Atma
from atma_jax.models.memory import LogGammaCap
from atma_jax.pytorch.published_raven import raven_name

ATMA_PATTERN = ("local", "local", "global", "local")
_LOGIT_CAP, _NORM_EPS, _MLP_RATIO, _KV_GROUP = 15.0, 1e-6, 4, 4  # what the public code has
_DTYPES = ("bfloat16", "float16", "float32")  # that it computes in


def published_layers(model: ModelConfig) -> str | None:
  """Returns what the public code calls the layers of a model: "atma", a Raven baseline's name, or None if it has no name."""
  kinds = tuple(ATMA_PATTERN[layer % len(ATMA_PATTERN)] for layer in range(model.num_layers))
  return "atma" if model.layer_kinds == kinds else raven_name(model)


def uncarried(model: Atma) -> list[str]:
  """Returns the fields of a model that the public code would not compute, each as "field=value (there: what it has)"."""
  found = uncarried_fields(model.config)
  if nnx.to_flat_state(nnx.state(model, LogGammaCap)):
    found.append("retention_cap (there: none)")
  return found


def uncarried_fields(m: ModelConfig) -> list[str]:
  """Returns what `uncarried` does, for a configuration."""
  kinds, name = set(m.layer_kinds), published_layers(m)
  found: list[str] = []

  def compare(field: str, value: object, public: object, what: str = "") -> None:
    if value != public:
      found.append(f"config.model.{field}={shown(value)} (there: {what or repr(public)})")

  if name is None and kinds == {"raven"}:
    compare("memory.enabled", m.memory.enabled, False, "False where every block is raven")
  elif name is None:
    compare("block_pattern", m.block_pattern, None, f"{ATMA_PATTERN!r}, raven in place of global, or raven alone")
  compare("logit_cap", m.logit_cap, _LOGIT_CAP)
  compare("norm_eps", m.norm_eps, _NORM_EPS)
  compare("mlp_width", m.mlp_width, _MLP_RATIO * m.width)
  if m.activation_dtype not in _DTYPES:
    compare("activation_dtype", m.activation_dtype, None, " or ".join(_DTYPES))
  if kinds - {"local"} and m.num_heads * m.head_dim != m.width:
    compare("num_heads", m.num_heads, None, f"config.model.width={m.width} / config.model.head_dim={m.head_dim}")
  if "global" in kinds:
    compare("num_kv_heads", m.num_kv_heads, m.num_heads // _KV_GROUP)
  if "global" in kinds and m.attention == "polar":
    compare("null_length", m.null_length, None)
    compare("count_length", m.count_length, None)
    compare("direction_scale", m.direction_scale, 1.0)
  if m.memory.enabled and kinds - {"local"}:
    compare("memory.max_half_life", m.memory.max_half_life, None)
    compare("memory_reset", m.memory_reset, None)
    compare("memory_off", m.memory_off, False)
  return found
