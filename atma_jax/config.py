"""Every option of atma_jax with its default, its help and its legal values, as plain dataclasses.

Layer 0: standard library only. A recipe in ``configs/`` returns a `Config`; flags override its fields
(``--config.model.attention=nope``); `Config.validate` is called once, before anything is built, and from then on
the configuration is treated as constant. `Config.to_dict` is what a checkpoint stores beside its weights.

Axis letters, used everywhere: B batch, T time (queries), S keys, C model width, H query heads, K key/value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
import pathlib
import types
import typing
from typing import Any

from atma_jax.errors import UserError, divides_over_context, unknown_name

ATTENTIONS = ("polar", "nope", "rope")
_MIXER_FILES = pathlib.Path(__file__).parent / "models" / "mixers"
_KIND_OF_FILE = {"attention": "global"}  # kinds that recipes and checkpoints do not call as their file is called
# Kind of mixer -> its module: one file each, and whatever `atma_jax.models.mixers.register_mixer` adds.
MIXERS: dict[str, str] = {_KIND_OF_FILE.get(path.stem, path.stem): f"atma_jax.models.mixers.{path.stem}"
                          for path in sorted(_MIXER_FILES.glob("[!_]*.py"))}
WITHOUT_ATTENTION = ("local", "raven")  # mixers known to have no window, no counted keys and no distractor loss
INITS = ("default", "published", "mimetic")
DTYPES = ("bfloat16", "float16", "float32", "float64")
REMATS = ("none", "dots", "block")
IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas_gpu", "pallas_tpu")
CLIP_BASES = ("sum", "mean")
MUON_VARIANTS = ("published", "quintic5")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("linear", "cosine")
WAYS_TO_JOIN = ("auto", "cloud_tpu", "off")  # how the processes of a program find each other
HEARTBEAT_SECONDS = 100  # without a sign of life, after which a process counts as dead
TOKENIZER_OF_INIT_FROM = "init_from"  # the value of data.tokenizer
REGULARIZERS = ("baseline", "weak", "strong", "discrete", "zipfian")


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which values of a field are legal, and how an error message says so; None is legal wherever the type allows it."""

  legal: str
  allows: Callable[[Any], bool]


def one_of(*names: str) -> Rule:
  """The rule of a field that takes one of some names."""
  return Rule("one of " + ", ".join(names), lambda value: value in names)


@dataclasses.dataclass(frozen=True)
class Range(Rule):
  """The rule of a field that takes numbers between two finite bounds, or a tuple of such numbers.

  Attributes:
    low, high: the bounds.
    above_low, below_high: whether the bound itself is not legal.
  """

  low: float
  high: float
  above_low: bool = False
  below_high: bool = False


def within(low: float, high: float, *, above_low: bool = False, below_high: bool = False, why: str = "") -> Range:
  """The rule of numbers from `low` to `high`; `why`, if given, ends the message. See `Range`."""
  def allows(value: Any) -> bool:
    return ((value > low) if above_low else (value >= low)) and ((value < high) if below_high else (value <= high))

  legal = f"{'greater than' if above_low else 'at least'} {_digits(low)} and {'less than' if below_high else 'at most'} "
  return Range(legal + _digits(high) + why, allows, low, high, above_low, below_high)


def each(of: Range, *, empty: bool) -> Range:
  """The rule of a tuple whose numbers must each be in a range; `empty` allows none."""
  legal = f"{'numbers' if empty else 'a non-empty tuple of numbers'}, each {of.legal}"
  return dataclasses.replace(of, legal=legal, allows=lambda value: (empty or len(value) > 0) and all(map(of.allows, value)))


