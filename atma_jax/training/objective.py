"""The training loss and its evaluation, without ever storing (B, T, V) logits."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import AuxiliaryConfig
from atma_jax.models.block import Block, Trace
from atma_jax.ops import cross_entropy
from atma_jax.ops.regularizers import draw_sketch, regularizer
from atma_jax.sharding import parts


def language_model_loss(model: nnx.Module, tokens: jax.Array, *, z_loss: float, chunk: int) -> tuple[jax.Array, jax.Array]:
  """Mean loss per target token, and the mean squared log-partition function.

  Args:
    model: an `Atma`.
    tokens: (B, T + 1) int32; the last T of each row are the targets.
    z_loss: weight of the squared log-partition function within the loss.
    chunk: time steps of each sequence whose logits exist at once.
  """
  return _token_loss(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], z_loss, chunk)


def auxiliary_loss(model: nnx.Module, tokens: jax.Array, key: jax.Array, options: AuxiliaryConfig, *, z_loss: float,
                   chunk: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """``(1 - a) L_lm + a L_reg + d L_distractor``, and its terms.

  L_reg is the mean over blocks of the regulariser of their output, all tokens of the call being its rows; L_distractor the
  mean over global mixers. Sketch and random inputs are drawn from `key` and the layer's index, the same for all rows.

  Returns:
    The loss, and ``loss`` (L_lm), ``z``, ``regularizer`` and ``distractor`` (as far as they are on) by name.
  """
  regularize, distract = options.regularizer != "baseline", options.distractors > 0

  def tap(block: Block, trace: Trace, layer: jax.Array) -> dict[str, jax.Array]:
    output, found = trace["output"], {}
    sketch_key, input_key = jax.random.split(jax.random.fold_in(key, layer))
    if regularize:
      sketch = draw_sketch(sketch_key, output.shape[-1], options.sketch)
      found["regularizer"] = regularizer(options.regularizer, output, sketch)
    if distract and hasattr(block.mixer, "distractor_loss"):
      inputs = jax.random.normal(input_key, (options.distractors, output.shape[-1]), output.dtype)
      found["distractor"] = block.mixer.distractor_loss(trace, inputs)
    return found

  hidden, results = model.tapped(tokens[:, :-1], tap)
  loss, z = _token_loss(model, hidden, tokens[:, 1:], z_loss, chunk)
  terms, total = {"loss": loss, "z": z}, loss
  if regularize:
    terms["regularizer"] = jnp.mean(jnp.stack([r["regularizer"] for r in results]))
    total = (1 - options.regularizer_weight) * loss + options.regularizer_weight * terms["regularizer"]
  if distract:
    terms["distractor"] = jnp.mean(jnp.stack([r["distractor"] for r in results if "distractor" in r]))
    total = total + options.distractor_weight * terms["distractor"]
  return total, terms


def _token_loss(model: nnx.Module, hidden: jax.Array, targets: jax.Array, z_loss: float,
                chunk: int) -> tuple[jax.Array, jax.Array]:
  loss, square = cross_entropy(hidden, model.head.kernel[...], model.head.bias[...], targets,
                               jnp.ones(targets.shape, jnp.float32), cap=model.config.logit_cap, z_loss=z_loss, chunk=chunk,
                               parts=parts("sequence"))
  return loss / targets.size, square / targets.size
