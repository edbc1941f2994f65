"""Times candidates for the block sizes of the kernels and prints the entries that belong in `atma_jax.ops.core.tiles`.

On a GPU or TPU it times the kernels of that platform. On a CPU it interprets the kernels of both in tiny blocks, which shows that
every candidate works; the times mean nothing then, and the output says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import functools
import itertools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from atma_jax.benchmarks.op_speed import AttentionInputs, delta_inputs, polar_inputs, with_gradients
from atma_jax.benchmarks.timing import milliseconds
from atma_jax.config import Config
from atma_jax.errors import UserError
from atma_jax.ops.core import devices, dispatch, tiles
from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.core.tiles import Carry, Tile, Tiles
from atma_jax.ops.gated_delta import pallas_gpu as delta_gpu
from atma_jax.ops.gated_delta import pallas_tpu as delta_tpu
from atma_jax.ops.polar_attention.gpu import pallas_gpu
from atma_jax.ops.polar_attention.spec import AttentionSpec
from atma_jax.ops.polar_attention.tpu import pallas_tpu

KERNELS = {"gpu": (pallas_gpu.attend, delta_gpu.gated_delta), "tpu": (pallas_tpu.attend, delta_tpu.gated_delta)}
TILES = {
  "gpu": [Tile(q, k, warps, stages) for (q, k), warps, stages in itertools.product(
    ((64, 32), (32, 64), (64, 64), (128, 64), (64, 128), (128, 128)), (4, 8), (2, 3))],
  "tpu": [Tile(rows, keys) for rows, keys in itertools.product((512, 1024, 2048), (256, 512, 1024))],
}
CARRIES = {
  "gpu": [Carry(columns, warps, stages) for columns, warps, stages in itertools.product((32, 64), (4, 8), (2, 3, 4))],
  "tpu": [Carry(heads=heads) for heads in (1, 2, 4, 8)],
}
TINY_TILES = {"gpu": [Tile(32, 16)], "tpu": [Tile(128, 128)]}
TINY_CARRIES = {"gpu": [Carry(columns=64)], "tpu": [Carry(heads=2)]}

Candidate = TypeVar("Candidate", Tile, Carry)


def tune(config: Config, shapes: list[tuple[int, int]], repeats: int, seed: int) -> None:
  """Prints a line for every candidate, and the table entries of the best for every shape (batch, length).

  Raises:
    UserError: the kernels do not serve the recipe's head size or dtype, or no candidate runs.
  """
  H, K, D, key = config.model.num_heads, config.model.num_kv_heads, config.model.head_dim, jax.random.key(seed)
  if D not in kernels.HEAD_SIZES:
    raise UserError(f"config.model.head_dim={D}: the kernels take {' and '.join(map(str, kernels.HEAD_SIZES))}")
  platform = dispatch.platform()
  interpret = platform not in KERNELS
  print(f"{dispatch.device_kind()}, jax {jax.__version__}, H={H} K={K} D={D}"
        + ("; interpreted, the times mean nothing" if interpret else ""))
  for (B, T), name in itertools.product(shapes, KERNELS if interpret else [platform]):
    itemsize = jnp.dtype(config.model.activation_dtype).itemsize
    start = tiles.polar_tiles(name, itemsize, D, T)
    candidates, carries = TILES[name], CARRIES[name]
    if interpret:
      candidates, carries = TINY_TILES[name], TINY_CARRIES[name]
      start = Tiles(candidates[0], candidates[0], candidates[0])
    polar, delta = (functools.partial(kernel, interpret=interpret) for kernel in KERNELS[name])
    best_tiles = _tune_polar(f"{name} polar", polar, polar_inputs(config, B, T, K, key), start, candidates, repeats)
    carry = _tune_delta(f"{name} delta", delta, delta_inputs(config, B, T, key), carries, repeats)
    entry = (devices.generation(), itemsize, D, tiles.bucket(T))
    print(f"POLAR  {entry}: {best_tiles},\nDELTA  {entry}: {carry},", flush=True)


def _tune_polar(title: str, op: Callable[..., Any], inputs: AttentionInputs, start: Tiles, candidates: list[Tile],
                repeats: int) -> Tiles:
  """Returns the best tile of each kernel, tuning one kernel after the other with the earlier ones at their best."""
  B, T = inputs[0].shape[:2]
  best = start
  for kernel in ("forward", "dq", "dkv"):
    def run(tile: Tile, kernel: str = kernel, best: Tiles = best) -> float:
      chosen = dataclasses.replace(best, **{kernel: tile})
      call = lambda q, k, v, params: op(q, k, v, params, AttentionSpec(), tiles=chosen)
      return milliseconds(jax.jit(call) if kernel == "forward" else with_gradients(call), *inputs, repeats=repeats)

    best = dataclasses.replace(best, **{kernel: _fastest(f"{title} {kernel} {B} x {T}", candidates, run)})
  return best


def _tune_delta(title: str, op: Callable[..., Any], inputs: tuple[jax.Array, ...], candidates: list[Carry],
                repeats: int) -> Carry:
  """Returns the best carry of the gated delta's kernels."""
  B, T, H, D = inputs[0].shape
  state = jnp.zeros((B, H, D, D))

  def run(carry: Carry) -> float:
    call = lambda q, k, v, log_gamma, beta: op(q, k, v, log_gamma=log_gamma, beta=beta, initial_state=state, carry=carry)
    return milliseconds(with_gradients(call), *inputs, repeats=repeats)

  return _fastest(f"{title} {B} x {T}", candidates, run)


def _fastest(title: str, candidates: Iterable[Candidate], run: Callable[[Candidate], float]) -> Candidate:
  """Returns the candidate for which `run` gives the shortest time, and prints those that the device cannot run.

  Raises:
    UserError: none of them runs.
  """
  times: dict[Candidate, float] = {}
  for candidate in candidates:
    try:
      times[candidate] = run(candidate)
    except Exception as error:  # each compiler raises its own type for a tile that does not fit
      print(f"{title}: {candidate} does not run: {str(error).splitlines()[0][:120]}", flush=True)
    else:
      print(f"{title}: {candidate} {times[candidate]:.3f} ms", flush=True)
  if not times:
    raise UserError(f"--table=tune: no candidate for {title} runs on {dispatch.device_kind()}")
  return min(times, key=lambda candidate: times[candidate])