def shown(value: Any) -> str:
  """A value as messages show it, shortened if need be; Python refuses to spell a whole number of more than 4300 digits."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):
    return "(a value too long to show)"
  return text if len(text) <= 200 else text[:200] + "..."


def _digits(bound: float) -> str:
  return f"{bound:_}" if isinstance(bound, int) else f"{bound:g}"


INT32 = (1 << 31) - 1  # the most that a length, a step or a dimension of an array may be
AT_LEAST_1 = within(1, INT32)
RATE = within(0, 1000.0, above_low=True)
DECAY = within(0, 1000.0)
POSITIVE = FINITE_POSITIVE = within(0, INT32, above_low=True)
NOT_NEGATIVE = within(0, INT32)
FRACTION = within(0, 1)
FRACTION_BELOW_1 = within(0, 1, below_high=True)
PROPER_FRACTION = within(0, 1, above_low=True, below_high=True)
NOT_EMPTY = Rule("a non-empty tuple", lambda value: len(value) > 0)
MOST_DEVICES = 1 << 20
MOST_TAPS = 64  # every tap is an operation of its own in the compiled program
MESH_SIZE = Range(f"-1 (what is left), or at least 1 and at most {MOST_DEVICES:_}",
                  lambda value: value == -1 or 1 <= value <= MOST_DEVICES, -1, MOST_DEVICES)


def option(default: Any, help: str, rule: Rule | None = None) -> Any:
  """A dataclass field with its default, what its flag says about it, and the rule that `Config.validate` checks."""
  return dataclasses.field(default=default, metadata={"help": help, "rule": rule})


@dataclasses.dataclass(unsafe_hash=True)  # hashable, because modules keep it as a static attribute
class MemoryConfig:
  """The gated-delta memory that attention and Raven mixers may have beside them."""

  enabled: bool = option(True, "Give the mixers that can have one a memory.")
  gamma_bias: float = option(3.9, "Added to the logit of the decay gate.", within(-1000.0, 1000.0))
  beta_bias: float = option(0.0, "Added to the logit of the write gate.", within(-1000.0, 1000.0))
  max_half_life: float | None = option(None, "Tokens that no head's half-life can exceed, in training too; None is no bound.",
                                       within(0, 1e15, above_low=True))


@dataclasses.dataclass(unsafe_hash=True)
class RavenConfig:
  """The slots of a Raven mixer; heads, head size and memory are those of the model."""

  slots: int = option(256, "Slots per head.", within(1, 1 << 20))
  top_k: int = option(32, "Slots that a token writes to.", within(1, 1 << 20))


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """The network. Defaults are those of the published 378M model."""

  vocab_size: int = option(50304, "Tokens that the embedding and the head know, V.", within(1, 1 << 28))
  num_layers: int = option(16, "Blocks.", within(1, 1 << 14))
  width: int = option(1024, "Width of the residual stream, C.", within(1, 1 << 20))
  num_heads: int = option(8, "Query heads, H.", within(1, 1 << 16))
  num_kv_heads: int = option(2, "Key/value heads, K; a divisor of num_heads.", within(1, 1 << 16))
  head_dim: int = option(128, "Size of a head, D.", within(1, 1 << 14))
  mlp_width: int = option(4096, "Hidden units of the gated MLP; 4 C as published.", within(1, 1 << 24))
  block_pattern: tuple[str, ...] = option(("local", "local", "global", "local"), "Kinds of mixer, repeated over the depth.",
                                          NOT_EMPTY)
  attention: str = option("polar", "Core of the attention in global blocks.", one_of(*ATTENTIONS))
  window: int | None = option(None, "Keys that each query may see; None is full causal attention.", AT_LEAST_1)
  null_length: int | None = option(None, "Visible keys at which polar attention's null logit stops growing; None is never, as "
                                   "published.", AT_LEAST_1)
  count_length: int | None = option(None, "Visible keys past which polar attention's null and magnitude are told the count "
                                    "relative to it; None is never.", AT_LEAST_1)
  direction_scale: float = option(1.0, "Length of polar attention's direction; 1 as published, sqrt(head_dim) gives it unit mean "
                                  "square.", within(0, 1e6, above_low=True))
  memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
  memory_reset: int | None = option(None, "Tokens after which the memory begins again from zero: at positions 0, N, 2 N, ...; "
                                    "None is never.", AT_LEAST_1)
  memory_off: bool = option(False, "Leave out what is read from the memory; its parameters stay.")
  raven: RavenConfig = dataclasses.field(default_factory=RavenConfig)
  conv_taps: int = option(3, "Taps of the gated short convolution.", within(1, MOST_TAPS))
  canon_taps: int = option(4, "Taps of the convolutions on q, k and v of the polar and nope cores.", within(1, MOST_TAPS))
  logit_cap: float = option(15.0, "Bound c on the logits: z becomes c z / sqrt(z^2 + c^2).", within(0, 1e6, above_low=True))
  norm_eps: float = option(1e-6, "Added to the mean square in every RMS norm.", within(0, 1, above_low=True))
  init: str = option("default", "Distribution of the initial parameters.", one_of(*INITS))
  activation_dtype: str = option("bfloat16", "Dtype of activations and matrix products.", one_of(*DTYPES))
  param_dtype: str = option("float32", "Dtype of the parameters.", one_of(*DTYPES))
  remat: str = option("none", "What the backward pass computes again: nothing, all but matmul outputs (dots), or whole blocks "
                      "(block).", one_of(*REMATS))
  scan: bool = option(True, "Compile one repetition of the pattern for all depths; false unrolls them: faster, but longer to "
                      "compile.")
  implementation: str = option("auto", "Implementation of the model's operations.", one_of(*IMPLEMENTATIONS))

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The kind of mixer of every layer, in order."""
    return tuple(self.block_pattern[layer % len(self.block_pattern)] for layer in range(self.num_layers))


