"""The gated delta rule as TPU kernels (Pallas through Mosaic): in chunks, one kernel forward and one backward.

`atma_jax.ops.gated_delta.xla` derives what a chunk computes. A program owns some heads of one sequence and visits their chunks
one after the other, forwards or backwards, along the last axis of the grid. The state stays in on-chip memory and is kept
transposed, ``S = M^T`` (D, Dv). Heads are a batch axis of every matrix product: their chains of products are independent and
hide each other's latency. Let ``g_p`` be the product of a chunk's decays up to step p, ``r_ps = g_p / g_s`` for s <= p,
``d_s = g_n / g_s``, and X the inverse of ``I + L`` with ``L = beta_p r_ps k_p.k_s`` for s < p:

  U = X beta (v - g k S);   readout = g q S + A U,  A = r_ps q_p.k_s for s <= p;   S <- g_n S + k^T (d U)

The forward pass saves X, U and the state before each chunk for the backward pass. Where documents are packed, r_ps, g_p, d_s and
g_n are 0 across the start of one, as `atma_jax.ops.gated_delta.xla` derives.

Why a kernel: compiled for v5e, 8 x 2048 with H=8, D=128 in bfloat16, XLA's chunked form moves 1.24 GB forward and 6.8 GB
forward and backward through memory, which takes 1.5 and 8.3 ms at its full rate, and needs 1.1 GiB of temporaries. These
kernels and the changes of layout around them move 0.40 and 0.89 GB (0.5 and 1.1 ms) and need 0.13 GiB; their arithmetic, most
of it the inverse, takes 0.4 and 0.8 ms at the full rate of the matrix unit. These figures are computed from the compiled
programs; nothing was timed on a TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops.core import devices, dispatch, tiles
from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.gated_delta.xla import chunk_starts

CHUNK = 128  # rows and columns of the matrix unit

Shaped = jax.Array | jax.ShapeDtypeStruct


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decays:
  """What the decays of chunks follow from; arrays, or references to a chunk of a program's heads, or its values.

  Attributes:
    log_g: (B, H, N, 1, n) logarithms of the decays, summed from the start of each chunk.
    starts: (B, H, N, 1, n) float32 steps at which documents start, counted from the chunk's first; below 0 is before it. None
      where no document starts.
  """

  log_g: Any
  starts: Any = None

  def __getitem__(self, index: Any) -> Decays:
    """In a kernel: the values of the references."""
    return Decays(self.log_g[index], None if self.starts is None else self.starts[index])

  @functools.cached_property
  def last(self) -> jax.Array:
    """``log g_n``."""
    return _last(self.log_g)

  @property
  def ratios(self) -> jax.Array:
    """``g_p / g_s`` for s <= p, else 0; masked first because exp overflows for s > p."""
    p, s = _steps()
    below = s <= p
    if self.starts is not None:
      below &= s >= _to_column(self.starts).astype(jnp.int32)
    return jnp.exp(jnp.where(below, _to_column(self.log_g) - self.log_g, -1e30))

  @property
  def from_before(self) -> jax.Array:
    """g_p as a column, by which what was there before the chunk has decayed."""
    g = jnp.exp(_to_column(self.log_g))
    return g if self.starts is None else jnp.where(_to_column(self.starts) < 0, g, 0)

  @property
  def to_end(self) -> jax.Array:
    """d_s as a column, by which what a step writes decays until the chunk's end."""
    d = self.last - _to_column(self.log_g)
    if self.starts is None:
      return jnp.exp(d)
    step = lax.broadcasted_iota(jnp.int32, (1, CHUNK, 1), 1)
    return jnp.exp(jnp.where(step >= _last(self.starts).astype(jnp.int32), d, -1e30))

  @property
  def total(self) -> jax.Array:
    """g_n (h, 1, 1), by which the state before the chunk decays in it."""
    g = jnp.exp(self.last)
    return g if self.starts is None else jnp.where(_last(self.starts) < 0, g, 0)


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters: Any) -> str | None:
  """Returns why the kernels cannot serve this call, or None if they can."""
  if any(parameters[name].dtype == jnp.float64 for name in ("log_gamma", "beta", "initial_state")):
    return "takes no float64"
  return kernels.refusal("tpu", q, k, v)


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, initial_state: jax.Array,
                starts: jax.Array | None = None, carry: tiles.Carry | None = None,
                interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta`; `carry` overrides `tiles.delta`, and `interpret` runs the kernels without a TPU."""
  if starts is not None:
    chunks = jnp.moveaxis(chunk_starts(starts, CHUNK), 0, 1)[:, None].astype(jnp.float32)  # (B, 1, N, 1, n)
    starts = jnp.broadcast_to(chunks, (chunks.shape[0], q.shape[2], *chunks.shape[2:]))
  decays = Decays(jnp.cumsum(_chunk_rows(log_gamma), axis=-1), starts)
  readout, state = _run(*map(_head_first, (q, k, v)), decays, _chunk_rows(beta),
                        initial_state.mT.astype(jnp.float32), _program_heads(k, carry), interpret)
  return jnp.swapaxes(readout, 1, 2)[:, : q.shape[1]], state.mT


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, carry: tiles.Carry | None = None,
               interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """Implements `atma_jax.ops.gated_delta.xla.transition`; `carry` and `interpret` are those of `gated_delta`."""
  (B, _, H, D), Dv = k.shape, v.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(D, dtype=jnp.float32), (B, H, D, D))
  inputs = *map(_head_first, (k, v)), Decays(jnp.cumsum(_chunk_rows(log_gamma), axis=-1)), _chunk_rows(beta), identity
  factor, addend = _run_chunks("gated_delta_transition", _transition_kernel, inputs,
                               (identity, jax.ShapeDtypeStruct((B, H, D, Dv), jnp.float32)), _program_heads(k, carry), interpret,
                               reverse=False, products=19, states=2)
  return factor.mT, addend.mT


def _program_heads(k: jax.Array, carry: tiles.Carry | None) -> int:
  """Returns how many heads a program takes: at most as many as `carry` or the table says, and a divisor of H."""
  T, H, D = k.shape[1:]
  heads = (carry or tiles.delta(k.dtype.itemsize, D, T)).heads
  return max(n for n in range(1, min(heads, H) + 1) if H % n == 0)


def _head_first(x: jax.Array) -> jax.Array:
  """Transposes (B, T, H, ...) to (B, H, T, ...), padded to whole chunks with steps of gamma 1 and beta 0, which do nothing."""
  padding = -x.shape[1] % CHUNK
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x, 1, 2)


def _chunk_rows(x: jax.Array) -> jax.Array:
  """Transposes (B, T, H) to one row per chunk, (B, H, N, 1, n), in float32."""
  x = _head_first(x.astype(jnp.float32))
  return x.reshape(*x.shape[:2], -1, 1, CHUNK)


def _primal(q: jax.Array, k: jax.Array, v: jax.Array, decays: Decays, beta: jax.Array, state: jax.Array, heads: int,
            interpret: bool) -> tuple[jax.Array, jax.Array]:
  return _run_forward(q, k, v, decays, beta, state, heads, interpret)[0]


def _run_forward(q: jax.Array, k: jax.Array, v: jax.Array, decays: Decays, beta: jax.Array, state: jax.Array, heads: int,
                 interpret: bool) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  (B, H, T, D), Dv = q.shape, v.shape[3]
  chunks = jax.ShapeDtypeStruct((B, H, T // CHUNK, CHUNK, CHUNK), q.dtype)
  states = jax.ShapeDtypeStruct((B, H, T // CHUNK, D, Dv), q.dtype)
  outputs = _run_chunks("gated_delta", _forward_kernel, (q, k, v, decays, beta, state), (v, v, chunks, states, state), heads,
                        interpret, reverse=False, products=19)
  readout, writes, inverse, states, final = checkpoint_name(outputs, dispatch.GATED_DELTA)
  return (readout, final), (q, k, v, decays, beta, writes, inverse, states)


def _run_backward(heads: int, interpret: bool, residuals: tuple[Any, ...],
                  cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
  q, k, v, decays, beta, writes, inverse, states = residuals
  g_readout, g_final = cotangents
  inputs = q, k, v, decays, beta, writes, inverse, states, g_readout, g_final
  outputs = q, k, v, decays.log_g, beta, g_final
  g_q, g_k, g_v, g_log_g, *rest = _run_chunks("gated_delta_back", _backward_kernel, inputs, outputs, heads, interpret,
                                              reverse=True, products=16)
  return g_q, g_k, g_v, Decays(g_log_g), *rest


_run = jax.custom_vjp(_primal, nondiff_argnums=(6, 7))
_run.defvjp(_run_forward, _run_backward)


def _run_chunks(name: str, kernel: Callable[..., None], inputs: Sequence[Any], outputs: Sequence[Shaped], heads: int,
                interpret: bool, *, reverse: bool, products: int, states: int = 1) -> list[jax.Array]:
  """Runs a kernel over all chunks of all heads.

  An array's rank says what it is: (B, H, T, D) vectors, (B, H, N, rows, columns) one matrix or row per chunk. The last input and
  the last `states` outputs are states (B, H, D, Dv) instead.

  Args:
    name: of the kernel.
    kernel: takes references to inputs, outputs and scratch states, and the number of chunks as `count`.
    inputs: arrays and `Decays`, the initial state last.
    outputs: shapes and dtypes of the results, the final states last. The kernel gets a scratch array for each final state.
    heads: heads of a program.
    interpret: run without a TPU.
    reverse: visit the chunks from the last to the first.
    products: matrix products per chunk, for the cost estimate.
    states: number of final states.
  """
  B, H, T, D = inputs[0].shape
  count = T // CHUNK

  def block(x: Shaped, is_state: bool) -> pl.BlockSpec:
    def chunk(c: Any) -> Any:
      return count - 1 - c if reverse else c

    if is_state:
      return pl.BlockSpec((None, heads, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0))
    if x.ndim == 4:
      return pl.BlockSpec((None, heads, CHUNK, x.shape[3]), lambda b, h, c: (b, h, chunk(c), 0))
    return pl.BlockSpec((None, heads, None, *x.shape[3:]), lambda b, h, c: (b, h, chunk(c), 0, 0))

  Dv, arrays = outputs[-1].shape[3], (*jax.tree.leaves(inputs), *outputs)
  in_specs = [jax.tree.map(functools.partial(block, is_state=index == len(inputs) - 1), x) for index, x in enumerate(inputs)]
  out_specs = [block(x, index >= len(outputs) - states) for index, x in enumerate(outputs)]
  return pl.pallas_call(
    functools.partial(kernel, count=count), name=name, grid=(B, H // heads, count), interpret=interpret,
    in_specs=in_specs, out_specs=out_specs, out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    scratch_shapes=[pltpu.VMEM((heads, *x.shape[2:]), jnp.float32) for x in outputs[-states:]],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                         vmem_limit_bytes=devices.vmem_budget()),
    cost_estimate=pl.CostEstimate(flops=2 * products * B * H * T * CHUNK * max(D, Dv), transcendentals=B * H * T * CHUNK,
                                  bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)))(*inputs)


# Inside a kernel heads are the first axis of every array: matrices (h, rows, columns), columns (h, n, 1), rows (h, 1, n).

A_BT, AT_B = (2, 2), (1, 1)  # axes that `_dot` contracts for a b^T and a^T b


def _dot(a: jax.Array, b: jax.Array, dtype: jnp.dtype, contract: tuple[int, int] = (2, 1)) -> jax.Array:
  """Multiplies the matrices of each head, rounded to the dtype of the op's inputs, accumulating in float32."""
  return lax.dot_general(a.astype(dtype), b.astype(dtype), (((contract[0],), (contract[1],)), ((0,), (0,))),
                         precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
                         preferred_element_type=jnp.float32)


def _steps() -> tuple[jax.Array, jax.Array]:
  """Returns row and column indices p and s, (1, n, n) each."""
  shape = (1, CHUNK, CHUNK)
  return lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 2)


def _to_column(row: jax.Array) -> jax.Array:
  """Transposes (h, 1, n) to (h, n, 1) by a masked sum."""
  p, s = _steps()
  return jnp.sum(jnp.where(p == s, row, 0), axis=2, keepdims=True)


def _to_row(column: jax.Array) -> jax.Array:
  """Transposes (h, n, 1) to (h, 1, n) by a masked sum."""
  p, s = _steps()
  return jnp.sum(jnp.where(p == s, column, 0), axis=1, keepdims=True)


def _last(row: jax.Array) -> jax.Array:
  """Returns the last element of a row, (h, 1, 1)."""
  return row[:, :, CHUNK - 1 :]


def _unit_lower_inverse(lower: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Inverts ``I + lower``, doubling the size of inverted diagonal blocks; as stable as forward substitution.

  If X inverts the diagonal blocks of size h, ``X - X C X`` inverts those of size 2h, where C are the lower left corners of the
  larger blocks of `lower`.
  """
  p, s = _steps()
  inverse = jnp.where(p == s, 1.0, jnp.where(p // 2 == s // 2, -lower, 0))
  h = 2
  while h < CHUNK:
    corners = jnp.where((p // (2 * h) == s // (2 * h)) & (p // h != s // h), lower, 0)
    inverse -= _dot(inverse, _dot(corners, inverse, dtype), dtype)
    h *= 2
  return inverse


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, decays_ref: Decays, beta_ref: Any, state_ref: Any, readout_ref: Any,
                    writes_ref: Any, inverse_ref: Any, states_ref: Any, final_ref: Any, carry_ref: Any, *, count: int) -> None:
  """Computes a chunk's readout and the state after it, saving U, X and the state before it; `carry_ref` holds the state."""
  @pl.when(pl.program_id(2) == 0)
  def start() -> None:
    carry_ref[...] = state_ref[...]

  q, k, decays, state = q_ref[...], k_ref[...], decays_ref[...], carry_ref[...]
  dtype, (p, s), ratios = k.dtype, _steps(), decays.ratios
  g, beta = decays.from_before, _to_column(beta_ref[...])
  rounded = state.astype(dtype)
  states_ref[...] = rounded

  lower = jnp.where(s < p, beta * ratios * _dot(k, k, dtype, A_BT), 0)
  inverse = _unit_lower_inverse(lower, dtype).astype(dtype)
  inverse_ref[...] = inverse
  writes = _dot(inverse, beta * (v_ref[...].astype(jnp.float32) - g * _dot(k, rounded, dtype)), dtype)
  writes_ref[...] = writes.astype(dtype)

  attention = ratios * _dot(q, k, dtype, A_BT)
  readout_ref[...] = (g * _dot(q, rounded, dtype) + _dot(attention, writes, dtype)).astype(dtype)
  state = decays.total * state + _dot(k, decays.to_end * writes, dtype, AT_B)
  carry_ref[...] = state

  @pl.when(pl.program_id(2) == count - 1)
  def finish() -> None:
    final_ref[...] = state


def _transition_kernel(k_ref: Any, v_ref: Any, decays_ref: Decays, beta_ref: Any, identity_ref: Any, factor_ref: Any,
                       addend_ref: Any, factor_carry_ref: Any, addend_carry_ref: Any, *, count: int) -> None:
  """Carries the identity through all chunks without their values, and zero with them: A and N of `transition`, transposed."""
  @pl.when(pl.program_id(2) == 0)
  def start() -> None:
    factor_carry_ref[...], addend_carry_ref[...] = identity_ref[...], jnp.zeros(addend_carry_ref.shape, jnp.float32)

  k, decays = k_ref[...], decays_ref[...]
  dtype, (p, s), total = k.dtype, _steps(), decays.total
  g, beta, decay = decays.from_before, _to_column(beta_ref[...]), decays.to_end
  inverse = _unit_lower_inverse(jnp.where(s < p, beta * decays.ratios * _dot(k, k, dtype, A_BT), 0), dtype).astype(dtype)

  def after(state: jax.Array, v: jax.Array | float) -> jax.Array:
    writes = _dot(inverse, beta * (v - g * _dot(k, state, dtype)), dtype)
    return total * state + _dot(k, decay * writes, dtype, AT_B)

  factor_carry_ref[...] = after(factor_carry_ref[...], 0.0)
  addend_carry_ref[...] = after(addend_carry_ref[...], v_ref[...].astype(jnp.float32))

  @pl.when(pl.program_id(2) == count - 1)
  def finish() -> None:
    factor_ref[...], addend_ref[...] = factor_carry_ref[...], addend_carry_ref[...]


def _backward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, decays_ref: Decays, beta_ref: Any, writes_ref: Any, inverse_ref: Any,
                     states_ref: Any, g_readout_ref: Any, g_final_ref: Any, g_q_ref: Any, g_k_ref: Any, g_v_ref: Any,
                     g_log_g_ref: Any, g_beta_ref: Any, g_state_ref: Any, carry_ref: Any, *, count: int) -> None:
  """Differentiates a chunk; a name `g_x` is the cotangent of x, and `carry_ref` holds that of the state after the chunk."""
  @pl.when(pl.program_id(2) == 0)
  def start() -> None:
    carry_ref[...] = g_final_ref[...]

  q, k, writes, states, g_readout = q_ref[...], k_ref[...], writes_ref[...], states_ref[...], g_readout_ref[...]
  dtype, (p, s), g_state, decays = k.dtype, _steps(), carry_ref[...], decays_ref[...]
  ratios, beta, total, g = decays.ratios, _to_column(beta_ref[...]), decays.total, decays.from_before
  decay, rounded = decays.to_end, g_state.astype(dtype)

  def row_sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=2, keepdims=True)

  # readout = g q S + A U
  dots = _dot(q, k, dtype, A_BT)
  g_writes = _dot(ratios * dots, g_readout, dtype, AT_B) + decay * _dot(k, rounded, dtype)
  g_attention = ratios * _dot(g_readout, writes, dtype, A_BT)
  change = g_attention * dots
  g_k = _dot(g_attention, q, dtype, AT_B)
  g_q = g * _dot(g_readout, states, dtype, A_BT)
  g_log_g = row_sums(change) + row_sums(q.astype(jnp.float32) * g_q)
  g_log_g_row = -jnp.sum(change, axis=1, keepdims=True)
  g_q_ref[...] = (g_q + _dot(g_attention, k, dtype)).astype(dtype)

  # U = X beta (v - g k S), X the inverse of I + L, L = beta r k.k below the diagonal
  g_error = _dot(inverse_ref[...], g_writes, dtype, AT_B)  # of v - g k S, still without the factor beta
  g_v_ref[...] = (beta * g_error).astype(dtype)
  g_lower = jnp.where(s < p, -ratios * _dot(g_error, writes, dtype, A_BT), 0)
  change = g_lower * _dot(k, k, dtype, A_BT)
  g_lower = beta * g_lower
  g_k += _dot(g_lower, k, dtype) + _dot(g_lower, k, dtype, AT_B)
  from_read = -g * _dot(g_error, states, dtype, A_BT)
  g_k += beta * from_read
  wide = k.astype(jnp.float32)
  by_beta = row_sums(change) + row_sums(from_read * wide)
  g_beta_ref[...] = _to_row(row_sums(g_error * v_ref[...].astype(jnp.float32)) + by_beta)
  g_log_g += beta * by_beta
  g_log_g_row -= jnp.sum(beta * change, axis=1, keepdims=True)

  # S' = g_n S + k^T (d U)
  from_next = decay * _dot(writes, rounded, dtype, A_BT)
  g_k_ref[...] = (g_k + from_next).astype(dtype)
  change = row_sums(wide * from_next)
  kept = total * jnp.sum(row_sums(states.astype(jnp.float32) * g_state), axis=1, keepdims=True)
  g_last = jnp.sum(change, axis=1, keepdims=True) + kept
  step = lax.broadcasted_iota(jnp.int32, (1, 1, CHUNK), 2)
  g_log_g_ref[...] = _to_row(g_log_g - change) + g_log_g_row + jnp.where(step == CHUNK - 1, g_last, 0)

  g_state = total * g_state + _dot(q, g * g_readout.astype(jnp.float32), dtype, AT_B)
  g_state -= _dot(k, beta * g * g_error, dtype, AT_B)
  carry_ref[...] = g_state

  @pl.when(pl.program_id(2) == count - 1)
  def finish() -> None:
    g_state_ref[...] = g_state
