"""The gated delta rule as GPU kernels: Pallas through Triton, in chunks, forward and backward, no atomics.

`atma_jax.ops.gated_delta.xla` says what a chunk computes. Here the state is kept transposed, ``S = M^T`` (D, Dv), and
the work is cut into kernels that see all chunks at once and kernels that carry the state from chunk to chunk, which do
as little as they can. With a chunk's ``g_p`` the product of its decays up to step p, ``r_ps = g_p / g_s`` for s <= p,
``d_s = g_n / g_s``, and X the inverse of ``I + L``, ``L = beta_p r_ps k_p.k_s`` for s < p:

  within    W = X (beta v),  E = X (beta g k)                       all chunks at once
  carry     U = W - E S;  S <- g_n S + k^T (d U)                    in turn, a head and a slice of Dv in a program
  read      (g q) S + A U,  A = r_ps q_p.k_s for s <= p             all chunks at once

The backward pass carries the state's cotangent in the other direction and then takes every chunk by itself.
"""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from atma_jax.ops.core import pallas as kernels
from atma_jax.ops.core import tiles as table

CHUNK = 64
CHUNK_WARPS = 4  # one warpgroup: tiles have 64 rows


def supports(q: jax.Array, k: jax.Array, v: jax.Array, **parameters) -> str | None:
  """Why the kernels cannot serve this call, or None if they can."""
  if any(parameters[name].dtype == jnp.float64 for name in ("log_gamma", "beta", "initial_state")):
    return "takes no float64"
  return kernels.refusal("gpu", q, k, v)