@dataclasses.dataclass
class DataConfig:
  """Where tokens come from. A source is an entry such as ``text:GLOB``; `atma_jax.data.sources` has one file for each."""

  directory: str = option("", "Directory of the prepared shards; empty is WORKDIR/data.")
  sources: tuple[str, ...] = option(
    ("python-source",), "Sources of text and tokens, such as text:GLOB; atma_jax/data/sources has a file for each.", NOT_EMPTY)
  weights: tuple[float, ...] = option((1.0,), "Share of the sequences that each source gives.",
                                      each(within(0, 1e9, above_low=True), empty=True))
  tokenizer: str = option("sentencepiece", "A path to a .model or tokenizer.json; a model on the Hugging Face hub, such as "
                          "gpt2; sentencepiece, which trains one; bytes; or init_from, that of the checkpoint train.init_from.")
  tokenizer_vocab_size: int = option(8192, "Vocabulary of a tokenizer trained here.", within(1, 1 << 24))
  tokenizer_train_mib: int = option(32, "MiB of text sampled to train the tokenizer.", within(1, 1 << 20))
  max_mib: int | None = option(None, "MiB of text taken from each text source; None takes all of it.", POSITIVE)
  recall_max_mib: int = option(32, "MiB of text that recall material is written over; it grows to about five times the tokens.",
                               POSITIVE)
  validation_documents: int = option(64, "Documents of the validation stream.", NOT_NEGATIVE)
  heldout_documents: int = option(24, "Longest documents kept whole for evaluation past the training length.", NOT_NEGATIVE)
  shard_tokens: int = option(16_777_216, "Tokens in a shard.", POSITIVE)
  sequence_length: int = option(2048, "Tokens of a training sequence, T.", POSITIVE)
  batch_size: int = option(256, "Sequences in a step, over all devices and microbatches.", POSITIVE)
  shuffle_seed: int = option(0, "Seed of the order of the sequences.", within(0, (1 << 63) - 1))
  prefetch: int = option(16, "Batches that threads read ahead.", within(0, 1 << 16))


@dataclasses.dataclass
class OptimizerConfig:
  """Muon for matrices inside blocks and AdamW for the rest, or AdamW for everything."""

  kind: str = option("muon", "Muon and AdamW (muon), or AdamW with one rate and decay for all (adamw).", one_of(*OPTIMIZERS))
  adamw_learning_rate: float = option(3e-4, "Learning rate of kind adamw.", RATE)
  adamw_weight_decay: float = option(0.1, "Weight decay of kind adamw, times the learning rate.", DECAY)
  schedule: str = option("linear", "Constant, then linear to zero (linear); or a cosine from the end of warmup to cosine_floor.",
                         one_of(*SCHEDULES))
  cosine_floor: float = option(0.1, "Share of the learning rate at the end of schedule cosine.", FRACTION)
  muon_learning_rate: float = option(0.02, "Learning rate of Muon.", RATE)
  muon_weight_decay: float = option(0.01, "Weight decay of Muon, times the learning rate.", DECAY)
  muon_momentum: float = option(0.95, "Nesterov momentum of Muon.", FRACTION_BELOW_1)
  muon_variant: str = option("published", "Newton-Schulz iteration: 12 steps that converge (published), or the usual 5 fast ones "
                             "(quintic5).", one_of(*MUON_VARIANTS))
  embedding_learning_rate: float = option(0.3, "Learning rate of the embedding (AdamW).", RATE)
  head_learning_rate: float = option(1 / 320, "Learning rate of the head (AdamW).", RATE)
  vector_learning_rate: float = option(0.01, "Learning rate of everything one-dimensional (AdamW).", RATE)
  adam_b1: float = option(0.8, "Decay of Adam's first moment.", FRACTION_BELOW_1)
  adam_b2: float = option(0.95, "Decay of Adam's second moment.", FRACTION_BELOW_1)
  adam_eps: float = option(1e-10, "Added to Adam's denominator.", within(0, 1, above_low=True))
  learning_rate_scale: float = option(1.0, "Factor of every learning rate, for continued training.", RATE)
  warmup_steps: int = option(0, "Steps of linear warmup.", NOT_NEGATIVE)
  decay_fraction: float = option(0.7, "Last share of the steps, over which schedule linear falls to zero.", FRACTION)
  clip_norm: float | None = option(1.0, "Largest global norm of the gradient; None does not clip.",
                                   within(0, 1e30, above_low=True))
  clip_basis: str = option("sum", "Gradient whose norm is clipped: of the summed token loss (sum, as published) or of its mean.",
                           one_of(*CLIP_BASES))


