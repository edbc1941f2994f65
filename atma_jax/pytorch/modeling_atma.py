"""The ATMA decoder (arXiv 2606.25156) for `transformers`, in plain PyTorch: configuration, model and cache in one file.

It lies beside exported weights, where ``AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`` finds it, and
needs nothing but torch and transformers. atma_jax copies it there and never imports it.

Axis letters: B batch, T time (queries), S keys, C model width, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

ROPE_SCALE, ROPE_BASE = 0.12, 1024.0
HEAD_EPS = float(torch.finfo(torch.float32).eps)  # of the norms of heads, which have no weight
NORM_FLOOR = 1e-6  # norm of the attended vector below which the direction shrinks with it
FORGETS = -40.0  # log-decay that leaves nothing of the memory
QUERIES = 512  # whose scores exist at once
CHUNK = 64  # tokens that the memory takes at once
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # as transformers calls it


DEFAULTS: dict[str, Any] = {  # the fields of config.json
  "vocab_size": 50304,  # tokens that the embedding and the head know
  "hidden_size": 1024,  # width of the residual stream, C
  "num_hidden_layers": 16,  # blocks
  "num_attention_heads": 8,  # query heads, H
  "num_key_value_heads": 2,  # key/value heads, K
  "head_dim": 128,  # size of a head, D
  "intermediate_size": 4096,  # hidden units of the gated MLP
  "block_pattern": ("local", "local", "global", "local"),  # kinds of mixer, repeated over the depth
  "attn_type": "polar",  # core of the global mixers: polar, nope or rope
  "attn_window": None,  # keys that each query may see; None is all before it
  "attn_kernel_size": 4,  # taps of the convolutions on queries, keys and values
  "conv_kernel_size": 3,  # taps of the gated short convolution
  "attn_null_length": None,  # visible keys at which the null's logit stops growing; None is never
  "attn_count_length": None,  # visible keys past which null and magnitude are told the count relative to it; None is never
  "attn_direction_scale": 1.0,  # length of the direction
  "mem_enabled": True,  # whether global mixers have a gated-delta memory
  "mem_gamma_bias": 3.9,  # added to the logit of its decay gate
  "mem_beta_bias": 0.0,  # added to the logit of its write gate
  "mem_max_half_life": None,  # tokens that no head's half-life exceeds; None is no bound
  "mem_reset": None,  # tokens after which the memory begins again; None is never
  "mem_off": False,  # leave out what is read from the memory
  "logit_cap": 15.0,  # bound c on the logits: z becomes c z / sqrt(z^2 + c^2)
  "rms_norm_eps": 1e-6,  # added to the mean square in the norms of the residual stream
  "max_position_embeddings": 2048,  # tokens of a training sequence; longer ones are legal
  "initializer_range": 1.0,  # factor of the initial weights, whose variance is otherwise 1 / fan-in
  "use_cache": True,  # whether `forward` makes a cache by default
}


class AtmaConfig(PretrainedConfig):
  """The fields of config.json; see `DEFAULTS`."""

  model_type = "atma"
  keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

  def __init__(self, tie_word_embeddings: bool = False, **kwargs: Any):
    for name, default in DEFAULTS.items():
      setattr(self, name, kwargs.pop(name, default))
    self.block_pattern = list(self.block_pattern)
    if self.attn_type not in ("polar", "nope", "rope"):
      raise ValueError(f"attn_type={self.attn_type!r}: legal: polar, nope, rope")
    if not set(self.block_pattern) <= {"local", "global"}:
      raise ValueError(f"block_pattern={self.block_pattern}: legal: local, global")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                       f"num_key_value_heads={self.num_key_value_heads}")
    super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

  @property
  def layer_kinds(self) -> list[str]:
    """The kind of mixer of every layer."""
    return [self.block_pattern[layer % len(self.block_pattern)] for layer in range(self.num_hidden_layers)]


class AtmaCache(Cache):
  """What generation remembers: keys and values, the last inputs of the convolutions, and the states of the memories.

  It cannot be cropped, because a memory cannot forget single tokens.

  Attributes:
    states: tensors by name for every layer, each with a first axis of B rows.
    length: tokens so far, padding included.
    mask: (B, length), which of them count; None if all do.
  """

  def __init__(self) -> None:
    super().__init__(layers=[])
    self.reset()

  def reset(self) -> None:
    """Forgets everything."""
    self.states: dict[int, dict[str, torch.Tensor]] = {}
    self.length = 0
    self.mask: torch.Tensor | None = None

  def of_layer(self, layer: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer, to be read and replaced."""
    return self.states.setdefault(layer, {})

  def __len__(self) -> int:
    return len(self.states)

  def __repr__(self) -> str:
    return f"AtmaCache({self.length} tokens, {len(self)} layers)"

  def get_seq_length(self, layer_idx: int = 0) -> int:
    """Tokens so far."""
    del layer_idx
    return self.length

  def get_max_length(self, layer_idx: int | None = None) -> int:
    """-1: there is no limit."""
    del layer_idx
    return -1

  get_max_cache_shape = get_max_length  # as older versions of transformers call it

  def reorder_cache(self, beam_idx: torch.Tensor) -> None:
    """Gives every row the cache of another, for beam search."""
    for state in self.states.values():
      state.update({name: tensor.index_select(0, beam_idx.to(tensor.device)) for name, tensor in state.items()})
    self.mask = None if self.mask is None else self.mask.index_select(0, beam_idx.to(self.mask.device))

  def crop(self, max_length: int) -> None:
    """Refuses: a memory cannot forget single tokens."""
    raise NotImplementedError("an AtmaCache cannot be cropped, because its memory cannot forget single tokens")

  @property
  def is_compileable(self) -> bool:
    return False

  @property
  def is_croppable(self) -> bool:
    return False

  @property
  def is_initialized(self) -> bool:
    return self.length > 0

  @property
  def is_sliding(self) -> list[bool]:
    return [False] * max(len(self), 1)

  @property
  def is_linear(self) -> list[bool]:
    return [False] * max(len(self), 1)


