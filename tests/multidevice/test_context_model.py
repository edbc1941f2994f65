"""A model on a mesh with a context axis equals the model on one device, and never gathers a sequence."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.errors import UserError
from atma_jax.evaluation.api import evaluate
from atma_jax.evaluation.scoring import Scorer
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.objective import language_model_loss

T, B, WIDTH = 80, 2, 16  # no weight has a dimension of T or B T
BASE = {"vocab_size": 64, "num_layers": 2, "width": WIDTH, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 32,
        "block_pattern": ("local", "global"), "activation_dtype": "float32"}
CASES = {  # options of the model, axes of the mesh
  "polar-scan-dots": ({"remat": "dots"}, {"context": 8}),
  "polar-window-block": ({"window": 7, "remat": "block", "scan": False, "num_layers": 3}, {"context": 4}),
  "nope": ({"attention": "nope", "memory": MemoryConfig(enabled=False)}, {"context": 2, "fsdp": 2}),
  "rope-dots": ({"attention": "rope", "remat": "dots", "num_kv_heads": 1}, {"context": 2, "tensor": 2}),
}


@functools.cache
def tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 64, (B, T + 1)).astype(np.int32)


def parameters(definition, mesh):
  """Random parameters, none of which is zero."""
  return {name: jax.device_put(0.3 * np.random.default_rng(i).normal(size=value.shape).astype(np.float32), value.sharding)
          for i, (name, value) in enumerate(sorted(definition.abstract_params(mesh).items()))}


def program(options, axes):
  """The compiled loss and gradients of a model on a mesh, and their arguments."""
  mesh = make_mesh(**{"data": 1} | axes, devices=jax.devices()[:int(np.prod(list(axes.values()) or [1]))])
  definition = ModelDefinition(ModelConfig(**BASE | options))
  params = parameters(definition, mesh)
  batch = jax.device_put(tokens(), named_sharding(mesh, ("batch", None)))

  def loss(params, tokens):
    return language_model_loss(definition.merge(params), tokens, z_loss=1e-4, chunk=5)[0]

  with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
    return jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile(), (params, batch)


def gathered(compiled, length: int = T) -> list[list[int]]:
  """Shapes of the all-gathers whose results hold activations of a whole sequence: at least WIDTH numbers per time step."""
  results = re.findall(r"= (.*?) all-gather(?:-start)?\(", compiled.as_text())
  shapes = [[int(n) for n in shape.split(",") if n] for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
  return [shape for shape in shapes if {length, B * length} & set(shape) and math.prod(shape) >= length * WIDTH]


@pytest.mark.parametrize("case", [
  pytest.param(case, marks=() if case == "polar-scan-dots" else pytest.mark.slow) for case in CASES])
def test_loss_and_gradients_equal_one_device(case):
  options, axes = CASES[case]
  compiled, args = program(options, axes)
  alone, alone_args = program(options | {"implementation": "reference"}, {})
  (loss, gradients), (expected_loss, expected) = compiled(*args), alone(*alone_args)
  np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
  # Sums of up to 160 tokens, 80 keys or 32 channels, rounded at 2^-24, pass through a dozen normalised layers.
  for name, value in gradients.items():
    scale = float(jnp.abs(expected[name]).max())
    np.testing.assert_allclose(value, expected[name], atol=4e-5 * max(scale, 1e-3), err_msg=name)
  assert not gathered(compiled)  # no device ever holds activations, scores or logits of the whole sequence


def test_scores_of_any_length_equal_one_device():
  definition = ModelDefinition(ModelConfig(**BASE))
  rows, positions = tokens()[:, :22], np.array([[1, 9], [20, 21]])

  def scores(**axes):
    mesh = make_mesh(**{"data": 1} | axes, devices=jax.devices()[:int(np.prod(list(axes.values()) or [1]))])
    scorer = Scorer(definition.merge(parameters(definition, mesh)), mesh, batch_tokens=64, chunk=5)
    with jax.default_matmul_precision("highest"):
      losses, = scorer.losses(rows)
      (at, predictions), = scorer.at_positions(rows, positions)
    assert axes == {} or not any(gathered(compiled, 24) for compiled, _ in scorer._compiled.values())
    return losses, at, predictions

  for one, several in zip(scores(), scores(data=2, context=4), strict=True):
    np.testing.assert_allclose(several, one, atol=2e-5)


def test_a_context_axis_that_does_not_fit_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"--context=3: mesh .*context=3 does not fit 8 devices"):
    evaluate("nowhere", str(tmp_path), context=3)
