"""The training loop: it dispatches a step before it fetches the metrics of the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import signal
import threading
import time

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
from jaxtyping import Array, Int
import numpy as np

import atma_jax
from atma_jax import distributed
from atma_jax.checkpoints.store import Checkpointer
from atma_jax.config import Config, TrainConfig
from atma_jax.data.manifest import load_manifest
from atma_jax.data.pipeline import TrainingData
from atma_jax.data.prepare import prepare
from atma_jax.data.tokenizers import check_vocabulary
from atma_jax.errors import UserError
from atma_jax.memory_needs import check_training_fits
from atma_jax.models.definition import ModelDefinition, Params
from atma_jax.models.operations import peak_flops, training_flops_per_token
from atma_jax.sharding import make_mesh
from atma_jax.training.batches import GlobalBatches, check_divides
from atma_jax.training.metrics import MetricWriter, log_progress
from atma_jax.training.state import TrainState, abstract_state, create_state, optimizer_for
from atma_jax.training.train_step import Metrics, TrainStep, make_train_step
from atma_jax.training.validation import make_validation
from atma_jax.training.workdir import data_directory, make_workdir

DONE, PREEMPTED = "done", "preempted"


def train(config: Config, workdir: str) -> str:
  """Trains to ``config.train.steps``, going on from the newest good checkpoint in `workdir`, if there is one.

  Args:
    config: a validated recipe; ``config.data.directory`` is set to the directory in use.
    workdir: where checkpoints, metrics and, without ``config.data.directory``, prepared data go.

  Returns:
    `DONE`, or `PREEMPTED` if SIGTERM arrived: then a checkpoint was saved, and the same call goes on from it.

  Raises:
    UserError: options, data or checkpoints do not fit together, or too many non-finite steps in a row.
    RunError: the last checkpoint could not be written.
  """
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  check_divides(config, mesh)
  check_training_fits(config)
  directory = data_directory(config, workdir)
  config.data.directory = str(directory)
  folder = make_workdir(workdir)
  with distributed.agreed():
    if jax.process_index() == 0:
      prepare(config.data, directory)
  batches = GlobalBatches(config, mesh)
  with distributed.agreed():
    data = TrainingData(config.data, directory, parts=batches.parts, part_count=batches.part_count)
    check_vocabulary(data.tokenizer, config.model)
  logging.info("data: %s, manifest %s", directory, load_manifest(directory).fingerprint[:12])

  definition = ModelDefinition(config.model)
  optimizer = optimizer_for(config, definition)
  target = abstract_state(config, definition, optimizer, mesh)
  checkpointer = Checkpointer(folder, config.train.checkpoint_keep)
  restored = checkpointer.restore(config, target)
  if restored is None:
    state = create_state(config, definition, optimizer, mesh)
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

  validate = make_validation(config, definition, mesh, directory) if config.train.validate_every else None
  steps = {count: make_train_step(config, ModelDefinition(config.model, foreign_keys=count), optimizer, mesh, state)
           for count in dict.fromkeys(config.train.foreign_keys)}
  loop = Loop(config, folder, mesh, data, batches, checkpointer, steps, validate=validate,
              flops_per_token=training_flops_per_token(definition, config.data.sequence_length))
  with Preemption() as preemption, MetricWriter(folder, first_step=first, active=jax.process_index() == 0) as writer:
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
               checkpointer: Checkpointer, steps: Mapping[int, TrainStep], *,
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
      validate: losses of parameters; None without validation.
      flops_per_token: operations of a training step per target token, for MFU.
    """
    self.config, self.folder, self.mesh = config, folder, mesh
    self.data, self.batches, self.checkpointer, self.steps, self.validate = data, batches, checkpointer, steps, validate
    self.tokens_per_step = config.data.batch_size * config.data.sequence_length
    self.flops_per_step = flops_per_token * self.tokens_per_step
    self.peak = peak_flops(config.train.peak_tflops)
    self.first = 0
    self.data_wait = 0.0  # seconds, since the start
    self.window_start, self.window_began, self.window_wait = 0, 0.0, 0.0  # since the last record of metrics

  def run(self, state: TrainState, first: int, preemption: Preemption, writer: MetricWriter) -> str:
    """Trains from step `first` to the last one, or to a pre-emption; returns `DONE` or `PREEMPTED`."""
    train, checkpointer = self.config.train, self.checkpointer
    pending: tuple[int, Metrics] | None = None  # the step that was dispatched and not reported
    due, retry = False, None  # a checkpoint is due; the step at which one that failed is tried again
    self.first = self.window_start = first
    compiled = self._compile(state)
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
          if not self.save(number, state, final=last or stop):
            retry = number + min(2**checkpointer.failed_in_a_row, train.checkpoint_every)
          writer.flush()
        if validating and not stop and self.validate is not None:
          results = self.validate(state.params)
          logging.info("step %d  %s", number, "  ".join(f"{name} {value:.4f}" for name, value in results.items()))
          writer.write(number, results)
        pause = time.perf_counter() - pause_began
        paused, self.window_began = paused + pause, self.window_began + pause
      if stop and not last:
        checkpointer.close()
        self.data.close()
        logging.info("pre-empted: step %d is saved in %s; start the same command again", number, self.folder)
        return PREEMPTED
    checkpointer.close()
    self.data.close()
    total = time.perf_counter() - started - paused
    logging.info("done: %d steps in %.1f s, %.1f%% of it outside data waiting; %.1f s saving and validating; checkpoints in %s",
                 train.steps - first, total, 100 * (1 - self.data_wait / total), paused, checkpointer.directory)
    return DONE

  def _compile(self, state: TrainState) -> dict[int, jax.stages.Compiled]:
    began = time.perf_counter()
    tokens = jax.ShapeDtypeStruct(self.batches.shape, np.int32, sharding=self.batches.sharding)
    with jax.set_mesh(self.mesh):
      compiled = {count: step.lower(state, tokens).compile() for count, step in self.steps.items()}
    logging.info("compiled the step in %.1f s", time.perf_counter() - began)
    distributed.exchange("compiled")  # a collective waits less long for another process than its compiler may take
    return compiled

  def next_batch(self) -> Int[Array, "B T+1"]:
    """The tokens of the next step, on the devices; counts the seconds waited for data."""
    began = time.perf_counter()
    tokens = next(self.data)["tokens"]
    waited = time.perf_counter() - began
    self.data_wait += waited
    self.window_wait += waited
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
                 "failed_saves": self.checkpointer.failed_saves,
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


class Preemption:
  """SIGTERM, as a question asked after every step; several processes agree on the step, whichever of them was signalled."""

  def __enter__(self) -> Preemption:
    self._event, self._old = threading.Event(), None
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
    return self  # with several processes jax handles the signal

  def reached(self, step: int) -> bool:
    """Whether training must save and end after `step`."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._event.is_set()

  def __exit__(self, *_: object) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)
