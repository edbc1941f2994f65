"""Every option of atma_jax, with its one default, as plain dataclasses.

Layer 0: standard library only. A recipe in ``configs/`` returns a `Config`; flags override its fields
(``--config.model.attention=nope``); `Config.validate` is called once, before anything is built, and from then on
the configuration is treated as constant. `Config.to_dict` is what a checkpoint stores beside its weights.

Axis letters, used everywhere: B batch, T time (queries), S keys, C model width, H query heads, K key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from atma_jax.errors import UserError, unknown_name

ATTENTIONS = ("polar", "nope", "rope")
MIXERS = ("local", "global", "raven")
INITS = ("default", "published", "mimetic")
DTYPES = ("bfloat16", "float16", "float32", "float64")
REMATS = ("none", "dots", "block")
IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas_gpu", "pallas_tpu")
CLIP_BASES = ("sum", "mean")
MUON_VARIANTS = ("published", "quintic5")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine")
REGULARIZERS = ("baseline", "weak", "strong", "discrete", "zipfian")


@dataclasses.dataclass(unsafe_hash=True)  # modules keep it as a static attribute
class MemoryConfig:
  """Gated-delta memory."""

  enabled: bool = True
  gamma_bias: float = 3.9  # added to the decay gate's logit
  beta_bias: float = 0.0  # added to the write gate's logit
  max_half_life: float | None = None  # tokens no head's half-life can exceed, in training too; None is no bound


@dataclasses.dataclass(unsafe_hash=True)
class RavenConfig:
  """Slots of a Raven mixer; heads, head size and memory are the model's."""

  slots: int = 256
  top_k: int = 32  # slots that a token writes to


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """The network. Defaults are the published 378M size."""

  vocab_size: int = 50304
  num_layers: int = 16
  width: int = 1024  # C
  num_heads: int = 8  # H
  num_kv_heads: int = 2  # K
  head_dim: int = 128  # D
  mlp_width: int = 4096  # hidden units of the gated MLP, 4 C as published
  block_pattern: tuple[str, ...] = ("local", "local", "global", "local")  # repeated over the depth
  attention: str = "polar"
  window: int | None = None  # keys each query may see; None is full causal attention
  null_length: int | None = None  # visible keys at which polar attention's null logit stops growing; None is never, as published
  count_length: int | None = None  # visible keys past which null and magnitude are told the count relative to it; None is never
  direction_scale: float = 1.0  # length of polar attention's direction; 1 as published, sqrt(head_dim) gives unit mean square
  memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
  raven: RavenConfig = dataclasses.field(default_factory=RavenConfig)
  conv_taps: int = 3  # gated short convolution
  canon_taps: int = 4  # convolutions on q, k, v of the polar and nope cores
  logit_cap: float = 15.0
  norm_eps: float = 1e-6
  init: str = "default"
  activation_dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat: str = "none"  # recompute in the backward pass: nothing | all but matmul outputs | whole blocks
  scan: bool = True  # compile one repetition of the pattern for all depths; false inlines them: faster, longer to compile
  implementation: str = "auto"  # of the polar and gated-delta ops


@dataclasses.dataclass
class DataConfig:
  """Where tokens come from. A source is ``python-source``, ``recall:SOURCE``, ``text:GLOB`` or ``bin:GLOB``."""

  directory: str = ""  # of the prepared shards; "" means WORKDIR/data
  sources: tuple[str, ...] = ("python-source",)
  weights: tuple[float, ...] = (1.0,)
  tokenizer: str = "sentencepiece"  # "sentencepiece" trains one; "bytes"; or a path to a .model or tokenizer.json
  tokenizer_vocab_size: int = 8192  # of a tokenizer trained here
  tokenizer_train_mib: int = 32  # text sampled to train it
  max_mib: int | None = None  # text taken from each text source; None takes all of it
  recall_max_mib: int = 32  # text that recall material is written over; it grows to about five times the tokens
  validation_documents: int = 64
  heldout_documents: int = 24  # the longest ones, kept whole for evaluation past the training length
  shard_tokens: int = 16_777_216
  sequence_length: int = 2048  # T
  batch_size: int = 256  # sequences a step, over all devices and microbatches
  shuffle_seed: int = 0
  prefetch: int = 16  # batches read ahead by threads


