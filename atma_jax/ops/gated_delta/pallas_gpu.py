"""The gated delta rule as GPU kernels (Pallas through Triton): in chunks, forward and backward, without atomics.

`atma_jax.ops.gated_delta.xla` derives what a chunk computes. Here the state is kept transposed, ``S = M^T`` (D, Dv). Some kernels
see all chunks at once; others pass the state from chunk to chunk and do as little else as they can. Let ``g_p`` be the product
of a chunk's decays up to step p, ``r_ps = g_p / g_s`` for s <= p, ``d_s = g_n / g_s``, and X the inverse of ``I + L`` with
``L = beta_p r_ps k_p.k_s`` for s < p:

  within    W = X (beta v),  E = X (beta g k)                       all chunks in parallel
  carry     U = W - E S;  S <- g_n S + k^T (d U)                    chunk after chunk; a program has one head and a slice of Dv
  read      (g q) S + A U,  A = r_ps q_p.k_s for s <= p             all chunks in parallel

The backward pass carries the state's cotangent from the last chunk to the first, and then differentiates all chunks in parallel.

Where documents are packed, r_ps, g_p, d_s and g_n are 0 across the start of one, as `atma_jax.ops.gated_delta.xla` derives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import dispatch, tiles
from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.gated_delta.xla import chunk_starts

CHUNK = 64
CHUNK_WARPS = 4  # one warpgroup, because tiles have 64 rows

Shaped = jax.Array | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decays:
  """What the decays of chunks follow from; arrays, or references to some steps of a head's, or one chunk of values.

  Attributes:
    log_g: (B, H, T) logarithms of the decays, summed from the start of each chunk.
    starts: (B, 1, T) int32 steps at which documents start, counted from the chunk's first; below 0 is before it. None where no
      document starts.
  """

  log_g: Any
  starts: Any = None

  def __getitem__(self, rows: Any) -> Decays:
    """In a kernel: the values of some rows of the references."""
    return Decays(self.log_g[rows], None if self.starts is None else self.starts[rows])

  @functools.cached_property
  def last(self) -> jax.Array:
    """``log g_n``."""
    return _last(self.log_g)

  @property
  def ratios(self) -> jax.Array:
    """``g_p / g_s`` for s <= p, else 0, as (n, n); masked first because exp overflows for s > p."""
    below = _below(0)
    if self.starts is not None:
      below &= jnp.arange(CHUNK)[None, :] >= self.starts[:, None]
    return jnp.exp(jnp.where(below, self.log_g[:, None] - self.log_g[None, :], -1e30))

  @property
  def from_before(self) -> jax.Array:
    """g_p (n,), by which what was there before the chunk has decayed."""
    g = jnp.exp(self.log_g)
    return g if self.starts is None else jnp.where(self.starts < 0, g, 0)

  @property
  def to_end(self) -> jax.Array:
    """d_s (n,), by which what a step writes decays until the chunk's end."""
    d = self.last - self.log_g
    return jnp.exp(d if self.starts is None else jnp.where(jnp.arange(CHUNK) >= _last(self.starts), d, -1e30))

  @property
  def total(self) -> jax.Array:
    """g_n, by which the state before the chunk decays in it."""
    g = jnp.exp(self.last)
    return g if self.starts is None else jnp.where(_last(self.starts) < 0, g, 0)


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters: Any) -> str | None:
  """Returns why the kernels cannot serve this call, or None if they can."""
  if any(parameters[name].dtype == jnp.float64 for name in ("log_gamma", "beta", "initial_state")):
    return "takes no float64"
  return kernels.refusal("gpu", q, k, v)


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, starts: jax.Array | None = None, carry: tiles.Carry | None = None,
                interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta`; `carry` overrides `tiles.delta`, and `interpret` runs the kernels without a GPU."""
  T = q.shape[1]
  carry = carry or tiles.delta(q.dtype.itemsize, q.shape[3], T)
  if starts is not None:
    starts = jnp.moveaxis(chunk_starts(starts.astype(jnp.int32), CHUNK), 0, 2).reshape(q.shape[0], 1, -1)
  readout, state = _run(_pad(q), _pad(k), _pad(v), Decays(_log_g(log_gamma), starts), _time_last(beta),
                        initial_state.mT.astype(jnp.float32), carry, interpret)
  return readout[:, :T], state.mT


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, carry: tiles.Carry | None = None,
               interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta.xla.transition`; `carry` and `interpret` are those of `gated_delta`."""
  (B, T, H, D), Dv = k.shape, v.shape[-1]
  k, v, decays, beta = _pad(k), _pad(v), Decays(_log_g(log_gamma)), _time_last(beta)
  launch = _Launcher(k, v, carry or tiles.delta(k.dtype.itemsize, D, T), interpret)
  writes, erases, _ = launch.in_parallel("within", _within_kernel, (k, v, decays, beta), (v, k, launch.square))
  identity = jnp.broadcast_to(jnp.eye(D, dtype=jnp.float32), (B, H, D, D))
  factor = launch.final_state("transition", _transition_kernel, (erases, k), (), decays, identity)
  addend = launch.final_state("transition", _transition_kernel, (erases, k), (writes,), decays,
                              jnp.zeros((B, H, D, Dv), jnp.float32))
  return factor.mT, addend.mT


def _pad(x: jax.Array) -> jax.Array:
  """Pads (B, T, ...) to whole chunks; padded steps have gamma 1 and beta 0, which leaves the state as it is."""
  padding = -x.shape[1] % CHUNK
  return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x


def _time_last(x: jax.Array) -> jax.Array:
  """Pads (B, T, H) to whole chunks and transposes it to (B, H, T), in float32."""
  return jnp.swapaxes(_pad(x.astype(jnp.float32)), 1, 2)


def _log_g(log_gamma: jax.Array) -> jax.Array:
  """Returns ``log g``, (B, H, T): the decays' logarithms summed from the start of each chunk."""
  log_gamma = _time_last(log_gamma)
  return jnp.cumsum(log_gamma.reshape(*log_gamma.shape[:2], -1, CHUNK), axis=-1).reshape(log_gamma.shape)


