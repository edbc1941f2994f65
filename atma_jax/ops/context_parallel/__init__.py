"""The ops over a sequence that is split over devices: exact, forward and backward, a device never holds it whole.

To be called inside `jax.shard_map`. Device i of the n of a mesh axis holds the i-th of n equal pieces of the sequence; all arrays
are those of one device, T and S their lengths. What each op sends to other devices, per layer:

* Attention: keys and values go round a ring (`jax.lax.ppermute`), each hop folding them into the statistics of the local queries
  (`streaming.RingSteps`, or kernels with its methods), which is exact because statistics over disjoint keys merge exactly. A ring
  moves the bytes of an all-gather, (n - 1) 2 K D T, but holds two pieces instead of n and computes while it moves; queries would
  be H / K times heavier to move. The backward pass takes the gradients of keys and values along, in float32. A window ends the
  ring after as many hops as it reaches over.
* Causal work is even only if every device has early and late queries. So for attention alone the sequence is dealt out anew
  (`zigzag`): device i gets pieces i and 2n - 1 - i of 2n, for (2 H + 2 K) D T more elements a layer and two hops. Everything
  else, convolutions, memory, rotary positions and loss, keeps consecutive pieces, where a neighbour's last tokens are enough.
  Attention with a window of at most half the sequence keeps them too: its work is even enough.
* Gated-delta memory: a piece acts on the state as ``M -> M A + N``; the pairs (A, N), 2 D D H numbers in float32, are combined
  over the devices by doubling, in ceil(log2 n) exchanges, and the op then runs from the right state.
* Convolutions: the last taps - 1 inputs of the device before.
"""

from atma_jax.ops.context_parallel.delta import gated_delta
from atma_jax.ops.context_parallel.layout import unzigzag, zigzag
from atma_jax.ops.context_parallel.ring_attention import polar_attention, softmax_attention
from atma_jax.ops.context_parallel.short_conv import short_conv

__all__ = ["gated_delta", "polar_attention", "short_conv", "softmax_attention", "unzigzag", "zigzag"]