@dataclasses.dataclass
class OptimizerConfig:
  """Muon for matrices inside blocks, AdamW for the rest; or AdamW for everything."""

  kind: str = "muon"  # "adamw": one rate and decay for every parameter
  adamw_learning_rate: float = 3e-4  # of kind "adamw"
  adamw_weight_decay: float = 0.1  # times the learning rate, of kind "adamw"
  schedule: str = "linear"  # constant, then linear to zero; "cosine": from the warmup's end to a floor
  cosine_floor: float = 0.1  # share of the rate at the end of "cosine"
  muon_learning_rate: float = 0.02
  muon_weight_decay: float = 0.01  # times the learning rate
  muon_momentum: float = 0.95
  muon_variant: str = "published"  # 12 cubic-quintic steps; "quintic5" is the usual 5 faster ones
  embedding_learning_rate: float = 0.3
  head_learning_rate: float = 1 / 320
  vector_learning_rate: float = 0.01  # everything one-dimensional
  adam_b1: float = 0.8
  adam_b2: float = 0.95
  adam_eps: float = 1e-10
  warmup_steps: int = 0
  decay_fraction: float = 0.7  # last share of the steps, linear to zero
  clip_norm: float | None = 1.0
  clip_basis: str = "sum"  # norm of the gradient of the summed ("sum", as published) or the mean token loss


@dataclasses.dataclass
class AuxiliaryConfig:
  """Auxiliary objectives: ``L = (1 - a) L_lm + a L_reg + d L_distractor``; what is off costs nothing."""

  regularizer: str = "baseline"  # of every block's output; "baseline" is none
  regularizer_weight: float = 0.01  # a
  sketch: int = 64  # random directions that a regulariser looks at
  distractors: int = 0  # R, random keys a query should not find; 0 is off, the sequence length is published
  distractor_weight: float = 0.01  # d


@dataclasses.dataclass
class TrainConfig:
  """The loop."""

  steps: int = 18_722
  seed: int = 0
  accumulation: int = 1  # microbatches a step
  z_loss: float = 0.0
  auxiliary: AuxiliaryConfig = dataclasses.field(default_factory=AuxiliaryConfig)
  ema_decay: float | None = None
  loss_chunk: int = 512  # time steps whose logits exist at once, per sequence
  max_bad_steps: int = 20  # consecutive non-finite steps before the run stops
  log_every: int = 10
  checkpoint_every: int = 500
  checkpoint_keep: int = 3
  validate_every: int = 500  # 0 is never
  validation_batches: int = 8
  validation_lengths: tuple[int, ...] = (1, 2, 4, 8)  # multiples of the training length, on held-out documents
  peak_tflops: float | None = None  # per device, for MFU; None looks the device up
  profile_start: int | None = None
  profile_steps: int = 5


@dataclasses.dataclass
class MeshConfig:
  """Devices along each named axis; -1 takes what is left. The product must be the number of devices."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1


@dataclasses.dataclass
class Config:
  """One experiment."""

  name: str = "atma"
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def validate(self) -> Config:
    """Checks every field; raises `UserError` naming the first wrong one. Returns self."""
    _check_types(self, "config")
    _validate_model(self.model)
    _validate_data(self.data)
    _validate_optimizer(self.optimizer)
    _validate_train(self)
    return self

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, JSON-ready."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`. Unknown fields raise `UserError`; one that an older version had not yet gets its default,
    which is why the default of every new field must be what was done before it existed."""
    return _from_dict(cls, values, "config")


@dataclasses.dataclass(frozen=True)
class RetentionCap:
  """A bound of `tokens` on the half-lives of `heads` at inference (`models.retention`); no part of a model's configuration.

  `heads` is "all", "worst" (the head with the longest zero-input half-life) or ``LAYER:HEAD,...``, counted from 0.
  """

  tokens: float
  heads: str = "all"

  def __post_init__(self):
    if not 0 < self.tokens < math.inf:
      raise UserError(f"--retention_cap={self.tokens}: must be a half-life in tokens, greater than 0")
    self.pairs()

  def pairs(self) -> tuple[tuple[int, int], ...] | None:
    """The (layer, head) pairs of a list of heads, or None where `heads` is a word."""
    if self.heads in ("all", "worst"):
      return None
    try:
      return tuple((int(layer), int(head)) for layer, head in (part.split(":") for part in self.heads.split(",")))
    except ValueError as error:
      raise UserError(f"--retention_heads={self.heads}: must be all, worst or LAYER:HEAD pairs such as 6:3,10:1") from error

  def __str__(self) -> str:
    return f"{self.tokens:g} ({self.heads})"


