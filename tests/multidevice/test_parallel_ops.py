"""Attention and memory on a mesh without a context axis: accelerator kernels, here interpreted, see their own rows and heads."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax import ops
from atma_jax.config import ModelConfig
from atma_jax.models import parallel
from atma_jax.models.definition import ModelDefinition
from atma_jax.ops.gated_delta import api as delta_api
from atma_jax.ops.gated_delta import pallas_gpu as delta_kernels
from atma_jax.ops.polar_attention import api as polar_api
from atma_jax.ops.polar_attention.api import attend
from atma_jax.ops.polar_attention.gpu import pallas_gpu as polar_kernels
from atma_jax.ops.polar_attention.gpu.pallas_gpu import Tile, Tiles
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams
from atma_jax.ops.rms_norm import api as rms_norm
from atma_jax.ops.rms_norm import pallas_gpu as rms_norm_pallas_gpu
from atma_jax.ops.short_conv import pallas_gpu as short_conv_pallas_gpu
from atma_jax.ops.short_conv.api import GATED
from atma_jax.ops.squared_gate import pallas_gpu as squared_gate_pallas_gpu
from atma_jax.ops.squared_gate.api import GRADIENTS, squared_gate
from atma_jax.sharding import make_mesh, named_sharding, spec

TILES = Tiles(*[Tile(16, 16, 4, 2)] * 3)
B, T, D = 4, 16, 64


@pytest.fixture
def interpreted(monkeypatch):
  """The GPU kernels run in interpret mode; the shapes that each op saw."""
  seen = []

  def interpret(op, kernel):
    def run(q, k, *args, **kwargs):
      seen.append(q[0].shape if isinstance(q, list) else (q.shape, len(k) if isinstance(k, tuple) else k.shape))
      return kernel(q, k, *args, **kwargs, interpret=True)

    class Entry(type(op.implementations["pallas_gpu"])):
      function = property(lambda self: run)

    monkeypatch.setitem(op.implementations, "pallas_gpu", Entry("", platforms=()))

  interpret(polar_api.ATTENTION, functools.partial(polar_kernels.attend, tiles=TILES))
  interpret(delta_api.OP, delta_kernels.gated_delta)
  interpret(GATED, short_conv_pallas_gpu.gated_short_conv)
  interpret(rms_norm.OP, rms_norm_pallas_gpu.sum_and_norm)
  interpret(GRADIENTS, squared_gate_pallas_gpu.squared_gate_gradients)
  return seen


def compare(whole, parts, args, axes, atol):
  """`parts`, of sharded arguments on the mesh, against `whole`: outputs and gradients."""
  mesh = make_mesh(**axes)

  def both(function, args):
    def scalar(*args):
      outputs = function(*args)
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs)), outputs
    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.grad(scalar, argnums=tuple(range(len(args))), has_aux=True))(*args)

  expected = both(whole, args)
  with jax.set_mesh(mesh):
    sharded = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec(("batch",) if len(x) == B else ()))), args)
    got = both(parts, sharded)
  for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=atol * max(1.0, float(jnp.abs(a).max())))


def polar_inputs(H, K):
  rng = np.random.default_rng(H)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, D)), jnp.float32) for heads in (H, K, K))
  raw = {"v_null": rng.normal(size=(H, D))} | {n: rng.normal(size=H) for n in ("null_base", "null_slope", "len_gain", "mag_beta")}
  return q, k, v, {n: jnp.asarray(x, jnp.float32) for n, x in raw.items()}


@pytest.mark.parametrize(("implementation", "H", "K", "axes", "own"), [
  ("pallas_gpu", 8, 2, {"data": 2, "fsdp": 2, "tensor": 2}, (1, 4, 1)),  # a key head for each part of the tensor axis
  ("xla", 8, 1, {"data": 2, "tensor": 4}, (2, 2, 1)),  # one for all
  ("xla", 6, 3, {"data": 4, "tensor": 2}, (1, 3, 3)),  # three query heads a device read two key heads
])
def test_polar_attention(interpreted, implementation, H, K, axes, own):
  def call(op, implementation, q, k, v, raw):
    return op(q, k, v, PolarParams(**raw), AttentionSpec(5, 3, 4), implementation=implementation)

  # Rounding at 2^-24 of sums of up to 64 products, and of 64 queries or keys: as in test_context_parallel.
  compare(functools.partial(call, attend, "reference"),
          functools.partial(call, parallel.polar_attention, implementation), polar_inputs(H, K), axes, 3e-5)
  rows, heads, kv_heads = own
  assert implementation == "xla" or set(interpreted) == {((rows, T, heads, D), (rows, T, kv_heads, D))}


def test_gated_delta_kernels(interpreted):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, 2, D)), jnp.float32) for _ in range(3))
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_gamma, beta = (jnp.asarray(rng.uniform(low, 0.9 + low, (B, T, 2)), jnp.float32) for low in (-1, 0))
  state = jnp.asarray(rng.normal(size=(B, 2, D, D)), jnp.float32)

  def call(op, implementation, q, k, v, log_gamma, beta, state):
    return op(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state, implementation=implementation)

  compare(functools.partial(call, ops.gated_delta, "reference"), functools.partial(call, parallel.gated_delta, "pallas_gpu"),
          (q, k, v, log_gamma, beta, state), {"fsdp": 2, "data": 2, "tensor": 2}, 3e-5)
  assert set(interpreted) == {((1, T, 1, D), (1, T, 1, D))}


def test_what_cannot_be_split_is_refused():
  q, k, v, raw = polar_inputs(6, 3)
  with jax.set_mesh(make_mesh(data=2, tensor=4)), pytest.raises(ValueError, match=r"6 query heads .* tensor=4"):
    parallel.polar_attention(q, k, v, PolarParams(**raw), AttentionSpec(), implementation="xla")
  with jax.set_mesh(make_mesh(data=4, context=2)):
    refusals = {"reference": "split sequence has no .reference.", "pallas_tpu": "needs a TPU", "pallas_gpu": "needs a GPU"}
    for name, why in refusals.items():
      with pytest.raises(NotImplementedError, match=why):
        parallel.polar_attention(q, k, v, PolarParams(**raw), AttentionSpec(), implementation=name)
      with pytest.raises(NotImplementedError, match=why):
        parallel.gated_delta(q, q, q, log_gamma=q[..., 0], beta=q[..., 0], initial_state=None, implementation=name)
    with pytest.raises(ValueError, match="18 tokens: must be a multiple of twice mesh context=2"):
      parallel.check_length(18)


@pytest.mark.parametrize(("implementation", "arrays", "axes", "own"), [
  ("pallas_gpu", 3, {"fsdp": 4, "tensor": 2}, (2, T, 128)), ("pallas_gpu", 1, {"fsdp": 8}, (1, T, 768)),
  ("xla", 3, {"fsdp": 4, "tensor": 2}, None)])
def test_gated_short_conv(interpreted, monkeypatch, implementation, arrays, axes, own):
  C, rng, asked = 256, np.random.default_rng(3), []
  values = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, T, 3 * C), (3, C), (3, C))]
  monkeypatch.setattr(parallel.dispatch, "platform", lambda: "gpu")

  def part(projected, weight, bias):
    def project(n):
      asked.append(n)
      return jnp.split(projected, n, axis=-1), bias

    return parallel.gated_short_conv(project, weight, channels="mlp", implementation=implementation)

  compare(lambda projected, *vectors: ops.gated_short_conv([projected], *vectors, implementation="xla"), part, values, axes, 1e-5)
  assert set(asked) == {arrays} and set(interpreted) == ({own} if own else set())


@pytest.mark.parametrize(("axes", "own"), [({"fsdp": 8}, (1, T, 64)), ({"data": 2, "fsdp": 2, "context": 2}, (2, T // 2, 64))])
def test_gated_projection(interpreted, monkeypatch, axes, own):
  """Split over rows and time; where the mesh splits hidden units it is not used."""
  C, F, rng = 16, 64, np.random.default_rng(4)
  values = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, T, C), (C, 2 * F), (2 * F,))]
  monkeypatch.setattr(parallel.dispatch, "platform", lambda: "gpu")

  def whole(x, kernel, bias):
    return squared_gate(*jnp.split(x @ kernel + bias, 2, axis=-1))

  compare(whole, functools.partial(parallel.gated_projection, implementation="pallas_gpu"), values, axes, 1e-5)
  assert set(interpreted) == {(own, own)}
  with jax.set_mesh(make_mesh(data=4, tensor=2)):
    assert not parallel.concatenates_gradients("auto")


@pytest.mark.parametrize(("axes", "own", "added"), [
  ({"fsdp": 8}, (1, T, 64), 2), ({"data": 2, "tensor": 2, "context": 2}, (4, T // 2, 64), 1)])
def test_sum_and_norm(interpreted, axes, own, added):
  """Split over rows and time; over the tensor axis the terms are added up before they are exchanged."""
  C, rng = 64, np.random.default_rng(5)
  values = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, T, C),) * 3 + ((C,),) * 2]

  def call(op, implementation, x, a, b, bias, weight):
    return op(x, [a, b], bias, weight, eps=1e-6, implementation=implementation)

  compare(functools.partial(call, ops.sum_and_norm, "xla"), functools.partial(call, parallel.sum_and_norm, "pallas_gpu"), values,
          axes, 1e-5)
  assert set(interpreted) == {(own, added)}


def test_projections_over_tensor_exchange_nothing():
  """Every device makes its own heads of queries, keys, values and the memory's gates from its own piece of every matrix."""
  config = ModelConfig(vocab_size=64, num_layers=1, width=64, num_heads=8, num_kv_heads=2, head_dim=16, mlp_width=64,
                       block_pattern=("global",), scan=False, activation_dtype="float32")
  mesh = make_mesh(data=4, tensor=2)
  with jax.set_mesh(mesh):
    definition = ModelDefinition(config)
    x = jax.ShapeDtypeStruct((4, 16, 64), jnp.float32, sharding=named_sharding(mesh, ("batch", None, None)))

    def projected(params, x):
      (group, *_), *_ = definition.merge(params).repetitions().values()
      return group.blocks[0].mixer.project(x)

    outputs = named_sharding(mesh, ("batch", None, "heads"))
    text = jax.jit(projected, out_shardings=outputs).lower(definition.abstract_params(mesh), x).compile().as_text()
  assert text.count(" dot(") >= 4 and not re.findall(r"collective-permute|all-to-all|all-gather|all-reduce", text)
