"""The model: parameter counts, causality, scanning, rematerialisation, taps, initialisation and metadata."""

from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.models import Atma, count_parameters, parameter_metadata
from atma_jax.models.cache import Cache
from atma_jax.models.layers import head_norm
from atma_jax.models.mixers.attention import AttentionMixer
from atma_jax.models.residual import ResidualStream
from atma_jax.ops import short_conv

TINY = ModelConfig(vocab_size=61, num_layers=4, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48,
                   activation_dtype="float32")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 33)).astype(np.int32)


def tiny(**changes) -> ModelConfig:
  return dataclasses.replace(TINY, **changes)


def loss_of(graphdef, params, tokens):
  model = nnx.merge(graphdef, params)
  loss, _ = model.next_token_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk=16)
  return loss / tokens[:, 1:].size


@pytest.mark.parametrize("attention, memory, millions", [
  ("polar", True, 378.22), ("polar", False, 369.76), ("nope", True, 378.18), ("nope", False, 369.72)])
def test_published_parameter_counts(attention, memory, millions):
  config = ModelConfig(attention=attention, memory=MemoryConfig(enabled=memory))
  assert round(count_parameters(config) / 1e6, 2) == millions


@pytest.mark.parametrize("attention", ["polar", "nope", "rope"])
@pytest.mark.parametrize("window", [None, 5])
def test_causal_by_gradient(attention, window):
  config = tiny(attention=attention, window=window, init="published")
  model = Atma(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  graphdef, params = nnx.split(model, nnx.Param)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.2, p.dtype), params)  # nothing is zero
  model = nnx.merge(graphdef, params)
  embedded = model.embed(TOKENS[:1])

  def output_at(x, t):
    groups, stacked = nnx.split(model.groups)
    y, _ = jax.lax.scan(lambda x, p: (nnx.merge(groups, p)(ResidualStream(x))[0].value, None), x, stacked)
    return jnp.sum(y[:, t] ** 2)

  gradient = jax.grad(output_at)(embedded, 12)
  per_step = np.abs(np.asarray(gradient)).sum((0, 2))
  assert np.all(per_step[13:] == 0) and np.all(per_step[: 13] > 0)


def test_direction_scale_is_that_of_the_projection():
  """A scale of 4 is the published model with an output projection 4 times as large; magnitudes and memory do not depend on it."""
  published, scaled = (Atma(tiny(direction_scale=scale), rngs=nnx.Rngs(0)) for scale in (1.0, 4.0))
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.2, p.dtype), nnx.state(published, nnx.Param))
  nnx.update(published, params)
  nnx.update(scaled, params)
  kernel = published.groups.blocks[2].mixer.out_proj.kernel
  assert not np.allclose(published(TOKENS), scaled(TOKENS), atol=1e-2)
  kernel[...] = kernel[...] * 4  # a power of two: nothing rounds
  np.testing.assert_allclose(published(TOKENS), scaled(TOKENS), rtol=1e-6, atol=1e-6)


def test_incomplete_repetition_and_depth():
  for layers in (1, 3, 6, 9):
    assert Atma(tiny(num_layers=layers), rngs=nnx.Rngs(0))(TOKENS).shape == (2, 33, 61)


@pytest.mark.parametrize("tokens, message", [(TOKENS[0], r"of shape \(B, T\)"), (TOKENS / 2, "must be integers")])
def test_what_is_no_batch_of_tokens_is_refused(tokens, message):
  model = nnx.eval_shape(lambda: Atma(TINY, rngs=nnx.Rngs(0)))
  with pytest.raises(AssertionError, match=message):
    model(tokens)
  with pytest.raises(AssertionError, match=message):
    model.extend(tokens, Cache.create(TINY, 2, 64))


def test_one_step_sequence():
  assert np.isfinite(np.asarray(Atma(TINY, rngs=nnx.Rngs(0))(TOKENS[:, :1]))).all()


@pytest.mark.parametrize("remat, scan", [
  pytest.param("dots", True, marks=pytest.mark.slow), pytest.param("block", True, marks=pytest.mark.slow), ("dots", False)])