class Span:
  """Where new tokens stand.

  Attributes:
    real: (B, T), which tokens are no padding; None if all are.
    keys_real: (B, past + T), likewise, those in the cache included.
    positions: (B, T) or (1, T), how many tokens that count stand before each.
    past: tokens in the cache, padding included.
  """

  def __init__(self, tokens: int, device: torch.device, attention_mask: torch.Tensor | None, cache: AtmaCache | None):
    self.past = 0 if cache is None else cache.length
    self.real = self.keys_real = None
    mask = attention_mask
    if mask is not None and mask.dim() != 2:
      raise ValueError(f"attention_mask: must be of shape (batch, tokens), not {tuple(mask.shape)}")
    if mask is None and cache is not None and cache.mask is not None:
      mask = torch.cat([cache.mask, cache.mask.new_ones(cache.mask.shape[0], tokens)], dim=1)
    if mask is not None:
      mask = mask.to(device) > 0
      if mask.shape[1] != self.past + tokens:
        raise ValueError(f"attention_mask: must cover {self.past + tokens} tokens, {self.past} in the cache and {tokens} new "
                         f"ones, not {mask.shape[1]}")
      if not bool(mask.all()):
        starts = mask & ~F.pad(mask, (1, 0))[:, :-1]
        if bool((starts.sum(1) > 1).any()):
          raise ValueError("attention_mask: the tokens of a row must stand together; padding may come before them or, where "
                           "nothing follows, after them")
        self.keys_real, self.real = mask, mask[:, self.past:]
    if self.keys_real is None:
      self.positions = torch.arange(self.past, self.past + tokens, device=device)[None]
    else:
      self.positions = (self.keys_real.long().cumsum(1) - 1).clamp(min=0)[:, self.past:]

  def without_padding(self, x: torch.Tensor) -> torch.Tensor:
    """x (B, T, ...) with zeros in place of padding."""
    return x if self.real is None else x * self.real.view(*self.real.shape, *[1] * (x.dim() - 2)).to(x.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
  """x in float32, or in float64 if it is."""
  return x if x.dtype == torch.float64 else x.float()


def unit_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
  """x over its root mean square along the last axis."""
  y = wide(x)
  return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def unit_length(x: torch.Tensor) -> torch.Tensor:
  """x over its Euclidean norm along the last axis, in float32 or wider."""
  y = wide(x)
  return y / torch.sqrt(y.square().sum(-1, keepdim=True) + 1e-24).clamp(min=1e-12)


class AtmaRMSNorm(nn.Module):
  """x over its root mean square, times a learned weight."""

  def __init__(self, width: int, eps: float):
    super().__init__()
    self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return (unit_rms(wide(x), self.eps) * wide(self.weight)).to(x.dtype)


class AtmaOutput(nn.Linear):
  """A projection to the residual stream or to logits, which training starts from zero."""


class AtmaShortConv(nn.Conv1d):
  """Depthwise causal convolution without bias; its weight is (channels, 1, taps), the last tap for the current token."""

  def __init__(self, channels: int, taps: int):
    super().__init__(channels, channels, taps, groups=channels, bias=False)

  def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:  # pyright: ignore
    """The convolution of x (B, T, channels), which follows the inputs that ``state[name]`` holds; they are replaced."""
    before = self.kernel_size[0] - 1
    past = state.get(name)
    past = x.new_zeros(x.shape[0], before, x.shape[2]) if past is None else past.to(x.dtype)
    inputs = torch.cat([past, x], dim=1)
    state[name] = inputs[:, inputs.shape[1] - before:]
    return super().forward(inputs.transpose(1, 2)).transpose(1, 2)


class AtmaMLP(nn.Module):
  """``W_proj(g * relu(u)^2)`` with ``[u, g] = split(W_fc x)``."""

  def __init__(self, config: AtmaConfig):
    super().__init__()
    self.fc = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
    self.proj = AtmaOutput(config.intermediate_size, config.hidden_size)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    u, g = self.fc(x).chunk(2, dim=-1)
    return self.proj(g * F.relu(u).square())


class AtmaLocalMixer(nn.Module):
  """The gated short convolution: ``[b, c, h] = split(W_in x);  y = W_out(c * conv(b * h))``."""

  def __init__(self, config: AtmaConfig):
    super().__init__()
    width = config.hidden_size
    self.in_proj, self.out_proj = nn.Linear(width, 3 * width), AtmaOutput(width, width)
    self.conv = AtmaShortConv(width, config.conv_kernel_size)

  def forward(self, x: torch.Tensor, span: Span, state: dict[str, torch.Tensor]) -> torch.Tensor:
    b, c, h = self.in_proj(x).chunk(3, dim=-1)
    return self.out_proj(c * self.conv(span.without_padding(b * h), state, "conv"))


class AtmaMemory(nn.Module):
  """The gated-delta memory: one matrix per head, which decays, is corrected, and is then read, at every token."""

  def __init__(self, config: AtmaConfig):
    super().__init__()
    self.config, width, heads = config, config.hidden_size, config.num_attention_heads
    self.w_gamma, self.w_beta = nn.Linear(width, heads), nn.Linear(width, heads)
    self.gate = nn.Linear(width, heads * config.head_dim)
    self.proj = AtmaOutput(heads * config.head_dim, width)

  def forward(self, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span,
              state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output for the block's normed input x (B, T, C); q (B, T, H, D), k and v (B, T, K, D) are those of the mixer."""
    config, groups = self.config, q.shape[2] // k.shape[2]
    log_gamma = F.logsigmoid(wide(self.w_gamma(x)) + config.mem_gamma_bias)
    if config.mem_max_half_life is not None:
      log_gamma = log_gamma - math.log(2) / config.mem_max_half_life
    if config.mem_reset is not None:
      log_gamma = torch.where((span.positions % config.mem_reset == 0)[..., None], FORGETS, log_gamma)
    beta = torch.sigmoid(wide(self.w_beta(x)) + config.mem_beta_bias)
    log_gamma, beta = span.without_padding(log_gamma), span.without_padding(beta)
    k, v = unit_length(k).repeat_interleave(groups, dim=2), wide(v).repeat_interleave(groups, dim=2)
    q, k, v, log_gamma, beta = (y.transpose(1, 2) for y in (unit_length(q), k, v, log_gamma, beta))
    readout, state["memory"] = gated_delta(q, k, v, log_gamma, beta, state.get("memory"))
    if config.mem_off:
      readout = torch.zeros_like(readout)
    readout = unit_rms(readout.transpose(1, 2).to(x.dtype), HEAD_EPS).flatten(2)
    return self.proj(readout * torch.sigmoid(self.gate(x)))


def gated_delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gamma: torch.Tensor, beta: torch.Tensor,
                memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
  """``M_t = gamma_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  r_t = M_t q_t``, a chunk of tokens at a time.

  With ``u_p`` what token p adds, so that ``M_p = g_p M_0 + sum_{s<=p} (g_p / g_s) u_s k_s^T`` and g the decay since the chunk
  began, the u of a chunk solve a triangular system of equations.

  Args:
    q, k, v: (B, H, T, D); q and k of unit length.
    log_gamma, beta: (B, H, T).
    memory: (B, H, D, D), values by keys; None is zeros.

  Returns:
    The readout (B, H, T, D), and the memory after the last token.
  """
  B, H, T, D = q.shape
  M = q.new_zeros(B, H, D, D) if memory is None else memory.to(q.dtype)
  readouts = []
  for start in range(0, T, CHUNK):
    qc, kc, vc, gc, bc = (x[:, :, start:start + CHUNK] for x in (q, k, v, log_gamma, beta))
    decay = gc.cumsum(-1)  # log of g
    size = decay.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    ratios = torch.exp((decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -math.inf))  # g_p / g_s for s <= p
    system = (bc[..., None] * ratios * (kc @ kc.transpose(-1, -2))).tril(-1)
    g = torch.exp(decay)[..., None]
    right = bc[..., None] * (vc - g * (kc @ M.transpose(-1, -2)))
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    readouts.append(g * (qc @ M.transpose(-1, -2)) + (ratios * (qc @ kc.transpose(-1, -2))) @ u)
    M = g[..., -1:, :] * M + (ratios[..., -1, :, None] * u).transpose(-1, -2) @ kc
  return torch.cat(readouts, dim=2), M


class AtmaGlobalMixer(nn.Module):
  """Attention over the whole context with a polar, nope or rope core, and the memory beside it."""

  def __init__(self, config: AtmaConfig):
    super().__init__()
    self.config = config
    width, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    inner, inner_kv = heads * dim, config.num_key_value_heads * dim
    self.q, self.k, self.v = nn.Linear(width, 2 * inner), nn.Linear(width, inner_kv), nn.Linear(width, inner_kv)
    self.proj = AtmaOutput(inner, width)
    if config.attn_type != "rope":
      self.canon_q = AtmaShortConv(inner, config.attn_kernel_size)
      self.canon_k = AtmaShortConv(inner_kv, config.attn_kernel_size)
      self.canon_v = AtmaShortConv(inner_kv, config.attn_kernel_size)
    if config.attn_type == "polar":
      self.null_base, self.null_slope_raw = nn.Parameter(torch.full((heads,), 2.0)), nn.Parameter(torch.full((heads,), 0.5))
      self.len_gain_raw, self.mag_beta_raw = nn.Parameter(torch.full((heads,), -1.0)), nn.Parameter(torch.full((heads,), -1.5))
      self.v_null = nn.Parameter(torch.zeros(heads, dim))
      self.mu_proj = AtmaOutput(heads, width)
    if config.mem_enabled:
      self.mem = AtmaMemory(config)

  def forward(self, x: torch.Tensor, span: Span, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config, (B, T, _) = self.config, x.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, gate = self.q(x).view(B, T, heads, 2 * dim).chunk(2, dim=-1)
    q = unit_rms(q, HEAD_EPS)
    k = unit_rms(self.k(x).view(B, T, kv_heads, dim), HEAD_EPS)
    v = self.v(x).view(B, T, kv_heads, dim)
    if config.attn_type != "rope":
      q, k, v = (self._canon(z, name, span, state) for z, name in ((q, "canon_q"), (k, "canon_k"), (v, "canon_v")))
    read = self.mem(x, q, k, v, span, state) if config.mem_enabled else None
    if config.attn_type == "rope":
      q, k = rotary(q, span.positions), rotary(k, span.positions)
    keys, values, first = self._remember(k, v, span, state)
    found, magnitude = self._attend(q, keys, values, first, span)
    output = self.proj((found * torch.sigmoid(gate)).reshape(B, T, -1))
    if magnitude is not None:
      output = output + self.mu_proj(magnitude.to(x.dtype))
    return output if read is None else output + read

  def _canon(self, z: torch.Tensor, name: str, span: Span, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """``z + conv(z)`` over the flattened heads."""
    flat = span.without_padding(z).flatten(2)
    return (flat + getattr(self, name)(flat, state, name)).view_as(z)

  def _remember(self, k: torch.Tensor, v: torch.Tensor, span: Span,
                state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values so far, (B, K, S, D), and the index of the first token that they are of; a window drops older ones."""
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if "keys" in state:
      keys, values = torch.cat([state["keys"], keys], dim=2), torch.cat([state["values"], values], dim=2)
    first = span.past + k.shape[1] - keys.shape[2]
    kept = keys.shape[2] if self.config.attn_window is None else min(self.config.attn_window - 1, keys.shape[2])
    state["keys"], state["values"] = keys[:, :, keys.shape[2] - kept:], values[:, :, values.shape[2] - kept:]
    return keys, values, first

  def _attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int,
              span: Span) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Heads (B, T, H, D) and, for polar attention, magnitudes (B, T, H); a block of queries at a time.

    Args:
      q: (B, T, H, D), the last T of the tokens so far.
      keys, values: (B, K, S, D).
      first: index of the token that the first key is of.
      span: where the queries stand.
    """
    config, (B, T, H, D) = self.config, q.shape
    K, window = keys.shape[1], config.attn_window
    keys, values = wide(keys), wide(values)
    found, magnitudes = [], []
    for start in range(0, T, QUERIES):
      block = wide(q[:, start:start + QUERIES])
      queries = torch.arange(span.past + start, span.past + start + block.shape[1], device=q.device)  # indices of tokens
      low = first if window is None else max(first, int(span.past + start - window + 1))
      high = span.past + start + block.shape[1]
      seen_keys, seen_values = keys[:, :, low - first:high - first], values[:, :, low - first:high - first]
      distance = queries[:, None] - torch.arange(low, high, device=q.device)
      visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
      visible = visible[None]  # (B or 1, t, s)
      if span.keys_real is not None:  # padding sees itself, which nothing reads, so that no softmax is over nothing
        visible = visible & (span.keys_real[:, None, low:high] | (distance == 0))
      grouped = block.view(B, -1, K, H // K, D).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, K, G t, D)
      scores = (grouped @ seen_keys.transpose(-1, -2)).view(B, K, H // K, -1, high - low)
      scores = scores * (ROPE_SCALE if config.attn_type == "rope" else D**-0.5)
      if config.attn_type == "polar":
        heads, magnitude = self._polar(scores, visible[:, None, None], seen_values, span.positions[:, start:start + QUERIES])
        magnitudes.append(magnitude)
      else:
        weights = torch.softmax(scores.masked_fill(~visible[:, None, None], -math.inf), dim=-1)
        heads = weights.flatten(2, 3) @ seen_values
      found.append(heads.view(B, K, H // K, -1, D).permute(0, 3, 1, 2, 4).reshape(B, -1, H, D).to(q.dtype))
    return torch.cat(found, dim=1), torch.cat(magnitudes, dim=1) if magnitudes else None

  def _polar(self, scores: torch.Tensor, visible: torch.Tensor, values: torch.Tensor,
             positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions, times their length (B, K, G t, D), and magnitudes (B, t, H), of scores ``q.k / sqrt(D)`` (B, K, G, t, s)."""
    config, (B, K, G, t, _) = self.config, scores.shape
    n = (positions + 1).to(scores.dtype)
    if config.attn_window is not None:
      n = n.clamp(max=config.attn_window)
    n = n[:, None, None]  # (B or 1, 1, 1, t)

    def per_head(raw: torch.Tensor) -> torch.Tensor:
      return raw.to(scores.dtype).view(1, K, G, 1)

    gain, rate = F.softplus(per_head(self.len_gain_raw)), F.softplus(per_head(self.mag_beta_raw))
    held = n if config.attn_count_length is None else n.clamp(max=config.attn_count_length)
    counted = held if config.attn_null_length is None else held.clamp(max=config.attn_null_length)
    temperature = 1 + gain * torch.log(n)
    null = per_head(self.null_base) + F.softplus(per_head(self.null_slope_raw)) * torch.sqrt(torch.log(counted + 1))
    null = (1 + gain * torch.log(held)) * null + (torch.log(n) - torch.log(held))
    rate = rate * torch.log1p(held) / torch.log1p(n)

    logits = (temperature[..., None] * scores).masked_fill(~visible, -math.inf)
    keys_only = torch.softmax(logits, dim=-1)
    w_null = torch.sigmoid(null - torch.logsumexp(logits, dim=-1))
    attended = (keys_only.flatten(2, 3) @ values).view(B, K, G, t, -1) * (1 - w_null)[..., None]
    attended = attended + w_null[..., None] * self.v_null.to(scores.dtype).view(1, K, G, 1, -1)
    norm = torch.sqrt(attended.square().sum(-1, keepdim=True).clamp(min=NORM_FLOOR**2))
    n_eff = 1 / keys_only.square().sum(-1)
    magnitude = torch.tanh(rate * torch.log1p(n_eff * (1 - w_null)))
    return (config.attn_direction_scale * attended / norm).flatten(2, 3), magnitude.permute(0, 3, 1, 2).reshape(B, t, K * G)


def rotary(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
  """Half-truncated rotary embedding: the pairs (x_d, x_{d + D/2}) of heads (B, T, heads, D) turn, but half of them at rate 0."""
  quarter = x.shape[-1] // 4
  rates = ROPE_BASE ** -torch.linspace(0, 1, quarter, dtype=torch.float64, device=x.device)
  y = wide(x)
  rates = torch.cat([rates, rates.new_zeros(quarter)]).to(y.dtype)
  angles = positions.to(y.dtype)[..., None, None] * rates
  cos, sin = torch.cos(angles), torch.sin(angles)
  x1, x2 = y.chunk(2, dim=-1)
  return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class AtmaBlock(nn.Module):
  """A mixer and an MLP on the residual stream, each behind a norm."""

  def __init__(self, config: AtmaConfig, kind: str):
    super().__init__()
    self.norm1 = AtmaRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.attn = AtmaGlobalMixer(config) if kind == "global" else AtmaLocalMixer(config)
    self.norm2 = AtmaRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.mlp = AtmaMLP(config)

  def forward(self, x: torch.Tensor, span: Span, state: dict[str, torch.Tensor]) -> torch.Tensor:
    x = x + self.attn(self.norm1(x), span, state)
    return x + self.mlp(self.norm2(x))


class AtmaPreTrainedModel(PreTrainedModel):
  """What transformers has to know about the architecture."""

  config_class = AtmaConfig
  base_model_prefix = "model"
  _no_split_modules = ["AtmaBlock"]  # noqa: RUF012
  _keys_to_ignore_on_load_unexpected = [r"attn\.rotary\.angular_freq"]  # noqa: RUF012  # computed here
  _is_stateful = True  # the memory cannot go back, which assisted generation needs

  @torch.no_grad()
  def _init_weights(self, module: nn.Module) -> None:
    """The start of training: variance 1 / fan-in, and zero where a mixer or an MLP adds to the residual stream."""
    scale = self.config.initializer_range
    if isinstance(module, (nn.Linear, nn.Conv1d)):
      fan_in = module.weight[0].numel()
      nn.init.normal_(module.weight, std=0.0 if isinstance(module, AtmaOutput) else scale / math.sqrt(fan_in))
      if module.bias is not None:
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
      nn.init.normal_(module.weight, std=scale)
    elif isinstance(module, AtmaRMSNorm):
      nn.init.ones_(module.weight)
    if isinstance(module, AtmaGlobalMixer) and module.config.attn_type == "polar":
      for raw, value in ((module.null_base, 2.0), (module.null_slope_raw, 0.5), (module.len_gain_raw, -1.0),
                         (module.mag_beta_raw, -1.5), (module.v_null, 0.0)):
        nn.init.constant_(raw, value)


class AtmaForCausalLM(AtmaPreTrainedModel, GenerationMixin):
  """The decoder with its head: token ids in, soft-capped logits out.

  Padding may stand before a row's tokens (as generation needs it) or, where nothing follows, after them. `attention_mask` is
  (B, T), and with a cache covers the cached tokens too.
  """

  def __init__(self, config: AtmaConfig):
    super().__init__(config)
    self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
    self.blocks = nn.ModuleList([AtmaBlock(config, kind) for kind in config.layer_kinds])
    self.norm = AtmaRMSNorm(config.hidden_size, config.rms_norm_eps)
    self.proj = AtmaOutput(config.hidden_size, config.vocab_size)
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.embed

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.embed = value

  def get_output_embeddings(self) -> nn.Module:
    return self.proj

  def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
    self.proj = new_embeddings

  @classmethod
  def _supports_default_dynamic_cache(cls) -> bool:
    """No: `forward` makes an `AtmaCache` itself."""
    return False

  def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
              past_key_values: AtmaCache | None = None, cache: AtmaCache | None = None,
              inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
              output_hidden_states: bool | None = None, output_attentions: bool | None = None, return_dict: bool | None = None,
              logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
    """The logits (B, T, V), in float32 or wider, of tokens that follow those of a cache.

    Args:
      input_ids: (B, T).
      attention_mask: (B, T), or (B, past + T) with a cache; 0 is padding.
      past_key_values, cache: what an earlier call returned; two names, for older and newer versions of transformers.
      inputs_embeds: (B, T, C) in place of `input_ids`.
      labels: (B, T), which are shifted here; -100 does not count.
      use_cache: return a cache.
      output_hidden_states: return the residual stream before every block, and the output of the final norm.
      output_attentions: must not be set.
      return_dict: False returns a tuple.
      logits_to_keep: compute only the last so many logits, or those at these indices; 0 is all.
      **kwargs: of the loss.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("exactly one of input_ids and inputs_embeds is needed")
    if output_attentions:
      raise ValueError("output_attentions: attention weights are not kept; leave it out")
    if kwargs.get("position_ids") is not None:
      kwargs.pop("position_ids")  # positions are counted here, from attention_mask
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, AtmaCache):
      raise ValueError(f"cache: must be an AtmaCache, not {type(cache).__name__}")
    use_cache = self.config.use_cache if use_cache is None else use_cache
    if cache is None and use_cache:
      cache = AtmaCache()
    x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
    span = Span(x.shape[1], x.device, attention_mask, cache)
    keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    hidden_states = []
    for index, block in enumerate(self.blocks):
      hidden_states += [x] if keep_hidden else []
      x = block(x, span, {} if cache is None else cache.of_layer(index))
    if cache is not None:
      cache.length, cache.mask = span.past + x.shape[1], span.keys_real
    x = self.norm(x)
    hidden_states += [x] if keep_hidden else []
    kept = x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
    z = F.linear(wide(kept), wide(self.proj.weight), wide(self.proj.bias))
    cap = self.config.logit_cap
    logits = cap * z * torch.rsqrt(z.square() + cap**2)
    loss = None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
    output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=tuple(hidden_states) if keep_hidden else None,
                                    **{CACHE_FIELD: cache if use_cache else None})
    return output if return_dict is not False else output.to_tuple()