def _primal(q: jax.Array, k: jax.Array, v: jax.Array, decays: Decays, beta: jax.Array, state: jax.Array, carry: tiles.Carry,
            interpret: bool) -> tuple[jax.Array, jax.Array]:
  return _run_forward(q, k, v, decays, beta, state, carry, interpret)[0]


def _run_forward(q: jax.Array, k: jax.Array, v: jax.Array, decays: Decays, beta: jax.Array, state: jax.Array,
                 carry: tiles.Carry, interpret: bool) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  launch = _Launcher(q, v, carry, interpret)
  writes, erases, inverse = launch.in_parallel("within", _within_kernel, (k, v, decays, beta), (launch.values, q, launch.square))
  writes, states, final = launch.in_sequence("carry", _carry_kernel, (erases, k), (writes,), decays, state)
  (readout,) = launch.in_parallel("read", _read_kernel, (q, k, writes, states, decays), (launch.values,))
  outputs = erases, inverse, writes, states, readout, final
  erases, inverse, writes, states, readout, final = checkpoint_name(outputs, dispatch.GATED_DELTA)
  return (readout, final), (q, k, v, decays, beta, erases, inverse, writes, states)


def _run_backward(carry: tiles.Carry, interpret: bool, residuals: tuple[Any, ...],
                  cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
  q, k, v, decays, beta, erases, inverse, writes, states = residuals
  g_readout, g_final = cotangents
  launch = _Launcher(q, v, carry, interpret)
  (g_writes,) = launch.in_parallel("read_back", _read_back_kernel, (q, k, g_readout, decays), (launch.values,))
  g_writes, g_states, g_state = launch.in_sequence("carry_back", _carry_back_kernel, (q, k, erases), (g_readout, g_writes),
                                                  decays, g_final)
  g_q, g_k, g_log_g = launch.in_parallel("read_chunks_back", _read_chunks_back_kernel,
                                         (q, k, writes, states, g_readout, decays), (q, q, decays.log_g))
  arguments = k, v, inverse, writes, states, g_writes, g_states, g_k, decays, beta, g_log_g
  outputs = q, launch.values, decays.log_g, beta
  g_k, g_v, g_log_g, g_beta = launch.in_parallel("write_chunks_back", _write_chunks_back_kernel, arguments, outputs)
  return g_q, _sum_groups(g_k, k), _sum_groups(g_v, v), Decays(g_log_g), g_beta, g_state


_run = jax.custom_vjp(_primal, nondiff_argnums=(6, 7))
_run.defvjp(_run_forward, _run_backward)


def _sum_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """Sums per-query-head gradients (B, T, H, D) over each group, which gives the gradient of x (B, T, K, D)."""
  if gradient.shape == x.shape:
    return gradient
  B, T, K, D = x.shape
  return jnp.sum(gradient.reshape(B, T, K, -1, D), axis=3, dtype=jnp.float32).astype(x.dtype)


class _Launcher:
  """Launches kernels over the chunks of one call, whose shapes it holds.

  An array's rank says what it is: (B, H, T) scalars, (B, T, H, D) vectors, (B, H, N, rows, columns) one matrix per chunk.
  """

  def __init__(self, q: jax.Array, v: jax.Array, carry: tiles.Carry, interpret: bool):
    (self.B, self.T, self.H, self.D), self.Dv = q.shape, v.shape[3]
    self.values = jax.ShapeDtypeStruct((self.B, self.T, self.H, self.Dv), v.dtype)
    self.tile, self.interpret = carry, interpret
    self.N = self.T // CHUNK
    self.square = jax.ShapeDtypeStruct((self.B, self.H, self.N, CHUNK, CHUNK), q.dtype)
    self.states = jax.ShapeDtypeStruct((self.B, self.H, self.N, self.D, self.Dv), q.dtype)

  def kv_head(self, x: Shaped, h: Any) -> Any:
    """Returns which head of x (B, T, heads, D) query head h reads."""
    return h if x.shape[2] == self.H else lax.div(h, self.H // x.shape[2])

  def own_head(self, x: Shaped, h: Any) -> Any:
    """Returns where head h is in x (B, H, T), or (B, 1, T) if all heads share it."""
    return h if x.shape[1] == self.H else 0

  def in_parallel(self, name: str, kernel: Callable[..., None], inputs: Sequence[jax.Array | Decays],
                  outputs: Sequence[Shaped]) -> list[jax.Array]:
    """Runs one program per head and chunk; `outputs` give shapes and dtypes."""
    def block(x: Shaped) -> pl.BlockSpec:
      if x.ndim == 3:
        return pl.BlockSpec((None, None, CHUNK), lambda c, h, b: (b, self.own_head(x, h), c))
      if x.ndim == 4:
        return pl.BlockSpec((None, CHUNK, None, x.shape[3]), lambda c, h, b: (b, c, self.kv_head(x, h), 0))
      return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda c, h, b: (b, h, c, 0, 0))

    return self._pallas_call(name, kernel, (self.N, self.H, self.B), inputs, jax.tree.map(block, list(inputs)), outputs,
                             map(block, outputs), warps=CHUNK_WARPS, stages=1)

  def in_sequence(self, name: str, kernel: Callable[..., None], whole: Sequence[jax.Array], sliced: Sequence[jax.Array],
                  decays: Decays, state: jax.Array) -> list[jax.Array]:
    """Runs one program per head and slice of Dv, which goes from chunk to chunk with its slice of the state.

    Args:
      name: of the kernel.
      kernel: takes references to the arrays below and to the results.
      whole: arrays without an axis Dv, (B, T, heads, D).
      sliced: arrays with an axis Dv, (B, T, H, Dv).
      decays: of all chunks.
      state: (B, H, D, Dv), where the first chunk starts from.

    Returns:
      An array like ``sliced[0]``, one state (D, Dv) per chunk, and the final state.
    """
    return self._in_sequence(name, kernel, whole, sliced, decays, state, (sliced[0], self.states))

  def final_state(self, name: str, kernel: Callable[..., None], whole: Sequence[jax.Array], sliced: Sequence[jax.Array],
                  decays: Decays, state: jax.Array) -> jax.Array:
    """Returns only the final state of `in_sequence`, from a kernel that computes nothing else."""
    return self._in_sequence(name, kernel, whole, sliced, decays, state, ())[0]

  def _in_sequence(self, name: str, kernel: Callable[..., None], whole: Sequence[jax.Array], sliced: Sequence[jax.Array],
                   decays: Decays, state: jax.Array, outputs: Sequence[Shaped]) -> list[jax.Array]:
    tile, Dv = self.tile, state.shape[3]
    columns = tile.columns or (64 if self.B * self.H * Dv >= 96 * 64 else 32)  # enough programs for all multiprocessors
    vector_slice = pl.BlockSpec((None, self.T, None, columns), lambda j, h, b: (b, 0, h, j))
    state_slice = pl.BlockSpec((None, None, self.D, columns), lambda j, h, b: (b, h, 0, j))
    states_slice = pl.BlockSpec((None, None, self.N, self.D, columns), lambda j, h, b: (b, h, 0, 0, j))

    def vectors(x: Shaped) -> pl.BlockSpec:
      return pl.BlockSpec((None, self.T, None, self.D), lambda j, h, b: (b, 0, self.kv_head(x, h), 0))

    def scalars(x: Shaped) -> pl.BlockSpec:
      return pl.BlockSpec((None, None, self.T), lambda j, h, b: (b, self.own_head(x, h), 0))

    in_specs = (*map(vectors, whole), *(vector_slice for _ in sliced), jax.tree.map(scalars, decays), state_slice)
    out_specs = *(vector_slice if x.ndim == 4 else states_slice for x in outputs), state_slice
    return self._pallas_call(name, functools.partial(kernel, chunks=self.N), (Dv // columns, self.H, self.B),
                             (*whole, *sliced, decays, state), in_specs, (*outputs, state), out_specs, warps=tile.warps,
                             stages=tile.stages)

  def _pallas_call(self, name: str, kernel: Callable[..., None], grid: tuple[int, ...], inputs: Sequence[Any],
                   in_specs: Iterable[Any], outputs: Sequence[Shaped], out_specs: Iterable[pl.BlockSpec], *, warps: int,
                   stages: int) -> list[jax.Array]:
    return pl.pallas_call(
      kernel, name=f"gated_delta_{name}", grid=grid, in_specs=list(in_specs), out_specs=list(out_specs),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs], interpret=self.interpret,
      compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))(*inputs)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0), precise: bool = False) -> jax.Array:
  """Multiplies two matrices, accumulating in float32; float32 operands are rounded to tf32 unless `precise`.

  A precise product is three products of tf32 parts: with float32 multiplications the kernels take minutes to compile.
  """
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32,
                         precision=kernels.unrounded() if precise else None)


