"""The training loop: dispatch a step, then look at the numbers of the one before."""

from __future__ import annotations

import pathlib
import secrets
import signal
import threading
import time

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

import atma_jax
from atma_jax import distributed
from atma_jax.checkpoints.steps import absolute, is_remote
from atma_jax.checkpoints.store import Checkpointer
from atma_jax.config import Config
from atma_jax.data.manifest import load_manifest
from atma_jax.data.pipeline import TrainingData
from atma_jax.data.prepare import prepare
from atma_jax.data.tokenizers import check_vocabulary
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition
from atma_jax.models.operations import peak_flops, training_flops_per_token
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.metrics import MetricWriter, log_progress
from atma_jax.training.state import abstract_state, create_state, optimizer_for
from atma_jax.training.step import make_train_step
from atma_jax.training.validation import make_validation

DONE, PREEMPTED = "done", "preempted"


def train(config: Config, workdir: str) -> str:
  """Trains to `config.train.steps`, resuming whatever good checkpoint `workdir` holds.

  Returns:
    `DONE`, or `PREEMPTED` when SIGTERM arrived: then a checkpoint was saved and the same call goes on from it.

  Raises:
    UserError: options, data or checkpoints do not fit; or too many non-finite steps in a row.
    RunError: the last checkpoint could not be written.
  """
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  _check_divides(config, mesh)
  directory = _data_directory(config, workdir)
  config.data.directory = str(directory)
  folder = _make_workdir(workdir)
  with distributed.agreed():
    if jax.process_index() == 0:
      prepare(config.data, directory)
  batches = _Batches(config, mesh)
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

  loop = _Loop(config, folder, directory, mesh, definition, data, batches, checkpointer, make_train_step(
    config, definition, optimizer, mesh, state))
  with _Preemption() as preemption, MetricWriter(folder, first_step=first, active=jax.process_index() == 0) as writer:
    return loop.run(state, first, preemption, writer)