def _require(condition: bool, field: str, value: Any, legal: str) -> None:
  if not condition:
    raise UserError(f"config.{field}={value!r}: must be {legal}")


def _one_of(field: str, value: str, legal: tuple[str, ...]) -> None:
  _require(value in legal, field, value, "one of " + ", ".join(legal))


def _positive(owner: Any, prefix: str, *names: str) -> None:
  for name in names:
    value = getattr(owner, name)
    _require(value > 0, f"{prefix}.{name}", value, "greater than 0")


def _validate_model(m: ModelConfig) -> None:
  _positive(m, "model", "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
  _positive(m, "model", "conv_taps", "canon_taps", "logit_cap", "norm_eps")
  _one_of("model.attention", m.attention, ATTENTIONS)
  _one_of("model.init", m.init, INITS)
  _one_of("model.activation_dtype", m.activation_dtype, DTYPES)
  _one_of("model.param_dtype", m.param_dtype, DTYPES)
  _one_of("model.remat", m.remat, REMATS)
  _one_of("model.implementation", m.implementation, IMPLEMENTATIONS)
  _require(len(m.block_pattern) > 0, "model.block_pattern", m.block_pattern, "a non-empty tuple")
  for kind in m.block_pattern:
    _one_of("model.block_pattern", kind, MIXERS)
  half_life = m.memory.max_half_life
  _require(half_life is None or 0 < half_life < math.inf, "model.memory.max_half_life", half_life, "None or greater than 0")
  _positive(m.raven, "model.raven", "slots", "top_k")
  _require(m.raven.top_k <= m.raven.slots, "model.raven.top_k", m.raven.top_k, f"at most model.raven.slots={m.raven.slots}")
  _require(m.num_heads % m.num_kv_heads == 0, "model.num_kv_heads", m.num_kv_heads,
           f"a divisor of model.num_heads={m.num_heads}")
  for name in ("window", "null_length", "count_length"):
    length = getattr(m, name)
    _require(length is None or length > 0, f"model.{name}", length, "None or at least 1")
  _require(0 < m.direction_scale < math.inf, "model.direction_scale", m.direction_scale, "greater than 0")
  _require(m.attention != "rope" or m.head_dim % 4 == 0, "model.head_dim", m.head_dim,
           "a multiple of 4 when model.attention='rope'")


def _validate_data(d: DataConfig) -> None:
  _positive(d, "data", "sequence_length", "batch_size", "shard_tokens", "tokenizer_vocab_size", "tokenizer_train_mib",
            "recall_max_mib")
  _require(len(d.sources) > 0, "data.sources", d.sources, "a non-empty tuple")
  _require(len(d.weights) == len(d.sources), "data.weights", d.weights, f"{len(d.sources)} numbers, one a source")
  _require(all(w > 0 and math.isfinite(w) for w in d.weights), "data.weights", d.weights, "positive numbers")
  for name in ("validation_documents", "heldout_documents", "prefetch"):
    _require(getattr(d, name) >= 0, f"data.{name}", getattr(d, name), "at least 0")
  _require(d.max_mib is None or d.max_mib > 0, "data.max_mib", d.max_mib, "None or greater than 0")


def _validate_optimizer(o: OptimizerConfig) -> None:
  _one_of("optimizer.clip_basis", o.clip_basis, CLIP_BASES)
  _one_of("optimizer.muon_variant", o.muon_variant, MUON_VARIANTS)
  _one_of("optimizer.kind", o.kind, OPTIMIZERS)
  _one_of("optimizer.schedule", o.schedule, SCHEDULES)
  _require(0 <= o.cosine_floor <= 1, "optimizer.cosine_floor", o.cosine_floor, "in [0, 1]")
  _require(o.adamw_weight_decay >= 0, "optimizer.adamw_weight_decay", o.adamw_weight_decay, "at least 0")
  _positive(o, "optimizer", "muon_learning_rate", "embedding_learning_rate", "head_learning_rate",
            "vector_learning_rate", "adamw_learning_rate", "adam_eps")
  for name in ("muon_momentum", "adam_b1", "adam_b2"):
    _require(0 <= getattr(o, name) < 1, f"optimizer.{name}", getattr(o, name), "in [0, 1)")
  _require(0 <= o.decay_fraction <= 1, "optimizer.decay_fraction", o.decay_fraction, "in [0, 1]")
  _require(o.warmup_steps >= 0, "optimizer.warmup_steps", o.warmup_steps, "at least 0")
  _require(o.muon_weight_decay >= 0, "optimizer.muon_weight_decay", o.muon_weight_decay, "at least 0")
  _require(o.clip_norm is None or o.clip_norm > 0, "optimizer.clip_norm", o.clip_norm, "None or greater than 0")


def _validate_auxiliary(a: AuxiliaryConfig, m: ModelConfig) -> None:
  _one_of("train.auxiliary.regularizer", a.regularizer, REGULARIZERS)
  _positive(a, "train.auxiliary", "sketch")
  _require(0 <= a.regularizer_weight <= 1, "train.auxiliary.regularizer_weight", a.regularizer_weight, "in [0, 1]")
  _require(a.distractors >= 0, "train.auxiliary.distractors", a.distractors, "at least 0")
  _require(a.distractors == 0 or "global" in m.block_pattern[:m.num_layers], "train.auxiliary.distractors", a.distractors,
           "0 in a model without global blocks")
  _require(a.distractor_weight >= 0, "train.auxiliary.distractor_weight", a.distractor_weight, "at least 0")


def _validate_train(c: Config) -> None:
  t = c.train
  _validate_auxiliary(t.auxiliary, c.model)
  _positive(t, "train", "steps", "accumulation", "loss_chunk", "max_bad_steps", "log_every", "checkpoint_every",
            "checkpoint_keep", "validation_batches", "profile_steps")
  _require(c.data.batch_size % t.accumulation == 0, "train.accumulation", t.accumulation,
           f"a divisor of data.batch_size={c.data.batch_size}")
  _require(t.z_loss >= 0, "train.z_loss", t.z_loss, "at least 0")
  _require(t.profile_start is None or t.profile_start >= 0, "train.profile_start", t.profile_start, "None or at least 0")
  _require(t.ema_decay is None or 0 < t.ema_decay < 1, "train.ema_decay", t.ema_decay, "None or in (0, 1)")
  _require(all(n >= 1 for n in t.validation_lengths), "train.validation_lengths", t.validation_lengths,
           "multiples of the training length, each at least 1")
  for axis in dataclasses.fields(c.mesh):
    size = getattr(c.mesh, axis.name)
    _require(size == -1 or size >= 1, f"mesh.{axis.name}", size, "-1 (what is left) or at least 1")
  free = [a.name for a in dataclasses.fields(c.mesh) if getattr(c.mesh, a.name) == -1]
  _require(len(free) <= 1, "mesh", {a: -1 for a in free}, "-1 on one axis at most")
  pieces = 2 * c.mesh.context if c.mesh.context > 1 else 1
  _require(c.data.sequence_length % pieces == 0, "data.sequence_length", c.data.sequence_length,
           f"a multiple of twice mesh.context={c.mesh.context}: causal attention deals out two pieces to every device")


def _matches(value: Any, annotation: Any) -> bool:
  if isinstance(annotation, types.UnionType):
    return any(_matches(value, option) for option in typing.get_args(annotation))
  if typing.get_origin(annotation) is tuple:
    item = typing.get_args(annotation)[0]
    return isinstance(value, (tuple, list)) and all(_matches(v, item) for v in value)
  if annotation is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if annotation is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if annotation is types.NoneType or annotation is None:
    return value is None
  return isinstance(value, annotation)


def _check_types(owner: Any, path: str) -> None:
  hints = typing.get_type_hints(type(owner))
  for field in dataclasses.fields(owner):
    value, hint = getattr(owner, field.name), hints[field.name]
    if not _matches(value, hint):
      name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
      raise UserError(f"{path}.{field.name}={value!r}: must be of type {name}")
    if dataclasses.is_dataclass(value):
      _check_types(value, f"{path}.{field.name}")


def _from_dict(cls: type, values: dict[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      raise UserError(unknown_name(f"{path} field", name, hints))
  arguments = {}
  for name, hint in hints.items():
    if name not in values:
      continue
    value = values[name]
    if dataclasses.is_dataclass(hint):
      value = _from_dict(hint, value, f"{path}.{name}")
    elif typing.get_origin(hint) is tuple:
      value = tuple(value)
    arguments[name] = value
  return cls(**arguments)