def test_rematerialisation_and_inlining_change_nothing(remat, scan):
  def gradients(config):
    graphdef, params = nnx.split(Atma(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda p: p + 0.01, params)
    return jax.tree.leaves(jax.jit(jax.grad(loss_of, argnums=1), static_argnums=0)(graphdef, params, TOKENS))

  for a, b in zip(gradients(TINY), gradients(tiny(remat=remat, scan=scan)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan, remat", [(True, "none"), pytest.param(False, "block", marks=pytest.mark.slow)])
def test_tap_sees_every_layer_in_order_and_changes_nothing(scan, remat):
  """With 6 layers: one scanned group of four and a tail of two."""
  model = Atma(tiny(num_layers=6, scan=scan, remat=remat), rngs=nnx.Rngs(0))

  def tap(block, trace, layer):
    norm = jnp.sum(jnp.square(trace["output"]))
    return {"layer": layer, "output": norm} | ({"gamma": jnp.max(trace["log_gamma"])} if "log_gamma" in trace else {})

  def total(model, tapped):
    hidden, results = model.tapped(TOKENS, tap) if tapped else (model.hidden(TOKENS), [])
    return jnp.sum(hidden**2), (hidden, results)

  compute = nnx.jit(nnx.grad(total, has_aux=True), static_argnums=1)
  (gradient, (hidden, results)), (plain_gradient, (plain, _)) = compute(model, True), compute(model, False)
  np.testing.assert_allclose(hidden, plain, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, plain_gradient)
  assert [int(r["layer"]) for r in results] == list(range(6))
  assert [("gamma" in r) for r in results] == [False, False, True, False, False, False]
  assert all(float(r["output"]) > 0 for r in results)


def dead_after_two_steps(init: str) -> set[str]:
  graphdef, params = nnx.split(Atma(tiny(init=init), rngs=nnx.Rngs(0)), nnx.Param)
  optimizer = optax.sgd(0.3)
  state = optimizer.init(params)
  gradient = jax.jit(jax.grad(loss_of, argnums=1), static_argnums=0)
  for _ in range(2):
    updates, state = optimizer.update(gradient(graphdef, params, TOKENS), state)
    params = optax.apply_updates(params, updates)
  flat = nnx.to_flat_state(gradient(graphdef, params, TOKENS))
  return {".".join(map(str, path)) for path, g in flat if not np.any(np.asarray(g[...]))}


@pytest.mark.parametrize("init", ["default", "mimetic"])
def test_every_parameter_is_alive_after_two_steps(init):
  assert dead_after_two_steps(init) == set()


def test_mimetic_start_matches_what_followed_the_same_token():
  """Every head starts by attending to the token that followed the last occurrence of the current one."""
  config = tiny(init="mimetic", num_layers=1, block_pattern=("global",), num_heads=2, num_kv_heads=1)
  mixer = AttentionMixer(config, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 12, config.width))
  x = x.at[:, 9].set(x[:, 4])  # the token of step 4 again: step 5 is what followed
  q, _ = jnp.split(mixer.q(x).reshape(1, 12, 2, -1), 2, axis=-1)
  q, k = (head_norm(z).reshape(1, 12, -1) for z in (q, mixer.k(x).reshape(1, 12, 1, -1)))
  q, k = q + short_conv(q, mixer.canon_q.weight[...]), k + short_conv(k, mixer.canon_k.weight[...])
  scores = jnp.einsum("hd,sd->hs", q[0, 9].reshape(2, -1), k[0, :10])
  np.testing.assert_array_equal(jnp.argmax(scores, -1), 5)
  np.testing.assert_allclose(scores[:, 5], config.head_dim, rtol=1e-5)  # RMS-normed and equal


def test_published_start_leaves_the_short_convolutions_dead():
  dead = dead_after_two_steps("published")
  local = {f"groups.blocks.{i}.mixer.{name}" for i in (0, 1, 3)
           for name in ("in_proj.kernel", "in_proj.bias", "conv.weight", "out_proj.kernel")}
  norms = {f"groups.blocks.{i}.norm1.weight" for i in (0, 1, 3)}
  assert dead == local | norms  # of the local mixers, only the output bias learns


def test_compile_time_does_not_grow_with_depth():
  def hlo_size(layers):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(tiny(num_layers=layers), rngs=nnx.Rngs(0))), nnx.Param)
    lowered = jax.jit(jax.grad(loss_of, argnums=1), static_argnums=0).lower(graphdef, params, TOKENS)
    return len(lowered.as_text())

  assert hlo_size(64) < 1.02 * hlo_size(16)


def test_metadata_follows_the_parameters():
  model = nnx.eval_shape(lambda: Atma(tiny(num_layers=6), rngs=nnx.Rngs(0)))
  axes, groups = parameter_metadata(model)
  shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  is_axes = lambda leaf: isinstance(leaf, tuple)
  jax.tree.map(lambda p, a: p.ndim == len(a) or pytest.fail(f"{a} for {p.shape}"), shapes, axes,
               is_leaf=lambda leaf: hasattr(leaf, "shape"))
  legal = {"muon", "muon_depthwise", "muon_out_in", "embedding", "head", "vector"}
  assert set(jax.tree.leaves(groups)) == legal
  assert axes["groups"]["blocks"][0]["mlp"]["fc"]["kernel"] == ("layers", "embed", "mlp")
  assert axes["tail"]["blocks"][0]["mlp"]["fc"]["kernel"] == ("embed", "mlp")
  assert len(jax.tree.leaves(axes, is_leaf=is_axes)) == len(jax.tree.leaves(groups))


def test_initialisation_is_reproducible():
  a, b = (jax.tree.leaves(nnx.state(Atma(TINY, rngs=nnx.Rngs(3)), nnx.Param)) for _ in range(2))
  assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
