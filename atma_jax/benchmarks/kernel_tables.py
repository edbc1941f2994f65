"""Tables of times: ops against their oracle and rivals, the training step, long forward passes."""

from __future__ import annotations

from collections.abc import Callable
import functools
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition
from atma_jax.ops import gated_delta, polar_attention, softmax_attention
from atma_jax.ops.gated_delta.api import OP as DELTA
from atma_jax.ops.polar_attention.api import ATTENTION
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.state import create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

ORACLE_LENGTH = 512

Arrays = tuple[jax.Array, ...]


def milliseconds(function: Callable[..., Any], *args: Any, repeats: int) -> float:
  """Best mean time of a call over three rounds, after one to warm up."""
  jax.block_until_ready(function(*args))
  rounds = []
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(repeats):
      out = function(*args)
    jax.block_until_ready(out)
    rounds.append((time.perf_counter() - start) / repeats * 1e3)
  return min(rounds)


def matmul_tflops(size: int, repeats: int) -> float:
  """TFLOP/s of a square bfloat16 matrix product of random numbers."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), a, a, repeats=repeats) / 1e9


def relative_error(actual: Any, expected: Any) -> float:
  """Largest relative error, by norm, of the arrays of a tree."""
  def error(a, b):
    return jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-12)

  return max(float(error(a, b)) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


def polar_inputs(config: Config, B: int, T: int, kv_heads: int, key: jax.Array) -> tuple[Arrays, dict[str, jax.Array]]:
  """q, k, v in the activation dtype and the raw parameters near their initial values."""
  H, D, keys = config.model.num_heads, config.model.head_dim, jax.random.split(key, 8)
  dtype = jnp.dtype(config.model.activation_dtype)
  arrays = tuple(jax.random.normal(keys[i], (B, T, n, D), dtype) for i, n in enumerate((H, kv_heads, kv_heads)))
  starts = {"null_base": 2.0, "null_slope": 0.5, "len_gain": -1.0, "mag_beta": -1.5}
  raw = {name: start + 0.1 * jax.random.normal(keys[3 + i], (H,)) for i, (name, start) in enumerate(starts.items())}
  return arrays, raw | {"v_null": jax.random.normal(keys[7], (H, D))}


def delta_inputs(config: Config, B: int, T: int, key: jax.Array) -> Arrays:
  """q and k of unit norm, v, log_gamma, beta."""
  H, D, keys = config.model.num_heads, config.model.head_dim, jax.random.split(key, 5)
  q, k, v = (jax.random.normal(keys[i], (B, T, H, D)) for i in range(3))
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  dtype = jnp.dtype(config.model.activation_dtype)
  gates = (jax.random.normal(keys[i], (B, T, H)) for i in (3, 4))
  return (*(x.astype(dtype) for x in (q, k, v)), jax.nn.log_sigmoid(next(gates) + config.model.memory.gamma_bias),
          jax.nn.sigmoid(next(gates)))


def gradients(function: Callable[..., Any]) -> Callable[..., Any]:
  """Outputs and gradients of all arguments, each under an incoming gradient of its own size."""
  def run(*args):
    outputs, vjp = jax.vjp(function, *args)
    return outputs, vjp(jax.tree.map(wave, outputs))

  def wave(x):
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)

  return jax.jit(run)


def _softmax_rivals(D: int) -> dict[str, Callable[..., jax.Array]]:
  rivals = {"xla": functools.partial(softmax_attention, scale=D**-0.5)}
  if jax.default_backend() == "gpu":
    rivals["cudnn"] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  return rivals


def ops_table(config: Config, shapes: list[tuple[int, int]], repeats: int, seed: int) -> None:
  """Prints a line a shape and implementation."""
  H, D, key = config.model.num_heads, config.model.head_dim, jax.random.key(seed)
  peak = matmul_tflops(8192 if jax.default_backend() != "cpu" else 512, repeats)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, bfloat16 matmul {peak:.1f} TFLOP/s\n")
  print("| op | implementation | B x T | K | forward ms | fwd+bwd ms | TFLOP/s | of matmul | error out / grad |")
  print("|---|---|---|---|---|---|---|---|---|")

  def line(name, implementation, B, T, K, function, args, oracle, flops, backward):
    forward, both = jax.jit(function), gradients(function)
    ms = [milliseconds(f, *args, repeats=repeats) for f in (forward, both)]
    rates = [flops / ms[0] / 1e9, backward * flops / ms[1] / 1e9]
    errors = "-"
    if oracle is not None and T <= ORACLE_LENGTH:
      with jax.default_matmul_precision("highest"):
        expected = gradients(oracle)(*jax.tree.map(lambda x: x.astype(jnp.float32), args))
      actual = both(*args)
      errors = " / ".join(f"{relative_error(a, b):.0e}" for a, b in zip(actual, expected))
    print(f"| {name} | {implementation} | {B} x {T} | {K} | {ms[0]:.3f} | {ms[1]:.3f} | {rates[0]:.1f} / {rates[1]:.1f} | "
          f"{rates[0] / peak:.2f} / {rates[1] / peak:.2f} | {errors} |", flush=True)

  def delta(implementation):
    return lambda q, k, v, log_gamma, beta: gated_delta(q, k, v, log_gamma=log_gamma, beta=beta, implementation=implementation)

  def polar(implementation):
    return lambda q, k, v, raw: polar_attention(q, k, v, **raw, implementation=implementation)

  for B, T in [(1, min(ORACLE_LENGTH, shapes[0][1])), *shapes]:
    attention_flops = 2 * B * H * T * (T + 1) * D
    for K in sorted({H, config.model.num_kv_heads}, reverse=True):
      arrays, raw = polar_inputs(config, B, T, K, key)
      chosen = ATTENTION.resolve(config.model.implementation, *arrays, **raw)
      line("polar", chosen, B, T, K, polar(chosen), (*arrays, raw), polar("reference"), attention_flops, 3.5)
      for name, rival in _softmax_rivals(D).items():
        if name != "xla" or jax.default_backend() != "gpu":
          line("softmax", name, B, T, K, rival, arrays, None, attention_flops, 3.5)
    arrays = delta_inputs(config, B, T, key)
    chosen = DELTA.resolve(config.model.implementation, *arrays[:3], log_gamma=arrays[3], beta=arrays[4],
                           initial_state=jax.ShapeDtypeStruct((B, H, D, D), jnp.float32))
    line("gated delta", chosen, B, T, H, delta(chosen), arrays, delta("reference"), 8 * B * H * T * D * D, 3)


def step_table(config: Config, step_tokens: int, repeats: int, seed: int) -> None:
  """Prints time, throughput and memory of a microbatch's step and of the recipe's, and the time of the optimizer alone."""
  T = config.data.sequence_length
  tokens_per_update = config.data.batch_size * T
  if step_tokens % T:
    raise UserError(f"--step_tokens={step_tokens}: must be a multiple of config.data.sequence_length={T}")
  if tokens_per_update > step_tokens and tokens_per_update % step_tokens:
    raise UserError(f"--step_tokens={step_tokens}: must divide the {tokens_per_update} tokens of the recipe's batch")
  print(f"\n| {config.name}, T {T}, remat {config.model.remat}, scan {config.model.scan} | ms | tokens/s | memory GiB | "
        "compiled in s |\n|---|---|---|---|---|")
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    definition = ModelDefinition(config.model)
    optimizer = optimizer_for(config, definition)
    state = create_state(config, definition, optimizer, mesh)
    for accumulation in sorted({1, max(1, tokens_per_update // step_tokens)}):
      config.data.batch_size, config.train.accumulation = accumulation * step_tokens // T, accumulation
      tokens = jax.random.randint(jax.random.key(seed), (config.data.batch_size, T + 1), 0, config.model.vocab_size)
      tokens = jax.device_put(tokens, named_sharding(mesh, ("batch", None)))
      start = time.perf_counter()
      step = make_train_step(config, definition, optimizer, mesh, state).lower(state, tokens).compile()
      compile_s, memory = time.perf_counter() - start, step.memory_analysis()
      peak = (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
              - memory.alias_size_in_bytes)
      if accumulation == 1:
        update = jax.jit(optimizer.update).lower(state.params, state.opt_state, state.params).compile()
        update_ms = milliseconds(update, state.params, state.opt_state, state.params, repeats=min(repeats, 3))

      def steps(step=step, tokens=tokens):
        nonlocal state
        state, metrics = step(state, tokens)
        return metrics

      ms = milliseconds(steps, repeats=repeats)
      print(f"| step, optimizer included, {accumulation} x {step_tokens:,} tokens | {ms:.1f} | "
            f"{accumulation * step_tokens / ms * 1e3:,.0f} | {peak / 2**30:.1f} | {compile_s:.1f} |", flush=True)
  print(f"| optimizer alone, {update_ms / ms:.1%} of the last | {update_ms:.1f} | | | |", flush=True)


def forward_table(config: Config, lengths: list[int], seed: int) -> None:
  """Prints time and memory of the hidden states of one sequence of each length."""
  print("\n| forward, tokens | ms | us a token | memory GiB |\n|---|---|---|---|")
  graphdef, params = nnx.split(nnx.jit(lambda: Atma(config.model, rngs=nnx.Rngs(seed)))())
  for T in lengths:
    tokens = jax.random.randint(jax.random.key(seed), (1, T), 0, config.model.vocab_size)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens)).lower(params, tokens).compile()
    memory, ms = run.memory_analysis(), milliseconds(run, params, tokens, repeats=2)
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    print(f"| {T} | {ms:.1f} | {ms / T * 1e3:.2f} | {size / 2**30:.2f} |", flush=True)
