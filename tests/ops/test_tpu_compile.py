"""The TPU kernels compiled, forward and backward, at real sizes for TPUs that are not there; what they need is printed."""

from __future__ import annotations

import importlib.util
import os

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

from atma_jax.ops import gated_delta, polar_attention
from atma_jax.ops.core import devices, dispatch
from atma_jax.ops.polar_attention.cached import api as cached
from atma_jax.planning.ahead import ENVIRONMENT
from atma_jax.planning.hlo import traffic
from atma_jax.sharding import make_mesh

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                reason="needs libtpu's compiler: install atma_jax[dev]")
SCALARS = ("null_base", "null_slope", "len_gain", "mag_beta")


@pytest.fixture(scope="module")
def chip():
  """``chip("v5e")`` is a mesh of one such chip."""
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

  def make(generation):
    shape = "1x1x1" if generation == "v5p" else "1x1"
    topology = topologies.get_topology_desc(f"{generation}:{shape}", "tpu", chips_per_host_bounds=(1, 1, 1))
    return make_mesh(devices=topology.devices[:1])

  return make


def compiled(op, mesh, *shapes):
  """`op` forward and backward for one chip, compiled."""
  def both(arguments):
    outputs, vjp = jax.vjp(op, arguments)
    return outputs, vjp(outputs)

  with jax.set_mesh(mesh):
    program = jax.jit(both).trace(shapes).lower(lowering_platforms=("tpu",)).compile()
  print(program.memory_analysis())
  return program


# The first of each generation is the published model's; the others are a long sequence, small heads and float32.
@pytest.mark.parametrize("generation, B, T, D, dtype", [
  ("v5e", 8, 2048, 128, jnp.bfloat16), ("v5p", 1, 32768, 128, jnp.bfloat16), ("v6e", 8, 2048, 64, jnp.float32)])
def test_polar_attention(chip, generation, B, T, D, dtype):
  H, K, mesh = 8, 2, chip(generation)

  def op(arguments):
    q, k, v, raw = arguments
    return polar_attention(q, k, v, **raw)  # "auto" on a TPU is the kernel

  with jax.set_mesh(mesh):
    assert (dispatch.platform(), devices.generation()) == ("tpu", generation)
  raw = {"v_null": jax.ShapeDtypeStruct((H, D), jnp.float32)} | {n: jax.ShapeDtypeStruct((H,), jnp.float32) for n in SCALARS}
  program = compiled(op, mesh, *(jax.ShapeDtypeStruct((B, T, n, D), dtype) for n in (H, K, K)), raw)
  assert traffic(program.as_text()).kernels == 3
  query_bytes = B * T * H * D * jnp.dtype(dtype).itemsize
  assert program.memory_analysis().temp_size_in_bytes < 16 * query_bytes  # linear in T: one matrix of scores is T/D as much


@pytest.mark.parametrize("generation, B, T, D, dtype", [
  ("v5e", 8, 2048, 128, jnp.bfloat16), ("v5p", 8, 2048, 64, jnp.float32), ("v6e", 1, 32768, 128, jnp.bfloat16)])
def test_gated_delta(chip, generation, B, T, D, dtype):
  def op(arguments):
    q, k, v, log_gamma, beta = arguments
    return gated_delta(q, k, v, log_gamma=log_gamma, beta=beta)

  vector, scalar = jax.ShapeDtypeStruct((B, T, 8, D), dtype), jax.ShapeDtypeStruct((B, T, 8), jnp.float32)
  program = compiled(op, chip(generation), vector, vector, vector, scalar, scalar)
  assert traffic(program.as_text()).kernels == 2


@pytest.mark.slow
def test_packed_documents(chip):
  """Attention and memory of rows that pack documents."""
  B, T, H, K, D = 8, 2048, 8, 2, 128

  def op(arguments):
    q, k, v, log_gamma, beta = arguments
    raw = {name: jnp.zeros(H) for name in SCALARS}
    starts = jnp.cumsum(log_gamma[..., 0] > 0, axis=1)
    readout, _ = gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, starts=starts, implementation="pallas_tpu")
    return *polar_attention(q, k, v, v_null=jnp.zeros((H, D)), **raw, starts=starts, implementation="pallas_tpu"), readout

  vectors = [jax.ShapeDtypeStruct((B, T, n, D), jnp.bfloat16) for n in (H, K, K)]
  scalar = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
  assert traffic(compiled(op, chip("v5e"), *vectors, scalar, scalar).as_text()).kernels == 5


def test_a_mesh_of_several_chips_is_refused_outside_shard_map():
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  q = k = jax.ShapeDtypeStruct((4, 128, 1, 64), jnp.float32)
  raw = {"v_null": jnp.zeros((1, 64))} | {name: jnp.zeros(1) for name in SCALARS}
  with jax.set_mesh(make_mesh(devices=topologies.get_topology_desc("v5e:2x2", "tpu").devices)):
    with pytest.raises(NotImplementedError, match="inside shard_map"):
      jax.eval_shape(lambda q, k: polar_attention(q, k, k, **raw, implementation="pallas_tpu"), q, k)
    text = str(jax.make_jaxpr(lambda q, k: polar_attention(q, k, k, **raw))(q, k))
  assert "pallas_call" not in text


@pytest.mark.parametrize("generation, B, R, dtype, paged", [
  ("v5e", 1, 131328, jnp.bfloat16, False), ("v6e", 64, 768, jnp.int8, True), ("v5p", 3, 72, jnp.float32, False)])
def test_decoding(chip, generation, B, R, dtype, paged):
  """Attention over one of four stacked layers and the write of a token for all of them: in place, nothing is copied."""
  (L, H, K, D), page = (4, 8, 2, 128), 256
  pages = B * R // page if paged else B
  ring = jax.ShapeDtypeStruct((L, pages, K, page if paged else R, D), dtype)
  scales = (jax.ShapeDtypeStruct(ring.shape[:-1], jnp.float32),) * 2 if dtype == jnp.int8 else None
  lengths, table = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, R // page), jnp.int32) if paged else None
  wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16

  def op(q, k, v, keys, values, scales, lengths, table, scale, new):
    found = cached.cached_statistics(q, k, v, keys, values, lengths, scale, scales=scales, layer=2, table=table)
    new = new + found.S[None, :, :, :K].swapaxes(2, 3)  # written after it was read
    return found, [cached.append(ring, new, lengths, lengths, table) for ring in (keys, values)]

  vectors = [jax.ShapeDtypeStruct((B, 1, n, D), wide) for n in (H, K, K)]
  with jax.set_mesh(chip(generation)):
    program = jax.jit(op, donate_argnums=(3, 4)).trace(
      *vectors, ring, ring, scales, lengths, table, jax.ShapeDtypeStruct((B, 1, H), jnp.float32),
      jax.ShapeDtypeStruct((L, B, K, 1, D), jnp.float32)).lower(lowering_platforms=("tpu",)).compile()
  memory = program.memory_analysis()
  assert traffic(program.as_text()).kernels == 3
  assert memory.alias_size_in_bytes >= 2 * ring.size * ring.dtype.itemsize
  assert memory.temp_size_in_bytes < max(ring.size * ring.dtype.itemsize // 8, 2**22)
