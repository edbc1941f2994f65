"""A model on a mesh with a context axis equals the model on one device, and never gathers a sequence."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.losses import language_model_loss
from atma_jax.training.state import ModelDefinition

T, B, WIDTH = 48, 2, 16
BASE = {"vocab_size": 64, "num_layers": 3, "width": WIDTH, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 32,
        "block_pattern": ("local", "global"), "activation_dtype": "float32"}
CASES = {  # options of the model, axes of the mesh
  "polar-scan-dots": ({"remat": "dots"}, {"context": 8}),
  "polar-window-block": ({"window": 7, "remat": "block", "scan": False}, {"context": 4}),
  "nope": ({"attention": "nope", "memory": MemoryConfig(enabled=False)}, {"context": 2, "fsdp": 2}),
  "rope-dots": ({"attention": "rope", "remat": "dots", "num_kv_heads": 1}, {"context": 2, "tensor": 2}),
}


@functools.cache
def tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 64, (B, T + 1)).astype(np.int32)


def program(options, axes):
  """The compiled loss, hidden and gradients on a mesh, and its arguments."""
  mesh = make_mesh(**{"data": 1} | axes, devices=jax.devices()[:int(np.prod(list(axes.values()) or [1]))])
  definition = ModelDefinition(ModelConfig(**BASE | options))
  params = {name: jax.device_put(0.3 * np.random.default_rng(i).normal(size=value.shape).astype(np.float32), value.sharding)
            for i, (name, value) in enumerate(sorted(definition.abstract_params(mesh).items()))}
  batch = jax.device_put(tokens(), named_sharding(mesh, ("batch", None)))

  def loss(params, tokens):
    model = definition.merge(params)
    return language_model_loss(model, tokens, z_loss=1e-4, chunk=5)[0], model.hidden(tokens[:, :-1])

  with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile(), (params, batch)


@pytest.mark.parametrize("case", CASES)
def test_hidden_loss_and_gradients_equal_one_device(case):
  options, axes = CASES[case]
  (compiled, args), (alone, alone_args) = program(options, axes), program(options, {})
  (loss, hidden), gradients = compiled(*args)
  (expected_loss, expected_hidden), expected = alone(*alone_args)
  np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
  # The final norm makes entries of order 1, each from sums of up to 48 x 32 products rounded at 2^-24: 4e-5 leaves a factor ten.
  np.testing.assert_allclose(hidden, expected_hidden, atol=4e-5)
  for name, value in gradients.items():
    scale = float(jnp.abs(expected[name]).max())
    np.testing.assert_allclose(value, expected[name], atol=4e-5 * max(scale, 1e-3), err_msg=name)
  # No device ever holds the activations of all T steps: sizes of all T steps appear for tokens only.
  gathered = re.findall(r"= (\S+) all-gather\(", compiled.as_text())
  assert not [shape for shape in gathered if re.search(rf"\b{T}\b", shape)], gathered
