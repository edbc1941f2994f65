"""The training loop: it dispatches a step before it fetches the metrics of the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
import signal
import time

from absl import logging
from etils import epath
import jax
from jaxtyping import Array, Int
import numpy as np

import atma_jax
from atma_jax import distributed
from atma_jax.checkpoints.store import Checkpointer
from atma_jax.claims import Claim
from atma_jax.config import Config, TrainConfig
from atma_jax.data.manifest import MANIFEST, load_manifest
from atma_jax.data.pipeline import TrainingData, check_state
from atma_jax.data.prepare import prepare
from atma_jax.data.tokenizers import check_vocabulary
from atma_jax.errors import RunError, UserError
from atma_jax.memory_needs import check_training_fits
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.models.operations import peak_flops, training_flops_per_token
from atma_jax.sharding import make_mesh
from atma_jax.training.batches import GlobalBatches, check_divides
from atma_jax.training.boards import WeightsAndBiases, check_project
from atma_jax.training.continued import check_start, initial_tokenizer, with_initial_weights
from atma_jax.training.goodput import Goodput
from atma_jax.training.interruption import Preemption
from atma_jax.training.metrics import MetricWriter, log_progress
from atma_jax.training.state import TrainState, abstract_state, create_state, optimizer_for
from atma_jax.training.train_step import Metrics, TrainStep, make_train_step
from atma_jax.training.validation import make_validation
from atma_jax.training.workdir import claim_workdir, data_directory, make_workdir

DONE, PREEMPTED, INTERRUPTED = "done", "preempted", "interrupted"


def train(config: Config, workdir: str, *, claimed: bool = False, wandb: str | None = None) -> str:
  """Trains to ``config.train.steps``, going on from the newest good checkpoint in `workdir`, if there is one.

  The working directory is claimed (see `atma_jax.claims`), so that no other process trains in it. SIGTERM or Ctrl-C before the
  first step ends the process at once, because there is nothing to save, and so does Ctrl-C after either later.

  Args:
    config: a validated recipe; ``config.data.directory`` is set to the directory in use.
    workdir: where checkpoints, metrics and, without ``config.data.directory``, prepared data go.
    claimed: the caller has claimed `workdir` for this process.
    wandb: a project of Weights & Biases that gets the metrics too.

  Returns:
    `DONE`, or `PREEMPTED` or `INTERRUPTED` if SIGTERM or Ctrl-C arrived: then a checkpoint was saved, and the same call goes on
    from it.

  Raises:
    UserError: options, data or checkpoints do not fit together, another process trains in `workdir`, there is no room for a
      checkpoint, or too many non-finite steps in a row.
    RunError: the last checkpoint could not be written, another process has taken `workdir` over, or no run of Weights & Biases
      could be started.
  """
  began = time.perf_counter()
  if wandb is not None:
    check_project(wandb)
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  check_divides(config, mesh)
  directory = data_directory(config, workdir)
  config.data.directory = str(directory)
  check_training_fits(config)
  check_start(config, workdir)
  folder = make_workdir(workdir)
  claim, refusal = (None, None) if claimed else claim_workdir(folder, workdir)
  release = claim.release if claim is not None else lambda: None
  try:
    with Preemption(release) as preemption:
      return _train(config, mesh, folder, directory, preemption, claim, refusal, wandb, began)
  finally:
    release()


def _train(config: Config, mesh: jax.sharding.Mesh, folder: epath.Path, directory: pathlib.Path, preemption: Preemption,
           claim: Claim | None, refusal: UserError | None, wandb: str | None, began: float) -> str:
  """Does what `train` says in a working directory that is claimed, or that cannot be written, for the reason `refusal`."""
  with distributed.agreed():
    if jax.process_index() == 0:
      prepare(config.data, directory, tokenizer=None if (directory / MANIFEST).exists() else initial_tokenizer(config))
  batches = GlobalBatches(config, mesh)
  with distributed.agreed():
    data = TrainingData(config.data, directory, parts=batches.parts, part_count=batches.part_count)
    check_vocabulary(data.tokenizer, config.model)
  logging.info("data: %s, manifest %s", directory, load_manifest(directory).fingerprint[:12])

  definition = ModelDefinition(config.model)
  optimizer = optimizer_for(config, definition)
  target = abstract_state(config, definition, optimizer, mesh)
  checkpointer = Checkpointer(folder, config.train.checkpoint_keep)
  restored = checkpointer.restore(config, target, check_state)
  if restored is None:
    state = create_state(config, definition, optimizer, mesh)
    if config.train.init_from:
      state = with_initial_weights(state, config, definition, data.tokenizer, mesh)
  else:
    state, data_state = restored
    data.set_state(data_state)
  first = int(state.step)
  parameters = sum(leaf.size for leaf in state.params.values())
  logging.info("%s: %s parameters, %s, mesh %s, %s", config.name, f"{parameters:,}", jax.devices()[0].device_kind,
               dict(mesh.shape), f"resuming at step {first}" if first else "starting")
  if first >= config.train.steps:
    logging.info("done: %s already holds step %d of %d", folder, first, config.train.steps)
    checkpointer.close()
    return DONE
  with distributed.agreed():
    if refusal is not None:
      raise refusal
  checkpointer.check_room(target)

  validate = make_validation(config, definition, mesh, directory) if config.train.validate_every else None
  steps = {count: make_train_step(config, ModelDefinition(config.model, foreign_keys=count), optimizer, mesh, state)
           for count in dict.fromkeys(config.train.foreign_keys)}
  loop = Loop(config, folder, mesh, data, batches, checkpointer, steps, claim=claim, validate=validate,
              flops_per_token=training_flops_per_token(definition, config.data.sequence_length))
  with distributed.agreed():
    board = None if wandb is None else lambda: WeightsAndBiases(wandb, folder, config.name, config.to_dict())
    writer = MetricWriter(folder, first_step=first, active=jax.process_index() == 0, board=board)
  with writer:
    loop.goodput = Goodput(began, writer.last_record)
    return loop.run(state, first, preemption, writer)


def foreign_keys_at(number: int, train: TrainConfig) -> int:
  """How many keys of other rows step `number` shows: drawn from the seed and the step alone, so that a resumed run repeats it."""
  if len(train.foreign_keys) == 1:
    return train.foreign_keys[0]
  draw = np.random.default_rng((train.seed, number)).integers(len(train.foreign_keys))
  return train.foreign_keys[int(draw)]


class Loop:
  """The steps of one call of `train`, with their checkpoints, validations and metrics."""

  def __init__(self, config: Config, folder: epath.Path, mesh: jax.sharding.Mesh, data: TrainingData, batches: GlobalBatches,
               checkpointer: Checkpointer, steps: Mapping[int, TrainStep], *, claim: Claim | None,
               validate: Callable[[Params], dict[str, float]] | None, flops_per_token: float):
    """Puts together what `train` made.

    Args:
      config: the recipe.
      folder: the workdir.
      mesh: the devices.
      data: the batches of this process, which go on from where the state is.
      batches: places them on the devices.
      checkpointer: saves the state.
      steps: the jitted training step for each number of foreign keys.
      claim: on the workdir; training ends when it is lost. None if another process looks after it.
      validate: losses of parameters; None without validation.
      flops_per_token: operations of a training step per target token, for MFU.
    """
    self.config, self.folder, self.mesh = config, folder, mesh
    self.data, self.batches, self.checkpointer, self.steps, self.validate = data, batches, checkpointer, steps, validate
    self.claim = claim
    self.tokens_per_step = config.data.batch_size * config.data.sequence_length
    self.flops_per_step = flops_per_token * self.tokens_per_step
    self.peak = peak_flops(config.train.peak_tflops)
    self.goodput = Goodput(time.perf_counter(), None)
    self.first = 0
    self.data_wait = 0.0  # seconds, since the start
    self.window_start, self.window_began, self.window_wait = 0, 0.0, 0.0  # since the last record of metrics

  def run(self, state: TrainState, first: int, preemption: Preemption, writer: MetricWriter) -> str:
    """Trains from step `first` to the last one, or to a signal; returns `DONE`, `PREEMPTED` or `INTERRUPTED`."""
    train, checkpointer = self.config.train, self.checkpointer
    pending: tuple[int, Metrics] | None = None  # the step that was dispatched and not reported
    due, retry = False, None  # a checkpoint is due; the step at which one that failed is tried again
    self.first = self.window_start = first
    compiled = self._compile(state)
    preemption.begin()
    started = self.window_began = time.perf_counter()
    paused = 0.0  # seconds of saving and validating
    for number in range(first + 1, train.steps + 1):
      tokens = self.next_batch()
      if train.profile_start is not None and number == first + 1 + train.profile_start:
        jax.profiler.start_trace(str(self.folder / "profile"))
      with jax.transfer_guard("disallow"):
        state, metrics = compiled[foreign_keys_at(number, train)](state, tokens)
      if pending is not None:
        self.report(writer, *pending)
      pending = (number, metrics)
      if train.profile_start is not None and number == first + train.profile_start + train.profile_steps:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      last, stop = number == train.steps, preemption.reached(number)
      if self.claim is not None and self.claim.lost:
        raise RunError(f"{self.folder}: another process has taken over, because this one showed no sign of life; ended at step "
                       f"{number}, the checkpoints are the other's")
      if number % train.log_every == 0 and not checkpointer.check():
        retry = number + 1
      due = due or last or stop or number % train.checkpoint_every == 0 or number == retry
      validating = self.validate is not None and (last or number % train.validate_every == 0)
      if due or validating:
        bad = self.report(writer, *pending)
        pending = None
        pause_began = time.perf_counter()
        if due and (last or stop or not bad):  # otherwise at the end of this run of bad steps
          due = False
          with self.goodput.spent("saving"):
            saved = self.save(number, state, final=last or stop)
          if not saved:
            retry = number + min(2**checkpointer.failed_in_a_row, train.checkpoint_every)
          writer.flush()
        if validating and not stop and self.validate is not None:
          with self.goodput.spent("validating"):
            results = self.validate(state.params)
          logging.info("step %d  %s", number, "  ".join(f"{name} {value:.4f}" for name, value in results.items()))
          writer.write(number, {**results, **self.goodput.values()})
        pause = time.perf_counter() - pause_began
        paused, self.window_began = paused + pause, self.window_began + pause
      if stop and not last:
        checkpointer.close()
        self.data.close()
        interrupted = preemption.signal == signal.SIGINT
        logging.info("%s: step %d is saved in %s; start the same command again; %s%s",
                     "interrupted" if interrupted else "pre-empted", number, self.folder, self.goodput, self._lost(writer))
        return INTERRUPTED if interrupted else PREEMPTED
    with self.goodput.spent("saving"):
      checkpointer.close()
    self.data.close()
    total = time.perf_counter() - started - paused
    logging.info("done: %d steps in %.1f s, %.1f%% of it outside data waiting; %s; checkpoints in %s%s", train.steps - first,
                 total, 100 * (1 - self.data_wait / total), self.goodput, checkpointer.directory, self._lost(writer))
    return DONE

  def _lost(self, writer: MetricWriter) -> str:
    """What could not be written, for the last line of a run."""
    counts = ((writer.failed_writes, "records of metrics"), (self.checkpointer.failed_saves, "checkpoints"))
    lost = " and ".join(f"{count} {what}" for count, what in counts if count)
    return f"; {lost} could not be written" if lost else ""

  def _compile(self, state: TrainState) -> dict[int, jax.stages.Compiled]:
    began = time.perf_counter()
    foreign = f", one for each of {list(self.steps)} foreign keys" if len(self.steps) > 1 else ""
    logging.info("compiling the training step of %s: %d x %d tokens, mesh %s%s ...", self.config.name, self.batches.shape[0],
                 self.batches.shape[1] - 1, dict(self.mesh.shape), foreign)
    tokens = jax.ShapeDtypeStruct(self.batches.shape, np.int32, sharding=self.batches.sharding)
    with jax.set_mesh(self.mesh):
      compiled = {count: step.lower(state, tokens).compile() for count, step in self.steps.items()}
    logging.info("compiled the step in %.1f s", time.perf_counter() - began)
    self.goodput.add("compiling", time.perf_counter() - began)
    distributed.exchange("compiled")  # a collective waits less long for another process than its compiler may take
    return compiled

  def next_batch(self) -> Int[Array, "B T+1"]:
    """The tokens of the next step, on the devices; counts the seconds waited for data."""
    began = time.perf_counter()
    tokens = next(self.data)["tokens"]
    waited = time.perf_counter() - began
    self.data_wait += waited
    self.window_wait += waited
    self.goodput.add("data", waited)
    return self.batches.place(tokens)

  def report(self, writer: MetricWriter, number: int, metrics: Metrics) -> bool:
    """Fetches the metrics of step `number` and, if it is due, writes a record of them.

    Returns:
      True if the step was skipped because its loss or gradient was not finite.

    Raises:
      UserError: too many such steps in a row.
    """
    fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
    skipped = int(fetched["bad_steps"])
    if skipped:
      logging.warning("step %d: loss or gradient is not finite, update skipped (%d in a row, %d in all)", number, skipped,
                      fetched["bad_steps_total"])
    if number == self.first + 1:
      logging.info("first step after %.1f s", time.perf_counter() - atma_jax.STARTED)
    if skipped >= self.config.train.max_bad_steps:
      self.checkpointer.close()
      raise UserError(f"stopped at step {number}: {skipped} non-finite steps in a row "
                      f"(config.train.max_bad_steps); the last good checkpoint is in {self.checkpointer.directory}")
    if number % self.config.train.log_every == 0 or number == self.config.train.steps:
      now = time.perf_counter()
      steps, seconds = number - self.window_start, max(now - self.window_began, 1e-9)
      per_step = seconds / steps
      stats = jax.local_devices()[0].memory_stats()
      values = {**fetched, "tokens": number * self.tokens_per_step, "tokens_per_second": self.tokens_per_step / per_step,
                 "seconds_per_step": per_step, "data_wait": self.window_wait / seconds,
                 "failed_saves": self.checkpointer.failed_saves, **self.goodput.values(),
                 "mfu": None if self.peak is None else self.flops_per_step / per_step / self.peak,
                 "device_memory_gib": None if not stats else stats["peak_bytes_in_use"] / 2**30}
      writer.write(number, values)
      log_progress(number, self.config.train.steps, values)
      self.window_start, self.window_began, self.window_wait = number, now, 0.0
    return skipped > 0

  def save(self, number: int, state: TrainState, *, final: bool) -> bool:
    """Starts a checkpoint, or completes it if it is the `final` one; False if it could not be started."""
    stored = {"config": self.config, "tokenizer": self.data.tokenizer, "data_state": self.data.get_state()}
    if final:
      self.checkpointer.save_last(number, state, **stored)
      return True
    return self.checkpointer.save(number, state, **stored)