@dataclasses.dataclass
class AuxiliaryConfig:
  """Auxiliary objectives: ``L = (1 - a) L_lm + a L_reg + d L_distractor``; what is off costs nothing."""

  regularizer: str = option("baseline", "Regulariser of every block's output; baseline is none.", one_of(*REGULARIZERS))
  regularizer_weight: float = option(0.01, "Weight a of the regulariser.", FRACTION)
  sketch: int = option(64, "Random directions that a regulariser looks at.", within(1, 1 << 20))
  distractors: int = option(0, "Random keys R that a query should not find; 0 is off, the sequence length is published.",
                            NOT_NEGATIVE)
  distractor_weight: float = option(0.01, "Weight d of the distractor loss.", DECAY)


@dataclasses.dataclass
class TrainConfig:
  """The training loop."""

  steps: int = option(18_722, "Optimizer steps.", POSITIVE)
  seed: int = option(0, "Seed of the initial parameters and of the auxiliary objectives.",
                     within(0, (1 << 32) - 1, why=", because the generator has 32 bits"))
  init_from: str = option("", "Checkpoint whose weights a new run starts from: a training workdir or a published folder; empty "
                          "draws them.")
  accumulation: int = option(1, "Microbatches in a step.", POSITIVE)
  z_loss: float = option(0.0, "Weight of the squared log-partition function in the loss.", DECAY)
  auxiliary: AuxiliaryConfig = dataclasses.field(default_factory=AuxiliaryConfig)
  foreign_keys: tuple[int, ...] = option(
    (0,), "Keys of other rows that attention sees before a row's own, in training only: each step draws one of these numbers.",
    each(NOT_NEGATIVE, empty=False))
  document_masks: bool = option(False, "Keep the documents of a row apart, in training only: attention, memory and convolutions "
                                "begin anew at every end-of-text token.")
  ema_decay: float | None = option(None, "Decay of the moving average of the parameters; None keeps none.", PROPER_FRACTION)
  loss_chunk: int = option(512, "Time steps of a sequence whose logits exist at once.", POSITIVE)
  max_bad_steps: int = option(20, "Consecutive non-finite steps after which the run stops.", POSITIVE)
  log_every: int = option(10, "Steps between two records of the metrics.", POSITIVE)
  checkpoint_every: int = option(500, "Steps between two checkpoints.", POSITIVE)
  checkpoint_keep: int = option(3, "Checkpoints that are kept, the newest ones.", POSITIVE)
  validate_every: int = option(500, "Steps between two validations; 0 is never.", NOT_NEGATIVE)
  validation_batches: int = option(8, "Batches of the validation stream in a validation.", POSITIVE)
  validation_lengths: tuple[int, ...] = option((1, 2, 4, 8), "Lengths at which held-out documents are validated, multiples of "
                                               "the training length.", each(within(1, 1 << 20), empty=True))
  peak_tflops: float | None = option(None, "Peak TFLOP/s of a device, for MFU; None looks the device up.",
                                     within(0, 1e9, above_low=True))
  profile_start: int | None = option(None, "Steps after the first one at which a profile starts; None takes none.", NOT_NEGATIVE)
  profile_steps: int = option(5, "Steps in a profile.", POSITIVE)


@dataclasses.dataclass
class MeshConfig:
  """Devices along each mesh axis; the product must be the number of devices."""

  data: int = option(-1, "Devices that split the batch and replicate the parameters; -1 is what is left.", MESH_SIZE)
  fsdp: int = option(1, "Devices that split the batch and the parameters; -1 is what is left.", MESH_SIZE)
  tensor: int = option(1, "Devices that split heads, hidden units and vocabulary; -1 is what is left.", MESH_SIZE)
  context: int = option(1, "Devices that split time; -1 is what is left.", MESH_SIZE)


