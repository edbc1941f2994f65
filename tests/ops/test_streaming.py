"""The statistics of attention over disjoint sets of keys merge exactly, whatever the sets."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from atma_jax.ops.core import streaming


def test_merging_disjoint_keys_is_exact():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 1, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8)))
  scale = jnp.full((1, 4), 0.3)
  whole = streaming.attention_statistics(q, k, v, scale)
  parts = [streaming.attention_statistics(q, k[:, s], v[:, s], scale) for s in (slice(0, 13), slice(13, 40))]
  for merged in (streaming.merge(*parts), streaming.merge(*parts[::-1])):
    for a, b in zip(whole, merged, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
