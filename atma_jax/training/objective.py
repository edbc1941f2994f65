"""Training objectives, computed without ever storing (B, T, V) logits."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from atma_jax.config import AuxiliaryConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.models.block import Block, Trace
from atma_jax.ops import document_starts
from atma_jax.ops.regularizers import draw_sketch, regularizer


def language_model_loss(model: Atma, tokens: Int[Array, "B T+1"], weights: Float[Array, "B T"] | None = None, *,
                        z_loss: float = TrainConfig.z_loss, chunk: int = TrainConfig.loss_chunk,
                        first_token: int | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The next-token loss, differentiable in the model's parameters.

  Args:
    model: the network.
    tokens: the inputs are the first T of each row, the targets the last T.
    weights: of the targets' losses in the mean; None is 1 for all.
    z_loss: weight of the squared log-partition function in the loss.
    chunk: time steps of each sequence whose logits exist at once.
    first_token: the token that documents start with, end-of-text, to keep the documents of a row apart. Every target still
      counts: a document's last token predicts the end-of-text after it, and the first token of the next is predicted from that
      end-of-text alone. None makes one document of every row.

  Returns:
    The mean loss per target token, in nats, and the mean squared log-partition function.

  Raises:
    AssertionError: tokens that are not of two axes, or not integers.

  Example:
    >>> model = atma_jax.Atma(Config().model, rngs=nnx.Rngs(0))
    >>> tokens = jnp.zeros((2, 65), jnp.int32)
    >>> loss, _ = nnx.jit(language_model_loss)(model, tokens)
  """
  chex.assert_rank(tokens, 2)
  inputs = tokens[:, :-1]
  hidden = model.hidden(inputs, _starts(inputs, first_token))
  return _token_loss(model, hidden, tokens[:, 1:], weights, z_loss, chunk)


def auxiliary_loss(model: Atma, tokens: Int[Array, "B T+1"], key: Key[Array, ""], options: AuxiliaryConfig,
                   weights: Float[Array, "B T"] | None = None, *, z_loss: float, chunk: int,
                   first_token: int | None = None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """The next-token loss combined with auxiliary objectives, ``(1 - a) L_lm + a L_reg + d L_distractor``.

  L_reg is the mean over blocks of the regulariser of the block's output, whose rows are all tokens of the call. L_distractor is
  the mean over mixers that have a distractor loss. Sketch and random inputs are drawn from `key` and the index of the layer, and
  are the same for all rows.

  Args:
    model: the network.
    tokens: the inputs are the first T of each row, the targets the last T.
    key: what everything random is drawn from.
    options: which objectives are on, and their weights.
    weights: of the targets' losses in L_lm; None is 1 for all.
    z_loss: weight of the squared log-partition function in L_lm.
    chunk: time steps of each sequence whose logits exist at once.
    first_token: as for `language_model_loss`; without distractors.

  Returns:
    The combined loss, and its terms by name: ``loss`` (L_lm), ``z``, and ``regularizer`` and ``distractor`` if they are on.
  """
  chex.assert_rank(tokens, 2)
  regularize, distract = options.regularizer != "baseline", options.distractors > 0

  def tap(block: Block, trace: Trace, layer: Int[Array, ""]) -> dict[str, Float[Array, ""]]:
    output, found = trace["output"], {}
    sketch_key, input_key = jax.random.split(jax.random.fold_in(key, layer))
    if regularize:
      sketch = draw_sketch(sketch_key, output.shape[-1], options.sketch)
      found["regularizer"] = regularizer(options.regularizer, output, sketch)
    if distract:
      inputs = jax.random.normal(input_key, (options.distractors, output.shape[-1]), output.dtype)
      if (distractor_loss := block.mixer.distractor_loss(trace, inputs)) is not None:
        found["distractor"] = distractor_loss
    return found

  inputs = tokens[:, :-1]
  hidden, results = model.tapped(inputs, tap, _starts(inputs, first_token))
  loss, z = _token_loss(model, hidden, tokens[:, 1:], weights, z_loss, chunk)
  terms, total = {"loss": loss, "z": z}, loss
  if regularize:
    terms["regularizer"] = jnp.mean(jnp.stack([r["regularizer"] for r in results]))
    total = (1 - options.regularizer_weight) * loss + options.regularizer_weight * terms["regularizer"]
  if distract:
    distractor_losses = [r["distractor"] for r in results if "distractor" in r]
    if not distractor_losses:
      raise UserError(f"config.train.auxiliary.distractors={options.distractors}: must be 0, because no mixer has such a loss")
    terms["distractor"] = jnp.mean(jnp.stack(distractor_losses))
    total = total + options.distractor_weight * terms["distractor"]
  return total, terms


def _starts(tokens: Int[Array, "B T"], first_token: int | None) -> Int[Array, "B T"] | None:
  return None if first_token is None else document_starts(tokens, first_token)


def _token_loss(model: Atma, hidden: Float[Array, "B T C"], targets: Int[Array, "B T"], weights: Float[Array, "B T"] | None,
                z_loss: float, chunk: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
  loss, square = model.next_token_loss(hidden, targets, weights, z_loss=z_loss, chunk=chunk)
  return loss / targets.size, square / targets.size