class _Loop:
  """The state of one call of `train`."""

  def __init__(self, config, folder, directory, mesh, definition, data, batches, checkpointer, step):
    self.config, self.folder, self.mesh = config, folder, mesh
    self.data, self.batches, self.checkpointer, self.step = data, batches, checkpointer, step
    self.tokens_per_step = config.data.batch_size * config.data.sequence_length
    self.flops_per_step = training_flops_per_token(definition, config.data.sequence_length) * self.tokens_per_step
    self.peak = peak_flops(config.train.peak_tflops)
    every = config.train.validate_every
    self.validate = make_validation(config, definition, mesh, directory) if every else None
    self.data_wait = self.elapsed = 0.0

  def run(self, state, first: int, preemption: _Preemption, writer: MetricWriter) -> str:
    train, checkpointer = self.config.train, self.checkpointer
    pending, due, again = None, False, None  # a checkpoint is due; after one that failed, the step to try again at
    self.first, self.mark = first, time.perf_counter()
    self.window_wait, self.window_start = 0.0, first
    compiled = self._compile(state)
    started = self.mark = time.perf_counter()
    aside = 0.0  # saving and validating
    for number in range(first + 1, train.steps + 1):
      tokens = self._next_batch()
      if train.profile_start is not None and number == first + 1 + train.profile_start:
        jax.profiler.start_trace(str(self.folder / "profile"))
      with jax.transfer_guard("disallow"):
        state, metrics = compiled(state, tokens)
      if pending is not None:
        self._report(writer, *pending)
      pending = (number, metrics)
      if train.profile_start is not None and number == first + train.profile_start + train.profile_steps:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      last, stop = number == train.steps, preemption.at(number)
      if number % train.log_every == 0 and not checkpointer.check():
        again = number + 1
      due = due or last or stop or number % train.checkpoint_every == 0 or number == again
      validate = self.validate and (last or number % train.validate_every == 0)
      if due or validate:
        bad = self._report(writer, *pending)
        pending = None
        paused = time.perf_counter()
        if due and (last or stop or not bad):  # else at the end of this run of bad steps
          due = False
          if not self._save(number, state, final=last or stop):
            again = number + min(2**checkpointer.failed_in_a_row, train.checkpoint_every)
          writer.flush()
        if validate and not stop:
          results = self.validate(state.params)
          logging.info("step %d  %s", number, "  ".join(f"{name} {value:.4f}" for name, value in results.items()))
          writer.write(number, results)
        pause = time.perf_counter() - paused
        aside, self.mark = aside + pause, self.mark + pause
      if stop and not last:
        checkpointer.close()
        self.data.close()
        logging.info("pre-empted: step %d is saved in %s; start the same command again", number, self.folder)
        return PREEMPTED
    checkpointer.close()
    self.data.close()
    total = time.perf_counter() - started - aside
    logging.info("done: %d steps in %.1f s, %.1f%% of it outside data waiting; %.1f s saving and validating; checkpoints in %s",
                 train.steps - first, total, 100 * (1 - self.data_wait / total), aside, checkpointer.directory)
    return DONE

  def _compile(self, state):
    began = time.perf_counter()
    shape = (self.config.data.batch_size, self.config.data.sequence_length + 1)
    with jax.set_mesh(self.mesh):
      compiled = self.step.lower(state, jax.ShapeDtypeStruct(shape, np.int32, sharding=self.batches.sharding)).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - began)
    distributed.exchange("compiled")  # collectives do not wait as long for another process as its compiler may take
    return compiled

  def _next_batch(self) -> jax.Array:
    began = time.perf_counter()
    tokens = next(self.data)["tokens"]
    self.data_wait += time.perf_counter() - began
    self.window_wait += time.perf_counter() - began
    return self.batches.place(tokens)

  def _report(self, writer: MetricWriter, number: int, metrics: dict[str, jax.Array]) -> bool:
    """Writes the metrics of a step on its turn; True if the step was skipped as not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = values["bad_steps"] > 0
    if bad:
      logging.warning("step %d: loss or gradient is not finite, update skipped (%d in a row, %d in all)", number,
                      values["bad_steps"], values["bad_steps_total"])
    if number == self.first + 1:
      logging.info("first step after %.1f s", time.perf_counter() - atma_jax.STARTED)
    if values["bad_steps"] >= self.config.train.max_bad_steps:
      self.checkpointer.close()
      raise UserError(f"stopped at step {number}: {values['bad_steps']:.0f} non-finite steps in a row "
                      f"(config.train.max_bad_steps); the last good checkpoint is in {self.checkpointer.directory}")
    if number % self.config.train.log_every == 0 or number == self.config.train.steps:
      now = time.perf_counter()
      steps, seconds = number - self.window_start, max(now - self.mark, 1e-9)
      per_step = seconds / steps
      stats = jax.local_devices()[0].memory_stats()
      values |= {"tokens": number * self.tokens_per_step, "tokens_per_second": self.tokens_per_step / per_step,
                 "seconds_per_step": per_step, "data_wait": self.window_wait / seconds,
                 "failed_saves": self.checkpointer.failed_saves,
                 "mfu": None if self.peak is None else self.flops_per_step / per_step / self.peak,
                 "device_memory_gib": None if not stats else stats["peak_bytes_in_use"] / 2**30}
      writer.write(number, values)
      log_progress(number, self.config.train.steps, values)
      self.mark, self.window_start, self.window_wait = now, number, 0.0
    return bad

  def _save(self, number: int, state, *, final: bool) -> bool:
    """Starts a checkpoint, or completes it if it is the `final` one; False where that failed."""
    options = {"config": self.config, "tokenizer": self.data.tokenizer, "data_state": self.data.get_state()}
    if final:
      self.checkpointer.save_last(number, state, **options)
      return True
    return self.checkpointer.save(number, state, **options)


class _Batches:
  """Global batches (B, T + 1) out of the rows that this process reads: the parts of the batch that its devices hold."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh):
    self.sharding = named_sharding(mesh, ("batch", None))
    self.part_count = mesh.shape["data"] * mesh.shape["fsdp"]
    self._shape = (config.data.batch_size, config.data.sequence_length + 1)
    self._rows = config.data.batch_size // self.part_count
    indices = self.sharding.addressable_devices_indices_map(self._shape).values()
    self.parts = sorted({(rows.start or 0) // self._rows for rows, _ in indices})

  def place(self, tokens: np.ndarray) -> jax.Array:
    """The global array; `tokens` are the rows of `parts`, one after the other."""
    def local(index: tuple[slice, ...]) -> np.ndarray:
      at = self.parts.index((index[0].start or 0) // self._rows) * self._rows
      return tokens[at : at + self._rows]

    return jax.make_array_from_callback(self._shape, self.sharding, local)


class _Preemption:
  """SIGTERM as a question asked after every step; several processes agree on the step, whichever of them was told."""

  def __enter__(self) -> _Preemption:
    self._event, self._old = threading.Event(), None
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
    return self  # with several processes jax has the signal

  def at(self, step: int) -> bool:
    """True when training must save and end after `step`."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._event.is_set()

  def __exit__(self, *_) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)


def _check_divides(config: Config, mesh: jax.sharding.Mesh) -> None:
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  microbatch = config.data.batch_size // config.train.accumulation
  if microbatch % rows:
    raise UserError(f"config.data.batch_size={config.data.batch_size}: a microbatch of {microbatch} sequences must be a "
                    f"multiple of mesh data*fsdp={rows}")
  context = mesh.shape["context"]
  if context > 1 and config.data.sequence_length % (2 * context):
    raise UserError(f"config.data.sequence_length={config.data.sequence_length}: must be a multiple of "
                    f"twice config.mesh.context={context}: causal attention deals out two pieces to every device")


def _data_directory(config: Config, workdir: str) -> pathlib.Path:
  if config.train.profile_start is not None and is_remote(workdir):
    raise UserError(f"config.train.profile_start={config.train.profile_start}: profiles need a --workdir on a file system, not "
                    f"{workdir}")
  if config.data.directory:
    return pathlib.Path(config.data.directory).absolute()
  if is_remote(workdir):
    raise UserError(f"config.data.directory is required with --workdir={workdir}: prepared data is memory-mapped, so it needs "
                    "a local (or mounted) directory")
  return pathlib.Path(workdir).absolute() / "data"


def _make_workdir(workdir: str) -> epath.Path:
  """Makes it, and makes sure that every process sees the same one."""
  folder, token = absolute(workdir), secrets.token_hex(8)
  with distributed.agreed():
    if jax.process_index() == 0:
      try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
          (folder / ".shared").write_text(token)
      except Exception as error:  # file systems in the clouds raise errors of their own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"--workdir={workdir}: cannot be written: {reason}") from error
  token = distributed.from_first(token)
  with distributed.agreed():
    if jax.process_count() > 1 and (not (folder / ".shared").exists() or (folder / ".shared").read_text() != token):
      raise UserError(f"--workdir={workdir}: does not show what process 0 wrote there; with several processes it must be a "
                      "directory that all of them see")
  return folder
