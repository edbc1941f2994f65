"""The GPU kernels lower to Triton without a GPU, inline assembly included, which interpret mode does not run."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import pytest

from atma_jax.models import parallel
from atma_jax.ops import context_parallel, cross_entropy, gated_short_conv, sum_and_norm
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta.step import gated_delta_step
from atma_jax.ops.polar_attention.cached import api as cached
from atma_jax.ops.polar_attention.cached import chunk_gpu
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.spec import AttentionSpec, PolarParams

DEVICE = AbstractDevice("NVIDIA H200", 132, "gpu")
HOPPER = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=DEVICE)
RING = AbstractMesh((4,), ("context",), (AxisType.Auto,), abstract_device=DEVICE)


def lowered(call, *shapes, mesh=HOPPER) -> str:
  """Text of the program of the sum of all results of `call` and its gradients."""
  def total(*arguments):
    return sum(jnp.sum(x.astype(jnp.float32)) for x in call(*arguments))

  with jax.sharding.use_abstract_mesh(mesh):
    both = jax.jit(jax.value_and_grad(total, tuple(range(len(shapes)))))
    return both.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_packed_documents():
  """All kernels of a layer that know of documents: attention, memory, gated convolution."""
  B, T, H, D = 2, 300, 2, 64
  vectors, scalars = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16), jax.ShapeDtypeStruct((B, T, H), jnp.float32)
  starts = jnp.zeros((B, T), jnp.int32)

  def call(q, k, v, log_gamma, beta):
    params = PolarParams.initial(H, D)
    initial = {"initial_state": jnp.zeros((B, H, D, D)), "starts": starts}
    readout, _ = delta_gpu.gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, **initial)
    flat = [x.reshape(B, T, H * D) for x in (q, k, v)]
    convolved = gated_short_conv(flat, jnp.ones((3, H * D)), starts=starts, implementation="pallas_gpu")
    return *pallas_gpu.attend(q, k, v, params, AttentionSpec(100), starts=starts), readout, convolved

  assert lowered(call, *[vectors] * 3, *[scalars] * 2).count("@__gpu$xla.gpu.triton") == 3 + 7 + 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("T, K, D, window, count_length", [
  (300, 2, 64, 100, None), (256, 4, 128, None, 77), (1, 4, 64, None, None)])
def test_polar_attention(T, K, D, window, count_length, dtype):
  H, shape = 4, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  spec = AttentionSpec(window, count_length=count_length)

  def call(q, k, v, *raw):
    return pallas_gpu.attend(q, k, v, PolarParams(*raw), spec)

  arrays = [jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (H, K, K)]
  text = lowered(call, *arrays, shape((H, D)), *[shape((H,))] * 4)
  assert text.count("@__gpu$xla.gpu.triton") == 3  # forward, dq, dkv
  assert text.count("ex2.approx.ftz.f32") == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gated_delta(dtype):
  B, T, H, D = 1, 130, 2, 64
  vectors, scalars = jax.ShapeDtypeStruct((B, T, H, D), dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32)

  def call(q, k, v, log_gamma, beta):
    return delta_gpu.gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=jnp.zeros((B, H, D, D)))

  assert lowered(call, *[vectors] * 3, *[scalars] * 2).count("@__gpu$xla.gpu.triton") == 7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("T, C, taps, arrays", [(300, 192, 3, 1), (1, 512, 4, 3)])
def test_gated_short_conv(T, C, taps, arrays, dtype):
  """Chosen by "auto"."""
  vectors = [jax.ShapeDtypeStruct((rows, C), jnp.float32) for rows in (taps, 3)]
  text = lowered(lambda weight, bias, *projected: [gated_short_conv(projected, weight, bias)], *vectors,
                 *[jax.ShapeDtypeStruct((2, T, 3 * C // arrays), dtype)] * arrays)
  assert text.count("@__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_gated_projection(dtype):
  """Chosen by "auto": one kernel, in the backward pass."""
  B, T, C, F = 2, 300, 64, 192
  shapes = [jax.ShapeDtypeStruct(*s) for s in (((B, T, C), dtype), ((C, 2 * F), dtype), ((2 * F,), jnp.float32))]
  call = functools.partial(parallel.gated_projection, implementation="auto")
  assert lowered(lambda *arguments: [call(*arguments)], *shapes).count("@__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("T, C, count", [(300, 768, 1), (1, 64, 0), (77, 1024, 3)])
def test_sum_and_norm(T, C, count, dtype):
  """Chosen by "auto"."""
  vectors = [jax.ShapeDtypeStruct((C,), jnp.float32)] * 2
  text = lowered(lambda bias, weight, x, *added: sum_and_norm(x, added, bias, weight, eps=1e-6), *vectors,
                 *[jax.ShapeDtypeStruct((2, T, C), dtype)] * (1 + count))
  assert text.count("@__gpu$xla.gpu.triton") == 2


def test_cross_entropy():
  """Chosen by "auto": two kernels in the loop over chunks."""
  B, T, C, V = 2, 300, 64, 384
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((C, V), (V,))]

  def call(hidden, kernel, bias):
    targets, weights = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
    return cross_entropy(hidden, kernel, bias, targets, weights, cap=15.0, z_loss=0.1, chunk=100)[:1]

  assert lowered(call, jax.ShapeDtypeStruct((B, T, C), jnp.bfloat16), *arrays).count("@__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("R, dtype, page, kernels", [
  (131328, jnp.bfloat16, None, 2), (768, jnp.int8, 64, 2), (72, jnp.float32, None, 2), (8, jnp.bfloat16, None, 1)])
def test_decoding(R, dtype, page, kernels):
  """Attention, its merge where there is more than one share of the keys, and the memory's step, chosen by "auto"."""
  B, L, H, K, D = 2, 4, 8, 2, 128
  wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
  ring = jax.ShapeDtypeStruct((L, B * R // page if page else B, K, page or R, D), dtype)
  scales = (jax.ShapeDtypeStruct(ring.shape[:-1], jnp.float32),) * 2 if dtype == jnp.int8 else None
  table = jax.ShapeDtypeStruct((B, R // page), jnp.int32) if page else None

  def call(q, k, v, keys, values, scales, lengths, table, gates, state):
    found = cached.cached_statistics(q, k, v, keys, values, lengths, gates, window=50, scales=scales, layer=2, table=table)
    return found, gated_delta_step(q, k, v, log_gamma=gates, beta=gates, state=state, layer=1)

  vectors, gates = [jax.ShapeDtypeStruct((B, 1, n, D), wide) for n in (H, K, K)], jax.ShapeDtypeStruct((B, 1, H), jnp.float32)
  with jax.sharding.use_abstract_mesh(HOPPER):
    text = jax.jit(call).trace(*vectors, ring, ring, scales, jax.ShapeDtypeStruct((B,), jnp.int32), table, gates,
                               jax.ShapeDtypeStruct((L, B, H, D, D), jnp.float32)).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@__gpu$xla.gpu.triton") == kernels + 1


@pytest.mark.parametrize("dtype, D, window", [(jnp.bfloat16, 128, None), (jnp.float32, 64, 300)])
def test_a_ring(dtype, D, window):
  """On four GPUs "auto" takes the kernels of attention and memory; one loop of hops forward, one backward."""
  T, H, K = 1200, 4, 2

  def call(q, k, v, log_gamma, beta, *raw):
    direction, magnitude = context_parallel.polar_attention(q, k, v, PolarParams(*raw), AttentionSpec(window), axis="context")
    readout, _ = context_parallel.gated_delta(q, q, q, log_gamma=log_gamma, beta=beta, axis="context")
    return direction, magnitude, readout

  time, shape = jax.P(None, "context"), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  mapped = jax.shard_map(call, mesh=RING, in_specs=(*[time] * 5, *[jax.P()] * 5), out_specs=time, check_vma=False)
  arrays = [jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (H, K, K)]
  text = lowered(mapped, *arrays, *[shape((1, T, H))] * 2, shape((H, D)), *[shape((H,))] * 4, mesh=RING)
  attention = [name for name in re.findall(r'name = "(\w+)"', text) if name.startswith("ring_attention")]
  assert sorted(attention) == ["ring_attention", "ring_attention_dkv", "ring_attention_dq"]
  memory = {name.removeprefix("gated_delta_") for name in re.findall(r'name = "(gated_delta_\w+)"', text)}
  assert memory == {"transition", "within", "carry", "read", "read_back", "carry_back", "read_chunks_back", "write_chunks_back"}


def test_cached_attention_of_a_chunk():
  B, T, H, K, D, R = 1, 200, 4, 2, 64, 512
  ring = jax.ShapeDtypeStruct((1, B, K, R, D), jnp.bfloat16)
  vectors = [jax.ShapeDtypeStruct((B, T, heads, D), jnp.bfloat16) for heads in (H, K, K)]

  def call(q, k, v, keys, values, lengths, scale):
    return chunk_gpu.cached_statistics(q, k, v, keys, values, lengths, scale, window=None, layer=0)

  shapes = *vectors, ring, ring, jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, T, H), jnp.float32)
  with jax.sharding.use_abstract_mesh(HOPPER):
    text = jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@__gpu$xla.gpu.triton") == 1