def _matmul(a: jax.Array, b: jax.Array, dtype: jnp.dtype, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Multiplies two matrices rounded to the dtype of the op's inputs, accumulating in float32."""
  return _dot(a.astype(dtype), b.astype(dtype), contract, precise=dtype == jnp.float32)


def _below(offset: int) -> jax.Array:
  """Returns the mask ``s + offset <= p``, (n, n)."""
  step = jnp.arange(CHUNK)
  return step[:, None] >= step[None, :] + offset


def _last(x: jax.Array) -> jax.Array:
  """Returns the last element of (n,)."""
  return jnp.sum(jnp.where(jnp.arange(CHUNK) == CHUNK - 1, x, 0))


# Forward kernels.


def _within_kernel(k_ref: Any, v_ref: Any, decays_ref: Decays, beta_ref: Any, writes_ref: Any, erases_ref: Any,
                   inverse_ref: Any) -> None:
  """Computes W, E and X of a chunk."""
  k, decays, beta = k_ref[...], decays_ref[...], beta_ref[...]
  lower = jnp.where(_below(1), beta[:, None] * decays.ratios * _matmul(k, k, k.dtype, (1, 1)), 0)
  inverse = _unit_lower_inverse(lower, precise=k.dtype == jnp.float32)
  inverse_ref[...] = inverse.astype(inverse_ref.dtype)
  writes_ref[...] = _matmul(inverse, beta[:, None] * v_ref[...], k.dtype).astype(writes_ref.dtype)
  erases_ref[...] = _matmul(inverse, (beta * decays.from_before)[:, None] * k, k.dtype).astype(erases_ref.dtype)


def _unit_lower_inverse(lower: jax.Array, precise: bool) -> jax.Array:
  """Inverts ``I + lower``, doubling the size of inverted diagonal blocks; as stable as forward substitution.

  If X inverts the diagonal blocks of size h, ``X - X C X`` inverts those of size 2h, where C are the lower left corners of the
  larger blocks of `lower`.
  """
  step = jnp.arange(CHUNK)
  row, column = step[:, None], step[None, :]
  inverse = jnp.where(row == column, 1.0, jnp.where(row // 2 == column // 2, -lower, 0))
  h = 2
  while h < CHUNK:
    corners = jnp.where((row // (2 * h) == column // (2 * h)) & (row // h != column // h), lower, 0)
    inverse -= _dot(inverse, _dot(corners, inverse, precise=precise), precise=precise)
    h *= 2
  return inverse


def _carry_kernel(erases_ref: Any, k_ref: Any, within_ref: Any, decays_ref: Decays, state_ref: Any, writes_ref: Any,
                  states_ref: Any, final_ref: Any, *, chunks: int) -> None:
  """Carries the state through all chunks, storing U and the state before each."""
  def step(c: jax.Array, state: jax.Array) -> jax.Array:
    rows = pl.ds(c * CHUNK, CHUNK)
    k, decays = k_ref[rows, :], decays_ref[rows]
    rounded = state.astype(k.dtype)
    states_ref[c] = rounded
    writes = within_ref[rows, :] - _matmul(erases_ref[rows, :], rounded, k.dtype)
    writes_ref[rows, :] = writes.astype(writes_ref.dtype)
    return decays.total * state + _matmul(k, decays.to_end[:, None] * writes, k.dtype, (0, 0))

  final_ref[...] = lax.fori_loop(0, chunks, step, state_ref[...])


def _transition_kernel(erases_ref: Any, k_ref: Any, *refs: Any, chunks: int) -> None:
  """Carries the state through all chunks; without `within_ref` the chunks add nothing of their own."""
  *within_ref, decays_ref, state_ref, final_ref = refs

  def step(c: jax.Array, state: jax.Array) -> jax.Array:
    rows = pl.ds(c * CHUNK, CHUNK)
    k, decays = k_ref[rows, :], decays_ref[rows]
    writes = -_matmul(erases_ref[rows, :], state, k.dtype)
    for ref in within_ref:
      writes += ref[rows, :]
    return decays.total * state + _matmul(k, decays.to_end[:, None] * writes, k.dtype, (0, 0))

  final_ref[...] = lax.fori_loop(0, chunks, step, state_ref[...])


def _read_kernel(q_ref: Any, k_ref: Any, writes_ref: Any, states_ref: Any, decays_ref: Decays, readout_ref: Any) -> None:
  """Computes the readout of a chunk."""
  q, decays = q_ref[...], decays_ref[...]
  attention = decays.ratios * _matmul(q, k_ref[...], q.dtype, (1, 1))
  readout = decays.from_before[:, None] * _matmul(q, states_ref[...], q.dtype)
  readout_ref[...] = (readout + _matmul(attention, writes_ref[...], q.dtype)).astype(readout_ref.dtype)


# Backward kernels. A name `g_x` is the cotangent of x.


def _read_back_kernel(q_ref: Any, k_ref: Any, g_readout_ref: Any, decays_ref: Decays, g_writes_ref: Any) -> None:
  """Computes the part of U's cotangent that comes through the chunk's own readout."""
  q = q_ref[...]
  attention = decays_ref[...].ratios * _matmul(q, k_ref[...], q.dtype, (1, 1))
  g_writes_ref[...] = _matmul(attention, g_readout_ref[...], q.dtype, (0, 0)).astype(g_writes_ref.dtype)


def _carry_back_kernel(q_ref: Any, k_ref: Any, erases_ref: Any, g_readout_ref: Any, g_read_ref: Any, decays_ref: Decays,
                       g_final_ref: Any, g_writes_ref: Any, g_states_ref: Any, g_state_ref: Any, *, chunks: int) -> None:
  """Carries the state's cotangent back through all chunks, storing those of U and of the state after each."""
  def step(i: jax.Array, g_state: jax.Array) -> jax.Array:  # g_state is of the state after chunk c
    c = chunks - 1 - i
    rows = pl.ds(c * CHUNK, CHUNK)
    k, decays = k_ref[rows, :], decays_ref[rows]
    rounded = g_state.astype(k.dtype)
    g_states_ref[c] = rounded
    g_writes = g_read_ref[rows, :] + decays.to_end[:, None] * _matmul(k, rounded, k.dtype)
    g_writes = g_writes.astype(k.dtype)
    g_writes_ref[rows, :] = g_writes
    read = _matmul(q_ref[rows, :], decays.from_before[:, None] * g_readout_ref[rows, :], k.dtype, (0, 0))
    return decays.total * g_state + read - _matmul(erases_ref[rows, :], g_writes, k.dtype, (0, 0))

  g_state_ref[...] = lax.fori_loop(0, chunks, step, g_final_ref[...])


def _read_chunks_back_kernel(q_ref: Any, k_ref: Any, writes_ref: Any, states_ref: Any, g_readout_ref: Any, decays_ref: Decays,
                             g_q_ref: Any, g_k_ref: Any, g_log_g_ref: Any) -> None:
  """Differentiates ``readout = g q S + A U`` with respect to q, k and g, at given U and S."""
  q, k, decays, g_readout = q_ref[...], k_ref[...], decays_ref[...], g_readout_ref[...]
  g_attention = decays.ratios * _matmul(g_readout, writes_ref[...], k.dtype, (1, 1))
  change = g_attention * _matmul(q, k, k.dtype, (1, 1))
  g_log_g = jnp.sum(change, axis=1) - jnp.sum(change, axis=0)
  g_k_ref[...] = _matmul(g_attention, q, k.dtype, (0, 0)).astype(g_k_ref.dtype)
  g_q = decays.from_before[:, None] * _matmul(g_readout, states_ref[...], k.dtype, (1, 1))
  g_log_g_ref[...] = g_log_g + jnp.sum(q * g_q, axis=1)
  g_q_ref[...] = (g_q + _matmul(g_attention, k, k.dtype)).astype(g_q_ref.dtype)


def _write_chunks_back_kernel(k_ref: Any, v_ref: Any, inverse_ref: Any, writes_ref: Any, states_ref: Any, g_writes_ref: Any,
                              g_states_ref: Any, g_k_read_ref: Any, decays_ref: Decays, beta_ref: Any, g_log_g_read_ref: Any,
                              g_k_ref: Any, g_v_ref: Any, g_log_g_ref: Any, g_beta_ref: Any) -> None:
  """Differentiates U and the next state with respect to k, v, g and beta, and adds the gradients through the readout."""
  k, decays, beta, writes = k_ref[...], decays_ref[...], beta_ref[...], writes_ref[...]
  dtype = k.dtype

  # L = beta r k.k below the diagonal; U = X beta (v - g k S), X the inverse of I + L
  g_error = _matmul(inverse_ref[...], g_writes_ref[...], dtype, (0, 0))  # of v - g k S, still without the factor beta
  g_v_ref[...] = (beta[:, None] * g_error).astype(g_v_ref.dtype)
  g_beta = jnp.sum(g_error * v_ref[...], axis=1)
  g_error = g_error.astype(dtype)
  g_lower = jnp.where(_below(1), -decays.ratios * _matmul(g_error, writes, dtype, (1, 1)), 0)
  change = g_lower * _matmul(k, k, dtype, (1, 1))
  g_beta += jnp.sum(change, axis=1)
  g_log_g = beta * jnp.sum(change, axis=1) - jnp.sum(beta[:, None] * change, axis=0)
  g_lower = (beta[:, None] * g_lower).astype(dtype)
  g_k = g_k_read_ref[...] + _matmul(g_lower, k, dtype) + _matmul(g_lower, k, dtype, (0, 0))

  from_read = -decays.from_before[:, None] * _matmul(g_error, states_ref[...], dtype, (1, 1))
  change = jnp.sum(from_read * k, axis=1)
  g_beta_ref[...] = g_beta + change
  g_log_g += beta * change
  g_k += beta[:, None] * from_read

  # S' = g_n S + k^T (d U)
  from_next = decays.to_end[:, None] * _matmul(writes, g_states_ref[...], dtype, (1, 1))
  change = jnp.sum(k * from_next, axis=1)
  decayed = decays.total * jnp.sum(states_ref[...].astype(jnp.float32) * g_states_ref[...])
  g_log_g += jnp.where(jnp.arange(CHUNK) == CHUNK - 1, jnp.sum(change) + decayed, 0) - change
  g_log_g_ref[...] = g_log_g + g_log_g_read_ref[...]
  g_k_ref[...] = (g_k + from_next).astype(g_k_ref.dtype)