@dataclasses.dataclass
class Config:
  """Everything that can be configured about one experiment, with the defaults of the published model.

  A recipe is a file whose ``get_config()`` returns one. Every field of every part is a flag of ``python -m atma_jax.train``.

  Attributes:
    name: the name of the run and of the model it trains.
    model: the architecture, a `ModelConfig`.
    data: sources, tokenizer and batches, a `DataConfig`.
    optimizer: update rule and schedule, an `OptimizerConfig`.
    train: steps, accumulation, validation, checkpoints and auxiliary objectives, a `TrainConfig`.
    mesh: how devices share the work, a `MeshConfig`.

  Example:
    >>> config = Config()
    >>> config.model.num_layers, config.model.attention = 8, "nope"
    >>> config.validate().to_dict()["model"]["num_layers"]
    8
  """

  name: str = option("atma", "Name of the run and of the model it trains.")
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def validate(self) -> Config:
    """Checks every field and what fields ask of each other.

    Returns:
      The configuration itself.

    Raises:
      UserError: a field is of the wrong type or not legal; the message names it.
    """
    for leaf in leaves(self):
      leaf.check()
    _validate_model(self.model)
    _require(len(self.data.weights) == len(self.data.sources), "data.weights", self.data.weights,
             f"{len(self.data.sources)} numbers, one per source")
    _validate_train(self)
    return self

  def to_dict(self) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> Config:
    """Inverse of `to_dict`.

    A field that the dictionary lacks, because an older version wrote it, gets its default. The default of every new field
    must therefore be what was done before the field existed.

    Raises:
      UserError: a field that does not exist.
    """
    return _from_dict(cls, values, "config")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One option of a configuration.

  Attributes:
    name: dotted, such as ``config.model.width``.
    hint: the annotated type.
    value: the value it has.
    help: what its flag says.
    rule: its legal values, if not every value of the type is.
  """

  name: str
  hint: Any
  value: Any
  help: str
  rule: Rule | None

  def check(self) -> None:
    """Raises `UserError` for a value of the wrong type, or one that the rule does not allow."""
    if not _matches(self.value, self.hint):
      kind = self.hint.__name__ if isinstance(self.hint, type) and not typing.get_args(self.hint) else str(self.hint)
      raise UserError(f"{self.name}={shown(self.value)}: must be of type {kind}")
    if self.rule is not None and self.value is not None and not self.rule.allows(self.value):
      optional = "None or " if isinstance(self.hint, types.UnionType) else ""
      raise UserError(f"{self.name}={shown(self.value)}: must be {optional}{self.rule.legal}")


def leaves(owner: Any, path: str = "config") -> Iterator[Leaf]:
  """Every option below a dataclass of options, in order; `path` is the dotted name of the dataclass itself."""
  hints = typing.get_type_hints(type(owner))
  for field in dataclasses.fields(owner):
    value, hint, name = getattr(owner, field.name), hints[field.name], f"{path}.{field.name}"
    if not dataclasses.is_dataclass(hint):
      yield Leaf(name, hint, value, field.metadata["help"], field.metadata["rule"])
    elif isinstance(value, typing.cast(type, hint)):
      yield from leaves(value, name)
    else:
      raise UserError(f"{name}={value!r}: must be of type {typing.cast(type, hint).__name__}")


@dataclasses.dataclass(frozen=True)
class RetentionCap:
  """A bound on the half-lives of the memory at inference (`atma_jax.models.retention_cap`); no part of a configuration.

  Attributes:
    tokens: the longest half-life.
    heads: "all", "worst" (the head with the longest zero-input half-life) or ``LAYER:HEAD,...``, counted from 0.
  """

  tokens: float
  heads: str = "all"

  def __post_init__(self) -> None:
    if not 0 < self.tokens < math.inf:
      raise UserError(f"--retention_cap={self.tokens}: must be a half-life in tokens, greater than 0")
    self.pairs()

  def pairs(self) -> tuple[tuple[int, int], ...] | None:
    """The (layer, head) pairs of a list of heads, or None if `heads` is a word."""
    if self.heads in ("all", "worst"):
      return None
    try:
      return tuple((int(layer), int(head)) for layer, head in (part.split(":") for part in self.heads.split(",")))
    except ValueError as error:
      raise UserError(f"--retention_heads={self.heads}: must be all, worst or LAYER:HEAD pairs such as 6:3,10:1") from error

  def __str__(self) -> str:
    return f"{self.tokens:g} ({self.heads})"


def check_context_divides(name: str, length: int, context: int) -> None:
  """Checks that the devices of the context axis can share a sequence.

  Causal attention gives every device two chunks, one from either half, so that all have the same work.

  Args:
    name: the option that holds the length, as the message names it.
    length: tokens of a sequence.
    context: devices along the context axis.

  Raises:
    UserError: more than one device, and the length is no multiple of twice their number.
  """
  if not divides_over_context(length, context):
    raise UserError(f"{name}={length}: must be a multiple of twice config.mesh.context={context}: causal attention gives every "
                    "device two chunks")


def _require(condition: bool, field: str, value: Any, legal: str) -> None:
  if not condition:
    raise UserError(f"config.{field}={value!r}: must be {legal}")


def _validate_model(m: ModelConfig) -> None:
  for kind in m.block_pattern:
    _require(kind in MIXERS, "model.block_pattern", kind, "one of " + ", ".join(MIXERS))
  _require(m.raven.top_k <= m.raven.slots, "model.raven.top_k", m.raven.top_k, f"at most model.raven.slots={m.raven.slots}")
  _require(m.num_heads % m.num_kv_heads == 0, "model.num_kv_heads", m.num_kv_heads,
           f"a divisor of model.num_heads={m.num_heads}")
  _require(m.attention != "rope" or m.head_dim % 4 == 0, "model.head_dim", m.head_dim,
           "a multiple of 4 when model.attention='rope'")


def _validate_train(c: Config) -> None:
  distractors = c.train.auxiliary.distractors
  _require(distractors == 0 or not set(c.model.layer_kinds) <= set(WITHOUT_ATTENTION), "train.auxiliary.distractors",
           distractors, "0 in a model without global blocks")
  _require(c.data.tokenizer != TOKENIZER_OF_INIT_FROM or c.train.init_from != "", "train.init_from", c.train.init_from,
           f"a checkpoint when data.tokenizer={TOKENIZER_OF_INIT_FROM!r}")
  _require(c.data.batch_size % c.train.accumulation == 0, "train.accumulation", c.train.accumulation,
           f"a divisor of data.batch_size={c.data.batch_size}")
  free = [axis.name for axis in dataclasses.fields(c.mesh) if getattr(c.mesh, axis.name) == -1]
  _require(len(free) <= 1, "mesh", dict.fromkeys(free, -1), "-1 on one axis at most")
  check_context_divides("config.data.sequence_length", c.data.sequence_length, c.mesh.context)
  most = (c.data.batch_size // c.train.accumulation - 1) * c.data.sequence_length
  _require(max(c.train.foreign_keys) <= most, "train.foreign_keys", c.train.foreign_keys,
           f"at most {most}, what the other rows of a microbatch hold")
  _require(max(c.train.foreign_keys) == 0 or (c.mesh.context == 1 and distractors == 0), "train.foreign_keys",
           c.train.foreign_keys, "(0,) with mesh.context or train.auxiliary.distractors")
  if c.train.document_masks:
    _require(max(c.train.foreign_keys) == 0, "train.foreign_keys", c.train.foreign_keys, "(0,) with train.document_masks")
    _require(distractors == 0, "train.auxiliary.distractors", distractors, "0 with train.document_masks")
    _require(c.mesh.context == 1, "mesh.context", c.mesh.context, "1 with train.document_masks")
    _require("raven" not in c.model.layer_kinds, "train.document_masks", True,
             "False with mixer raven, whose slots are not cleared between documents")


def _matches(value: Any, annotation: Any) -> bool:
  if isinstance(annotation, types.UnionType):
    return any(_matches(value, choice) for choice in typing.get_args(annotation))
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


def _from_dict(cls: type, values: Mapping[str, Any], path: str) -> Any:
  hints = typing.get_type_hints(cls)
  if not isinstance(values, Mapping):
    raise UserError(f"{path}={shown(values)}: must be an object of fields")
  for name in values:
    if name not in hints:
      raise UserError(unknown_name(f"{path} field", name, hints))
  arguments = {}
  for name, hint in hints.items():
    if name not in values:
      continue
    value = values[name]
    if dataclasses.is_dataclass(hint):
      value = _from_dict(typing.cast(type, hint), value, f"{path}.{name}")
    elif typing.get_origin(hint) is tuple and isinstance(value, list):  # as JSON gives it back
      value = tuple(value)
    arguments[name] = value
  return cls(**arguments)
