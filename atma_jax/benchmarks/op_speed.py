"""The table of ops: speed of polar attention and gated delta beside their rivals, and error beside their oracles."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from atma_jax.benchmarks.timing import matmul_tflops, milliseconds
from atma_jax.config import Config
from atma_jax.ops import gated_delta, softmax_attention
from atma_jax.ops.gated_delta.api import OP as GATED_DELTA
from atma_jax.ops.polar_attention.api import ATTENTION, attend
from atma_jax.ops.polar_attention.spec import SCALARS, AttentionSpec, PolarParams

ORACLE_LENGTH = 512  # longest sequence that is compared with the oracles

AttentionInputs = tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"], PolarParams]


def polar_inputs(config: Config, B: int, T: int, kv_heads: int, key: jax.Array) -> AttentionInputs:
  """Draws q, k and v in the activation dtype, and raw parameters near their initial values."""
  H, D, keys = config.model.num_heads, config.model.head_dim, jax.random.split(key, 8)
  dtype = jnp.dtype(config.model.activation_dtype)
  q, k, v = (jax.random.normal(keys[i], (B, T, n, D), dtype) for i, n in enumerate((H, kv_heads, kv_heads)))
  scalars = {scalar.name: scalar.initial + 0.1 * jax.random.normal(keys[3 + i], (H,)) for i, scalar in enumerate(SCALARS)}
  return q, k, v, PolarParams(v_null=jax.random.normal(keys[7], (H, D)), **scalars)


def delta_inputs(config: Config, B: int, T: int, key: jax.Array) -> tuple[jax.Array, ...]:
  """Draws q, k and v, with q and k of unit norm, log_gamma and beta."""
  H, D, keys = config.model.num_heads, config.model.head_dim, jax.random.split(key, 5)
  q, k, v = (jax.random.normal(keys[i], (B, T, H, D)) for i in range(3))
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  dtype = jnp.dtype(config.model.activation_dtype)
  gamma, beta = (jax.random.normal(keys[i], (B, T, H)) for i in (3, 4))
  return (*(x.astype(dtype) for x in (q, k, v)), jax.nn.log_sigmoid(gamma + config.model.memory.gamma_bias),
          jax.nn.sigmoid(beta))


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a jitted function that computes outputs and the gradients of all arguments, under fixed cotangents of unit size."""
  def run(*args: Any) -> tuple[Any, Any]:
    outputs, vjp = jax.vjp(function, *args)
    return outputs, vjp(jax.tree.map(cotangent, outputs))

  def cotangent(x: jax.Array) -> jax.Array:
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)

  return jax.jit(run)


def relative_error(actual: Any, expected: Any) -> float:
  """Returns the largest relative error, by norm, over the arrays of a tree."""
  def error(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-12)

  return max(float(error(a, b)) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


def ops_table(config: Config, shapes: list[tuple[int, int]], repeats: int, seed: int) -> None:
  """Prints a line for every shape (batch, length) and implementation."""
  H, D, key = config.model.num_heads, config.model.head_dim, jax.random.key(seed)
  peak = matmul_tflops(8192 if jax.default_backend() != "cpu" else 512, repeats)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16 matmul {peak:.1f} TFLOP/s\n")
  print("| op | implementation | B x T | K | forward ms | fwd+bwd ms | TFLOP/s | of matmul | error out / grad |")
  print("|---|---|---|---|---|---|---|---|---|")

  def line(name: str, implementation: str, B: int, T: int, K: int, function: Callable[..., Any], args: tuple[Any, ...],
           oracle: Callable[..., Any] | None, flops: int, backward: float) -> None:
    """Prints one line; `flops` are those of the forward pass, `backward` times as many those of both passes."""
    forward, both = jax.jit(function), with_gradients(function)
    ms = [milliseconds(f, *args, repeats=repeats) for f in (forward, both)]
    rates = [flops / ms[0] / 1e9, backward * flops / ms[1] / 1e9]
    errors = "-"
    if oracle is not None and T <= ORACLE_LENGTH:
      with jax.default_matmul_precision("highest"):
        expected = with_gradients(oracle)(*jax.tree.map(lambda x: x.astype(jnp.float32), args))
      actual = both(*args)
      errors = " / ".join(f"{relative_error(a, b):.0e}" for a, b in zip(actual, expected, strict=True))
    print(f"| {name} | {implementation} | {B} x {T} | {K} | {ms[0]:.3f} | {ms[1]:.3f} | {rates[0]:.1f} / {rates[1]:.1f} | "
          f"{rates[0] / peak:.2f} / {rates[1] / peak:.2f} | {errors} |", flush=True)

  def polar(implementation: str) -> Callable[..., Any]:
    return lambda q, k, v, params: attend(q, k, v, params, AttentionSpec(), implementation=implementation)

  def delta(implementation: str) -> Callable[..., Any]:
    return lambda q, k, v, log_gamma, beta: gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation=implementation)

  for B, T in [(1, min(ORACLE_LENGTH, shapes[0][1])), *shapes]:
    attention_flops = 2 * B * H * T * (T + 1) * D
    for K in sorted({H, config.model.num_kv_heads}, reverse=True):
      inputs = polar_inputs(config, B, T, K, key)
      chosen = ATTENTION.resolve(config.model.implementation, *inputs, AttentionSpec())
      line("polar", chosen, B, T, K, polar(chosen), inputs, polar("reference"), attention_flops, 3.5)
      name, rival = _softmax_rival(D)
      line("softmax", name, B, T, K, rival, inputs[:3], None, attention_flops, 3.5)
    inputs = delta_inputs(config, B, T, key)
    q, k, v, log_gamma, beta = inputs
    chosen = GATED_DELTA.resolve(config.model.implementation, q, k, v, log_gamma=log_gamma, beta=beta,
                                 initial_state=jax.ShapeDtypeStruct((B, H, D, D), jnp.float32))
    line("gated delta", chosen, B, T, H, delta(chosen), inputs, delta("reference"), 8 * B * H * T * D * D, 3)


def _softmax_rival(D: int) -> tuple[str, Callable[..., jax.Array]]:
  """Returns the fastest softmax attention on the default device, and its name."""
  if jax.default_backend() == "gpu":
    return "cudnn", functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  return "xla", functools.partial(softmax_attention, scale=D**-0.5)
