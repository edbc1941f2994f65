"""Distributed orthogonalisation equals that of one device, however many matrices there are and however they are sharded."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.optimizer import orthogonalize_updates

LAYERS, ROWS, COLUMNS = 3, 16, 32
AXES = {"fc": ("layers", "embed", "mlp"), "tail": ("embed", "mlp"), "out": ("layers", "heads", "embed"),
        "whole": ("layers", None, None), "gate": ("layers", "embed", None)}
SHAPES = {"fc": (LAYERS, ROWS, COLUMNS), "tail": (ROWS, COLUMNS), "out": (LAYERS, ROWS, COLUMNS), "whole": (LAYERS, 8, 16),
          "gate": (LAYERS, ROWS, 8)}


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 4, "context": 2}],
                         ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))
def test_equals_one_device(axes, monkeypatch):
  monkeypatch.setattr("atma_jax.training.distributed_muon.SMALL", 0)
  mesh = make_mesh(**{"data": 1} | axes)
  updates = {name: jax.random.normal(jax.random.key(i), SHAPES[name]) for i, name in enumerate(AXES)}
  transform = orthogonalize_updates("muon", logical_axes=AXES)
  expected = orthogonalize_updates("muon").update(updates, transform.init(updates))[0]
  sharded = {name: jax.device_put(x, named_sharding(mesh, AXES[name])) for name, x in updates.items()}
  with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
    compiled = jax.jit(lambda u: transform.update(u, transform.init(u))[0]).lower(sharded).compile()
    result = compiled(sharded)
  for name, x in result.items():
    # Singular values end at 1 whatever happens on the way; twelve steps of products of length 32 round at 2^-24 each.
    np.testing.assert_allclose(x, expected[name], atol=2e-5, err_msg=name)
    assert x.sharding.is_equivalent_to(sharded[name].sharding, x.ndim), name
  # No device receives more than its share: of a stack, one matrix for each of the devices that share it, or all over them.
  split = mesh.shape["fsdp"] * mesh.shape["tensor"]
  for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-to-all\(", compiled.as_text()):
    assert math.prod(map(int, shape.split(","))) <= 2 * max(1, (LAYERS + 1) / split) * ROWS * COLUMNS, shape
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in result.values())
