"""The gated delta rule as TPU kernels: Pallas through Mosaic, in chunks, one kernel forward and one backward.

`atma_jax.ops.gated_delta.xla` says what a chunk computes. A program owns some heads of one sequence and meets their chunks
in turn, forwards or backwards, on the grid's last axis; the state stays in on-chip memory, kept transposed, ``S = M^T``
(D, Dv). Heads are a batch axis of every matrix product: their chains are independent and hide each other's latency. With
``g_p`` the product of a chunk's decays up to step p, ``r_ps = g_p / g_s`` for s <= p, ``d_s = g_n / g_s``, and X the inverse
of ``I + L``, ``L = beta_p r_ps k_p.k_s`` for s < p:

  U = X beta (v - g k S);   readout = g q S + A U,  A = r_ps q_p.k_s for s <= p;   S <- g_n S + k^T (d U)

For the backward pass every chunk leaves X, U and the state before it.

Why a kernel: compiled for v5e, 8 x 2048 with H=8, D=128 in bfloat16, XLA's chunked form moves 1.24 GB forward and 6.8 GB
forward and backward through memory, which takes 1.5 and 8.3 ms at its full rate, and needs 1.1 GiB of temporaries. These
kernels and the changes of layout around them move 0.40 and 0.89 GB (0.5 and 1.1 ms) and need 0.13 GiB; their arithmetic, most
of it the inverse, takes 0.4 and 0.8 ms at the full rate of the matrix unit. Nothing of this was timed.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.core import tiles as table

CHUNK = 128  # a matrix unit's edge


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  if any(parameters[name].dtype == jnp.float64 for name in ("log_gamma", "beta", "initial_state")):
    return "takes no float64"
  return kernels.refusal("tpu", q, k, v)


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, initial_state: jax.Array,
                carry: table.Carry | None = None, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta`; `carry` overrides the table, `interpret` runs the kernels without a TPU."""
  readout, state = _run(*map(_head_first, (q, k, v)), jnp.cumsum(_rows(log_gamma), axis=-1), _rows(beta),
                        initial_state.mT.astype(jnp.float32), _heads(k, carry), interpret)
  return jnp.swapaxes(readout, 1, 2)[:, : q.shape[1]], state.mT


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, carry: table.Carry | None = None,
               interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta.xla.transition`; `carry` and `interpret` as above."""
  (B, _, H, D), Dv = k.shape, v.shape[-1]
  identity = jnp.broadcast_to(jnp.eye(D, dtype=jnp.float32), (B, H, D, D))
  inputs = *map(_head_first, (k, v)), jnp.cumsum(_rows(log_gamma), axis=-1), _rows(beta), identity
  changes, written = _call("gated_delta_transition", _transition_kernel, inputs,
                           (identity, jax.ShapeDtypeStruct((B, H, D, Dv), jnp.float32)), _heads(k, carry), interpret,
                           reverse=False, products=19, states=2)
  return changes.mT, written.mT


def _heads(k: jax.Array, carry: table.Carry | None) -> int:
  """Heads of a program."""
  T, H, D = k.shape[1:]
  heads = (carry or table.delta(k.dtype.itemsize, D, T)).heads
  return max(n for n in range(1, min(heads, H) + 1) if H % n == 0)


def _head_first(x: jax.Array) -> jax.Array:
  """(B, T, H, ...) as (B, H, T padded, ...); a padded step has gamma 1 and beta 0 and leaves the state alone."""
  padding = -x.shape[1] % CHUNK
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x, 1, 2)


def _rows(x: jax.Array) -> jax.Array:
  """(B, T, H) as (B, H, N, 1, n) float32."""
  x = _head_first(x.astype(jnp.float32))
  return x.reshape(*x.shape[:2], -1, 1, CHUNK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _run(q, k, v, log_g, beta, state, heads, interpret):
  return _run_forward(q, k, v, log_g, beta, state, heads, interpret)[0]


def _run_forward(q, k, v, log_g, beta, state, heads, interpret):
  (B, H, T, D), Dv = q.shape, v.shape[3]
  chunks = jax.ShapeDtypeStruct((B, H, T // CHUNK, CHUNK, CHUNK), q.dtype)
  states = jax.ShapeDtypeStruct((B, H, T // CHUNK, D, Dv), q.dtype)
  outputs = _call("gated_delta", _forward_kernel, (q, k, v, log_g, beta, state), (v, v, chunks, states, state), heads,
                  interpret, reverse=False, products=19)
  readout, writes, inverse, states, final = checkpoint_name(outputs, "gated_delta")
  return (readout, final), (q, k, v, log_g, beta, writes, inverse, states)


def _run_backward(heads, interpret, residuals, cotangents):
  q, k, v, log_g, beta, writes, inverse, states = residuals
  g_readout, g_final = cotangents
  return tuple(_call("gated_delta_back", _backward_kernel,
                     (q, k, v, log_g, beta, writes, inverse, states, g_readout, g_final), (q, k, v, log_g, beta, g_final),
                     heads, interpret, reverse=True, products=16))


_run.defvjp(_run_forward, _run_backward)


def _call(name, kernel, inputs, outputs, heads, interpret, *, reverse, products, states=1):
  """Runs `kernel` over all chunks; its last input and its last `states` outputs are states (B, H, D, Dv), its scratch more of
  those outputs.

  The rank of the other arrays tells their kind: (B, H, T, D) vectors, (B, H, N, rows, columns) a matrix or a row a chunk.
  """
  B, H, T, D = inputs[0].shape
  count = T // CHUNK

  def block(x, state):
    def chunk(c):
      return count - 1 - c if reverse else c

    if state:
      return pl.BlockSpec((None, heads, *x.shape[2:]), lambda b, h, c: (b, h, 0, 0))
    if x.ndim == 4:
      return pl.BlockSpec((None, heads, CHUNK, x.shape[3]), lambda b, h, c: (b, h, chunk(c), 0))
    return pl.BlockSpec((None, heads, None, *x.shape[3:]), lambda b, h, c: (b, h, chunk(c), 0, 0))

  Dv, arrays = outputs[-1].shape[3], (*inputs, *outputs)
  in_specs = [block(x, index == len(inputs) - 1) for index, x in enumerate(inputs)]
  out_specs = [block(x, index >= len(outputs) - states) for index, x in enumerate(outputs)]
  return pl.pallas_call(
    functools.partial(kernel, count=count), name=name, grid=(B, H // heads, count), interpret=interpret,
    in_specs=in_specs, out_specs=out_specs, out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
    scratch_shapes=[pltpu.VMEM((heads, *x.shape[2:]), jnp.float32) for x in outputs[-states:]],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                         vmem_limit_bytes=table.vmem_bytes(table.generation())),
    cost_estimate=pl.CostEstimate(flops=2 * products * B * H * T * CHUNK * max(D, Dv), transcendentals=B * H * T * CHUNK,
                                  bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)))(*inputs)


# Inside a kernel every array has the heads in front: matrices (h, rows, columns), columns (h, n, 1), rows (h, 1, n).


def _product(a: jax.Array, b: jax.Array, dtype: jnp.dtype, contract: tuple[int, int] = (2, 1)) -> jax.Array:
  """Matrix product a head, of operands in the dtype of the inputs, accumulated in float32."""
  return lax.dot_general(a.astype(dtype), b.astype(dtype), (((contract[0],), (contract[1],)), ((0,), (0,))),
                         precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
                         preferred_element_type=jnp.float32)


ROWS, COLUMNS = (2, 2), (1, 1)  # contracts the rows, the columns, of both operands: a b^T, a^T b


def _steps() -> tuple[jax.Array, jax.Array]:
  """Row and column indices (1, n, n)."""
  return tuple(lax.broadcasted_iota(jnp.int32, (1, CHUNK, CHUNK), axis) for axis in (1, 2))


def _column(row: jax.Array) -> jax.Array:
  p, s = _steps()
  return jnp.sum(jnp.where(p == s, row, 0), axis=2, keepdims=True)


def _row(column: jax.Array) -> jax.Array:
  p, s = _steps()
  return jnp.sum(jnp.where(p == s, column, 0), axis=1, keepdims=True)


def _last(row: jax.Array) -> jax.Array:
  """(h, 1, 1)."""
  return row[:, :, CHUNK - 1 :]


def _ratios(log_g: jax.Array) -> jax.Array:
  """g_p / g_s for s <= p, else 0, from a row; masked first, because it overflows for s > p."""
  p, s = _steps()
  return jnp.exp(jnp.where(s <= p, _column(log_g) - log_g, -1e30))


def _unit_lower_inverse(lower: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Inverse of ``I + lower``: with X the inverse of its diagonal blocks of size h, that of size 2h is ``X - X C X``, C
  being the corners of `lower` in the larger blocks. As stable as substitution."""
  p, s = _steps()
  inverse = jnp.where(p == s, 1.0, jnp.where(p // 2 == s // 2, -lower, 0))
  h = 2
  while h < CHUNK:
    corners = jnp.where((p // (2 * h) == s // (2 * h)) & (p // h != s // h), lower, 0)
    inverse -= _product(inverse, _product(corners, inverse, dtype), dtype)
    h *= 2
  return inverse


def _forward_kernel(q_ref, k_ref, v_ref, log_g_ref, beta_ref, state_ref, readout_ref, writes_ref, inverse_ref, states_ref,
                    final_ref, carry_ref, *, count):
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = state_ref[...]

  q, k, log_g, state = q_ref[...], k_ref[...], log_g_ref[...], carry_ref[...]
  dtype, (p, s), ratios = k.dtype, _steps(), _ratios(log_g)
  g, beta, last = jnp.exp(_column(log_g)), _column(beta_ref[...]), _last(log_g)
  rounded = state.astype(dtype)
  states_ref[...] = rounded

  lower = jnp.where(s < p, beta * ratios * _product(k, k, dtype, ROWS), 0)
  inverse = _unit_lower_inverse(lower, dtype).astype(dtype)
  inverse_ref[...] = inverse
  writes = _product(inverse, beta * (v_ref[...].astype(jnp.float32) - g * _product(k, rounded, dtype)), dtype)
  writes_ref[...] = writes.astype(dtype)

  attention = ratios * _product(q, k, dtype, ROWS)
  readout_ref[...] = (g * _product(q, rounded, dtype) + _product(attention, writes, dtype)).astype(dtype)
  state = jnp.exp(last) * state + _product(k, jnp.exp(last - _column(log_g)) * writes, dtype, COLUMNS)
  carry_ref[...] = state

  @pl.when(pl.program_id(2) == count - 1)
  def _():
    final_ref[...] = state


def _transition_kernel(k_ref, v_ref, log_g_ref, beta_ref, identity_ref, changes_ref, written_ref, change_ref, write_ref, *,
                       count):
  """The carry from the identity without writes, and from zero with them; both transposed."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    change_ref[...], write_ref[...] = identity_ref[...], jnp.zeros(write_ref.shape, jnp.float32)

  k, log_g = k_ref[...], log_g_ref[...]
  dtype, (p, s), column, last = k.dtype, _steps(), _column(log_g), _last(log_g)
  g, beta, decay = jnp.exp(column), _column(beta_ref[...]), jnp.exp(last - column)
  inverse = _unit_lower_inverse(jnp.where(s < p, beta * _ratios(log_g) * _product(k, k, dtype, ROWS), 0), dtype).astype(dtype)

  def after(state, v):
    writes = _product(inverse, beta * (v - g * _product(k, state, dtype)), dtype)
    return jnp.exp(last) * state + _product(k, decay * writes, dtype, COLUMNS)

  change_ref[...] = after(change_ref[...], 0.0)
  write_ref[...] = after(write_ref[...], v_ref[...].astype(jnp.float32))

  @pl.when(pl.program_id(2) == count - 1)
  def _():
    changes_ref[...], written_ref[...] = change_ref[...], write_ref[...]


def _backward_kernel(q_ref, k_ref, v_ref, log_g_ref, beta_ref, writes_ref, inverse_ref, states_ref, g_readout_ref, g_final_ref,
                     g_q_ref, g_k_ref, g_v_ref, g_log_g_ref, g_beta_ref, g_state_ref, carry_ref, *, count):
  """A name with g_ is the cotangent of what follows; the carry is that of the state after the chunk."""
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = g_final_ref[...]

  q, k, writes, states, g_readout = q_ref[...], k_ref[...], writes_ref[...], states_ref[...], g_readout_ref[...]
  dtype, (p, s), g_state, log_g = k.dtype, _steps(), carry_ref[...], log_g_ref[...]
  ratios, beta, last, g = _ratios(log_g), _column(beta_ref[...]), _last(log_g), jnp.exp(_column(log_g))
  decay, rounded = jnp.exp(last - _column(log_g)), g_state.astype(dtype)

  def total(x):
    return jnp.sum(x, axis=2, keepdims=True)

  # readout = g q S + A U
  dots = _product(q, k, dtype, ROWS)
  g_writes = _product(ratios * dots, g_readout, dtype, COLUMNS) + decay * _product(k, rounded, dtype)
  g_attention = ratios * _product(g_readout, writes, dtype, ROWS)
  change = g_attention * dots
  g_k = _product(g_attention, q, dtype, COLUMNS)
  g_q = g * _product(g_readout, states, dtype, ROWS)
  g_log_g = total(change) + total(q.astype(jnp.float32) * g_q)
  g_log_g_row = -jnp.sum(change, axis=1, keepdims=True)
  g_q_ref[...] = (g_q + _product(g_attention, k, dtype)).astype(dtype)

  # U = X beta (v - g k S), X the inverse of I + L, L = beta r k.k below the diagonal
  g_error = _product(inverse_ref[...], g_writes, dtype, COLUMNS)  # before the factor beta
  g_v_ref[...] = (beta * g_error).astype(dtype)
  g_lower = jnp.where(s < p, -ratios * _product(g_error, writes, dtype, ROWS), 0)
  change = g_lower * _product(k, k, dtype, ROWS)
  g_lower = beta * g_lower
  g_k += _product(g_lower, k, dtype) + _product(g_lower, k, dtype, COLUMNS)
  from_read = -g * _product(g_error, states, dtype, ROWS)
  g_k += beta * from_read
  wide = k.astype(jnp.float32)
  by_beta = total(change) + total(from_read * wide)
  g_beta_ref[...] = _row(total(g_error * v_ref[...].astype(jnp.float32)) + by_beta)
  g_log_g += beta * by_beta
  g_log_g_row -= jnp.sum(beta * change, axis=1, keepdims=True)

  # S' = g_n S + k^T (d U)
  from_next = decay * _product(writes, rounded, dtype, ROWS)
  g_k_ref[...] = (g_k + from_next).astype(dtype)
  change = total(wide * from_next)
  kept = jnp.exp(last) * jnp.sum(total(states.astype(jnp.float32) * g_state), axis=1, keepdims=True)
  g_last = jnp.sum(change, axis=1, keepdims=True) + kept
  step = lax.broadcasted_iota(jnp.int32, (1, 1, CHUNK), 2)
  g_log_g_ref[...] = _row(g_log_g - change) + g_log_g_row + jnp.where(step == CHUNK - 1, g_last, 0)

  g_state = jnp.exp(last) * g_state + _product(q, g * g_readout.astype(jnp.float32), dtype, COLUMNS)
  g_state -= _product(k, beta * g * g_error, dtype, COLUMNS)
  carry_ref[...] = g_state

  @pl.when(pl.program_id(2) == count - 1)
  def _():
    g_state_ref[...] = g_state