def gated_delta(q: jax.Array, k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array,
                initial_state: jax.Array, carry: table.Carry | None = None,
                interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta`; `carry` overrides the table, `interpret` runs the kernels without a GPU."""
  T = q.shape[1]
  carry = carry or table.delta(q.dtype.itemsize, q.shape[3], T)
  readout, state = _run(_pad(q), _pad(k), _pad(v), _log_g(log_gamma), _rows(beta), initial_state.mT.astype(jnp.float32), carry,
                        interpret)
  return readout[:, :T], state.mT


def transition(k: jax.Array, v: jax.Array, *, log_gamma: jax.Array, beta: jax.Array, carry: table.Carry | None = None,
               interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """See `atma_jax.ops.gated_delta.xla.transition`; `carry` and `interpret` as above."""
  (B, T, H, D), Dv = k.shape, v.shape[-1]
  k, v, log_g, beta = _pad(k), _pad(v), _log_g(log_gamma), _rows(beta)
  call = _Call(k, v, carry or table.delta(k.dtype.itemsize, D, T), interpret)
  writes, erases, _ = call.all_chunks("within", _within_kernel, (k, v, log_g, beta), (v, k, call.square))
  identity = jnp.broadcast_to(jnp.eye(D, dtype=jnp.float32), (B, H, D, D))
  changes = call.last_state("transition", _transition_kernel, (erases, k), (), log_g, identity)
  written = call.last_state("transition", _transition_kernel, (erases, k), (writes,), log_g,
                            jnp.zeros((B, H, D, Dv), jnp.float32))
  return changes.mT, written.mT


def _pad(x: jax.Array) -> jax.Array:
  """(B, T, ...) to whole chunks; a padded step has gamma 1 and beta 0 and leaves the state alone."""
  padding = -x.shape[1] % CHUNK
  return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))) if padding else x


def _rows(x: jax.Array) -> jax.Array:
  """(B, T, H) as (B, H, T) float32."""
  return jnp.swapaxes(_pad(x.astype(jnp.float32)), 1, 2)


def _log_g(log_gamma: jax.Array) -> jax.Array:
  """Log of the product of a chunk's decays up to each step, (B, H, T)."""
  log_gamma = _rows(log_gamma)
  return jnp.cumsum(log_gamma.reshape(*log_gamma.shape[:2], -1, CHUNK), axis=-1).reshape(log_gamma.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _run(q, k, v, log_g, beta, state, carry, interpret):
  return _run_forward(q, k, v, log_g, beta, state, carry, interpret)[0]


def _run_forward(q, k, v, log_g, beta, state, carry, interpret):
  call = _Call(q, v, carry, interpret)
  writes, erases, inverse = call.all_chunks("within", _within_kernel, (k, v, log_g, beta), (call.values, q, call.square))
  writes, states, final = call.carry("carry", _carry_kernel, (erases, k), (writes,), log_g, state)
  (readout,) = call.all_chunks("read", _read_kernel, (q, k, writes, states, log_g), (call.values,))
  outputs = erases, inverse, writes, states, readout, final
  erases, inverse, writes, states, readout, final = checkpoint_name(outputs, "gated_delta")
  return (readout, final), (q, k, v, log_g, beta, erases, inverse, writes, states)


def _run_backward(carry, interpret, residuals, cotangents):
  q, k, v, log_g, beta, erases, inverse, writes, states = residuals
  g_readout, g_final = cotangents
  call = _Call(q, v, carry, interpret)
  (g_writes,) = call.all_chunks("read_back", _read_back_kernel, (q, k, g_readout, log_g), (call.values,))
  g_writes, g_states, g_state = call.carry("carry_back", _carry_back_kernel, (q, k, erases), (g_readout, g_writes), log_g,
                                           g_final)
  g_q, g_k, g_log_g = call.all_chunks("read_chunks_back", _read_chunks_back_kernel,
                                      (q, k, writes, states, g_readout, log_g), (q, q, log_g))
  arguments = k, v, inverse, writes, states, g_writes, g_states, g_k, log_g, beta, g_log_g
  outputs = q, call.values, log_g, beta
  g_k, g_v, g_log_g, g_beta = call.all_chunks("write_chunks_back", _write_chunks_back_kernel, arguments, outputs)
  return g_q, _over_groups(g_k, k), _over_groups(g_v, v), g_log_g, g_beta, g_state


_run.defvjp(_run_forward, _run_backward)


def _over_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """The gradient of x (B, T, K, D) from that of each query head's, (B, T, H, D)."""
  if gradient.shape == x.shape:
    return gradient
  B, T, K, D = x.shape
  return jnp.sum(gradient.reshape(B, T, K, -1, D), axis=3, dtype=jnp.float32).astype(x.dtype)


class _Call:
  """Shapes of a call, and the two ways to run a kernel over it.

  The rank of an array tells its kind: (B, H, T) scalars, (B, T, H, D) vectors, (B, H, N, rows, columns) a matrix a chunk.
  """

  def __init__(self, q, v, carry, interpret):
    (self.B, self.T, self.H, self.D), self.Dv = q.shape, v.shape[3]
    self.values = jax.ShapeDtypeStruct((self.B, self.T, self.H, self.Dv), v.dtype)
    self.tile, self.interpret = carry, interpret
    self.N = self.T // CHUNK
    self.square = jax.ShapeDtypeStruct((self.B, self.H, self.N, CHUNK, CHUNK), q.dtype)
    self.states = jax.ShapeDtypeStruct((self.B, self.H, self.N, self.D, self.Dv), q.dtype)

  def group(self, x, h):
    """Which of the heads of x (B, T, heads, D) query head h reads."""
    return h if x.shape[2] == self.H else lax.div(h, self.H // x.shape[2])

  def all_chunks(self, name, kernel, inputs, outputs):
    """Runs one program a head and chunk."""
    def block(x):
      if x.ndim == 3:
        return pl.BlockSpec((None, None, CHUNK), lambda c, h, b: (b, h, c))
      if x.ndim == 4:
        return pl.BlockSpec((None, CHUNK, None, x.shape[3]), lambda c, h, b: (b, c, self.group(x, h), 0))
      return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda c, h, b: (b, h, c, 0, 0))

    return self._pallas_call(name, kernel, (self.N, self.H, self.B), inputs, map(block, inputs), outputs,
                             map(block, outputs), warps=CHUNK_WARPS, stages=1)

  def carry(self, name, kernel, whole, sliced, log_g, state):
    """Runs one program a head and slice of Dv; `whole` arrays have no Dv, `sliced` ones do.

    Returns one array like `sliced[0]`, a state (D, Dv) of each chunk, and the last state.
    """
    return self._carry(name, kernel, whole, sliced, log_g, state, (sliced[0], self.states))

  def last_state(self, name, kernel, whole, sliced, log_g, state):
    """The last of what `carry` returns."""
    return self._carry(name, kernel, whole, sliced, log_g, state, ())[0]

  def _carry(self, name, kernel, whole, sliced, log_g, state, outputs):
    tile, Dv = self.tile, state.shape[3]
    columns = tile.columns or (64 if self.B * self.H * Dv >= 96 * 64 else 32)  # enough programs for the multiprocessors
    rows_slice = pl.BlockSpec((None, self.T, None, columns), lambda j, h, b: (b, 0, h, j))
    scalars = pl.BlockSpec((None, None, self.T), lambda j, h, b: (b, h, 0))
    state_slice = pl.BlockSpec((None, None, self.D, columns), lambda j, h, b: (b, h, 0, j))
    states_slice = pl.BlockSpec((None, None, self.N, self.D, columns), lambda j, h, b: (b, h, 0, 0, j))

    def rows(x):
      return pl.BlockSpec((None, self.T, None, self.D), lambda j, h, b: (b, 0, self.group(x, h), 0))

    in_specs = (*map(rows, whole), *(rows_slice for _ in sliced), scalars, state_slice)
    out_specs = *(rows_slice if x.ndim == 4 else states_slice for x in outputs), state_slice
    return self._pallas_call(name, functools.partial(kernel, chunks=self.N), (Dv // columns, self.H, self.B),
                             (*whole, *sliced, log_g, state), in_specs, (*outputs, state), out_specs, warps=tile.warps,
                             stages=tile.stages)

  def _pallas_call(self, name, kernel, grid, inputs, in_specs, outputs, out_specs, *, warps, stages):
    return pl.pallas_call(
      kernel, name=f"gated_delta_{name}", grid=grid, in_specs=list(in_specs), out_specs=list(out_specs),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs], interpret=self.interpret,
      compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))(*inputs)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0), precise: bool = False) -> jax.Array:
  """Matrix product accumulated in float32; float32 operands are rounded to tf32 unless `precise`.

  A precise one is in tf32 parts: multiplied out in float32 the kernels take minutes to compile.
  """
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32,
                         precision=kernels.unrounded() if precise else None)


def _matmul(a: jax.Array, b: jax.Array, dtype: jnp.dtype, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of operands in the dtype of the inputs, accumulated in float32."""
  return _dot(a.astype(dtype), b.astype(dtype), contract, precise=dtype == jnp.float32)


def _ratios(log_g: jax.Array) -> jax.Array:
  """(n, n) g_p / g_s for s <= p, else 0; masked first, because it overflows for s > p."""
  return jnp.exp(jnp.where(_below(0), log_g[:, None] - log_g[None, :], -1e30))


def _below(offset: int) -> jax.Array:
  """(n, n) whether s + offset <= p."""
  step = jnp.arange(CHUNK)
  return step[:, None] >= step[None, :] + offset


def _last(x: jax.Array) -> jax.Array:
  """The last of (n,)."""
  return jnp.sum(jnp.where(jnp.arange(CHUNK) == CHUNK - 1, x, 0))


# Forward.


def _within_kernel(k_ref, v_ref, log_g_ref, beta_ref, writes_ref, erases_ref, inverse_ref):
  k, log_g, beta = k_ref[...], log_g_ref[...], beta_ref[...]
  lower = jnp.where(_below(1), beta[:, None] * _ratios(log_g) * _matmul(k, k, k.dtype, (1, 1)), 0)
  inverse = _unit_lower_inverse(lower, precise=k.dtype == jnp.float32)
  inverse_ref[...] = inverse.astype(inverse_ref.dtype)
  writes_ref[...] = _matmul(inverse, beta[:, None] * v_ref[...], k.dtype).astype(writes_ref.dtype)
  erases_ref[...] = _matmul(inverse, (beta * jnp.exp(log_g))[:, None] * k, k.dtype).astype(erases_ref.dtype)


def _unit_lower_inverse(lower: jax.Array, precise: bool) -> jax.Array:
  """Inverse of ``I + lower``: with X the inverse of its diagonal blocks of size h, that of size 2h is ``X - X C X``, C
  being the corners of `lower` in the larger blocks. As stable as substitution."""
  step = jnp.arange(CHUNK)
  row, column = step[:, None], step[None, :]
  inverse = jnp.where(row == column, 1.0, jnp.where(row // 2 == column // 2, -lower, 0))
  h = 2
  while h < CHUNK:
    corners = jnp.where((row // (2 * h) == column // (2 * h)) & (row // h != column // h), lower, 0)
    inverse -= _dot(inverse, _dot(corners, inverse, precise=precise), precise=precise)
    h *= 2
  return inverse


def _carry_kernel(erases_ref, k_ref, within_ref, log_g_ref, state_ref, writes_ref, states_ref, final_ref, *, chunks: int):
  def step(c, state):
    rows = pl.ds(c * CHUNK, CHUNK)
    k, log_g = k_ref[rows, :], log_g_ref[rows]
    rounded = state.astype(k.dtype)
    states_ref[c] = rounded
    writes = within_ref[rows, :] - _matmul(erases_ref[rows, :], rounded, k.dtype)
    writes_ref[rows, :] = writes.astype(writes_ref.dtype)
    last = _last(log_g)
    return jnp.exp(last) * state + _matmul(k, jnp.exp(last - log_g)[:, None] * writes, k.dtype, (0, 0))

  final_ref[...] = lax.fori_loop(0, chunks, step, state_ref[...])


def _transition_kernel(erases_ref, k_ref, *refs, chunks: int):
  """The last state alone; without writes within chunks, of what is carried."""
  *within_ref, log_g_ref, state_ref, final_ref = refs

  def step(c, state):
    rows = pl.ds(c * CHUNK, CHUNK)
    k, log_g = k_ref[rows, :], log_g_ref[rows]
    writes = -_matmul(erases_ref[rows, :], state, k.dtype)
    for ref in within_ref:
      writes += ref[rows, :]
    last = _last(log_g)
    return jnp.exp(last) * state + _matmul(k, jnp.exp(last - log_g)[:, None] * writes, k.dtype, (0, 0))

  final_ref[...] = lax.fori_loop(0, chunks, step, state_ref[...])


def _read_kernel(q_ref, k_ref, writes_ref, states_ref, log_g_ref, readout_ref):
  q, log_g = q_ref[...], log_g_ref[...]
  attention = _ratios(log_g) * _matmul(q, k_ref[...], q.dtype, (1, 1))
  readout = jnp.exp(log_g)[:, None] * _matmul(q, states_ref[...], q.dtype)
  readout_ref[...] = (readout + _matmul(attention, writes_ref[...], q.dtype)).astype(readout_ref.dtype)


# Backward. A name with g_ is the cotangent of what follows.


def _read_back_kernel(q_ref, k_ref, g_readout_ref, log_g_ref, g_writes_ref):
  q = q_ref[...]
  attention = _ratios(log_g_ref[...]) * _matmul(q, k_ref[...], q.dtype, (1, 1))
  g_writes_ref[...] = _matmul(attention, g_readout_ref[...], q.dtype, (0, 0)).astype(g_writes_ref.dtype)


def _carry_back_kernel(q_ref, k_ref, erases_ref, g_readout_ref, g_read_ref, log_g_ref, g_final_ref, g_writes_ref,
                       g_states_ref, g_state_ref, *, chunks: int):
  def step(i, g_state):  # of the state after chunk c
    c = chunks - 1 - i
    rows = pl.ds(c * CHUNK, CHUNK)
    k, log_g = k_ref[rows, :], log_g_ref[rows]
    rounded, last = g_state.astype(k.dtype), _last(log_g)
    g_states_ref[c] = rounded
    g_writes = g_read_ref[rows, :] + jnp.exp(last - log_g)[:, None] * _matmul(k, rounded, k.dtype)
    g_writes = g_writes.astype(k.dtype)
    g_writes_ref[rows, :] = g_writes
    read = _matmul(q_ref[rows, :], jnp.exp(log_g)[:, None] * g_readout_ref[rows, :], k.dtype, (0, 0))
    return jnp.exp(last) * g_state + read - _matmul(erases_ref[rows, :], g_writes, k.dtype, (0, 0))

  g_state_ref[...] = lax.fori_loop(0, chunks, step, g_final_ref[...])


def _read_chunks_back_kernel(q_ref, k_ref, writes_ref, states_ref, g_readout_ref, log_g_ref, g_q_ref, g_k_ref, g_log_g_ref):
  """Through readout = g q S + A U, to everything but U and S."""
  q, k, log_g, g_readout = q_ref[...], k_ref[...], log_g_ref[...], g_readout_ref[...]
  ratios = _ratios(log_g)
  g_attention = ratios * _matmul(g_readout, writes_ref[...], k.dtype, (1, 1))
  change = g_attention * _matmul(q, k, k.dtype, (1, 1))
  g_log_g = jnp.sum(change, axis=1) - jnp.sum(change, axis=0)
  g_k_ref[...] = _matmul(g_attention, q, k.dtype, (0, 0)).astype(g_k_ref.dtype)
  g_q = jnp.exp(log_g)[:, None] * _matmul(g_readout, states_ref[...], k.dtype, (1, 1))
  g_log_g_ref[...] = g_log_g + jnp.sum(q * g_q, axis=1)
  g_q_ref[...] = (g_q + _matmul(g_attention, k, k.dtype)).astype(g_q_ref.dtype)


def _write_chunks_back_kernel(k_ref, v_ref, inverse_ref, writes_ref, states_ref, g_writes_ref, g_states_ref, g_k_read_ref,
                              log_g_ref, beta_ref, g_log_g_read_ref, g_k_ref, g_v_ref, g_log_g_ref, g_beta_ref):
  """Through the rest, adding what came through the readout."""
  k, log_g, beta, writes = k_ref[...], log_g_ref[...], beta_ref[...], writes_ref[...]
  dtype, last = k.dtype, _last(log_g)

  # L = beta r k.k below the diagonal; U = X beta (v - g k S), X the inverse of I + L
  g_error = _matmul(inverse_ref[...], g_writes_ref[...], dtype, (0, 0))  # before the factor beta
  g_v_ref[...] = (beta[:, None] * g_error).astype(g_v_ref.dtype)
  g_beta = jnp.sum(g_error * v_ref[...], axis=1)
  g_error = g_error.astype(dtype)
  g_lower = jnp.where(_below(1), -_ratios(log_g) * _matmul(g_error, writes, dtype, (1, 1)), 0)
  change = g_lower * _matmul(k, k, dtype, (1, 1))
  g_beta += jnp.sum(change, axis=1)
  g_log_g = beta * jnp.sum(change, axis=1) - jnp.sum(beta[:, None] * change, axis=0)
  g_lower = (beta[:, None] * g_lower).astype(dtype)
  g_k = g_k_read_ref[...] + _matmul(g_lower, k, dtype) + _matmul(g_lower, k, dtype, (0, 0))

  from_read = -jnp.exp(log_g)[:, None] * _matmul(g_error, states_ref[...], dtype, (1, 1))
  change = jnp.sum(from_read * k, axis=1)
  g_beta_ref[...] = g_beta + change
  g_log_g += beta * change
  g_k += beta[:, None] * from_read

  # S' = g_n S + k^T (d U)
  from_next = jnp.exp(last - log_g)[:, None] * _matmul(writes, g_states_ref[...], dtype, (1, 1))
  change = jnp.sum(k * from_next, axis=1)
  decayed = jnp.exp(last) * jnp.sum(states_ref[...].astype(jnp.float32) * g_states_ref[...])
  g_log_g += jnp.where(jnp.arange(CHUNK) == CHUNK - 1, jnp.sum(change) + decayed, 0) - change
  g_log_g_ref[...] = g_log_g + g_log_g_read_ref[...]
  g_k_ref[...] = (g_k + from_next).astype(g_k_ref.dtype)
