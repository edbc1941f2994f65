"""Scores on eight devices, in one pass or in pieces, equal those on one device."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atma_jax.config import ModelConfig
from atma_jax.evaluation.scoring import Scorer
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition, params_of
from atma_jax.sharding import make_mesh

CONFIG = ModelConfig(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                     block_pattern=("local", "global"), activation_dtype="float32")
POSITIONS = np.array([1, 2, 30, 47, 60])


def test_scores_do_not_depend_on_the_mesh():
  """Meshes that split parameters, rows and time; rows in one pass and in pieces."""
  rng = np.random.default_rng(1)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
  model = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.3, jnp.float32), params))
  rows = rng.integers(0, 64, (5, 62)).astype(np.int32)
  positions = np.broadcast_to(POSITIONS, (5, 5))

  def scores(model: Atma, mesh: jax.sharding.Mesh, piece: int) -> tuple[np.ndarray, np.ndarray]:
    scorer = Scorer(model, mesh, batch_tokens=64, chunk=16, prefill_chunk=piece)
    found = list(scorer.at_positions(rows, positions))
    losses = np.concatenate(list(scorer.losses(rows)))
    assert losses.shape == (5, 61)
    np.testing.assert_array_equal(np.concatenate([p for _, p in found]).shape, (5, 5))
    return losses, np.concatenate([loss for loss, _ in found])

  losses, chosen = scores(model, make_mesh(devices=jax.devices()[:1]), 1024)
  np.testing.assert_allclose(chosen, losses[:, POSITIONS - 1], atol=2e-5)
  definition = ModelDefinition(CONFIG)
  for axes, piece in (({"data": 2, "fsdp": 2, "tensor": 2}, 24), ({"data": 4, "context": 2}, 16)):
    mesh = make_mesh(**axes)
    abstract = definition.abstract_params(mesh)
    sharded = definition.merge({name: jax.device_put(value, abstract[name].sharding) for name, value in params_of(model).items()})
    for one, eight in zip((losses, chosen), scores(sharded, mesh, piece)):
      np.testing.assert_allclose(eight, one, atol=5e-5, err_msg=str(axes))
