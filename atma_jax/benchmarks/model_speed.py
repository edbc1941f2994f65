"""The tables of whole models: training steps, and forward passes over long sequences."""

from __future__ import annotations

import time
from typing import Any

from flax import nnx
import jax

from atma_jax.benchmarks.timing import milliseconds
from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.state import create_state, optimizer_for
from atma_jax.training.train_step import make_train_step


def step_table(config: Config, step_tokens: int, repeats: int, seed: int) -> None:
  """Prints time, throughput and memory of training steps, and the time of the optimizer alone.

  The first step takes one microbatch, the second the recipe's whole batch in such microbatches.

  Args:
    config: the recipe; its batch size and accumulation are overwritten.
    step_tokens: tokens of a microbatch.
    repeats: calls that are timed.
    seed: of the tokens.

  Raises:
    UserError: `step_tokens` does not fit the recipe's sequence length and batch size.
  """
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
    ms = update_ms = float("nan")
    for accumulation in sorted({1, max(1, tokens_per_update // step_tokens)}):
      config.data.batch_size, config.train.accumulation = accumulation * step_tokens // T, accumulation
      tokens = jax.random.randint(jax.random.key(seed), (config.data.batch_size, T + 1), 0, config.model.vocab_size)
      tokens = jax.device_put(tokens, named_sharding(mesh, ("batch", None)))
      start = time.perf_counter()
      step = make_train_step(config, definition, optimizer, mesh, state, end_of_text=0).lower(state, tokens).compile()
      compile_s = time.perf_counter() - start
      if accumulation == 1:
        update = jax.jit(optimizer.update).lower(state.params, state.opt_state, state.params).compile()
        update_ms = milliseconds(update, state.params, state.opt_state, state.params, repeats=min(repeats, 3))

      def take_step(step: Any = step, tokens: jax.Array = tokens) -> Any:
        nonlocal state
        state, metrics = step(state, tokens)
        return metrics

      ms = milliseconds(take_step, repeats=repeats)
      print(f"| step, optimizer included, {accumulation} x {step_tokens:,} tokens | {ms:.1f} | "
            f"{accumulation * step_tokens / ms * 1e3:,.0f} | {peak_bytes(step) / 2**30:.1f} | {compile_s:.1f} |", flush=True)
  print(f"| optimizer alone, {update_ms / ms:.1%} of the last | {update_ms:.1f} | | | |", flush=True)


def forward_table(config: Config, lengths: list[int], seed: int) -> None:
  """Prints time and memory of a forward pass up to the final norm, over one sequence of each length."""
  print("\n| forward, tokens | ms | us a token | memory GiB |\n|---|---|---|---|")
  graphdef, params = nnx.split(nnx.jit(lambda: Atma(config.model, rngs=nnx.Rngs(seed)))())
  for T in lengths:
    tokens = jax.random.randint(jax.random.key(seed), (1, T), 0, config.model.vocab_size)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens)).lower(params, tokens).compile()
    ms = milliseconds(run, params, tokens, repeats=2)
    print(f"| {T} | {ms:.1f} | {ms / T * 1e3:.2f} | {peak_bytes(run) / 2**30:.2f} |", flush=True)


def peak_bytes(program: jax.stages.Compiled) -> int:
  """Returns the memory that a compiled program takes: arguments, results and temporaries, counting reused buffers once."""
  memory: Any = program.memory_analysis()
  return (memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes)
