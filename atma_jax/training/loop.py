"""The training loop: dispatch a step, then look at the numbers of the one before."""

from __future__ import annotations

import pathlib
import signal
import threading
import time

from absl import logging
import jax
import numpy as np

from atma_jax.config import Config, UserError
from atma_jax.data.manifest import load_manifest
from atma_jax.data.pipeline import TrainingData
from atma_jax.data.prepare import prepare
from atma_jax.data.tokenizers import check_vocabulary
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.checkpointing import Checkpointer
from atma_jax.training.flops import peak_flops, training_flops_per_token
from atma_jax.training.metrics import MetricWriter, log_progress
from atma_jax.training.state import ModelDefinition, abstract_state, create_state, optimizer_for
from atma_jax.training.step import make_train_step
from atma_jax.training.validation import make_validation

DONE, PREEMPTED = "done", "preempted"


def train(config: Config, workdir: str) -> str:
  """Trains to `config.train.steps`, resuming whatever good checkpoint `workdir` holds.

  Returns:
    `DONE`, or `PREEMPTED` when SIGTERM arrived: then a checkpoint was saved and the same call goes on from it.

  Raises:
    UserError: options, data or checkpoints do not fit; or too many non-finite steps in a row.
  """
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.context)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  _check_divides(config, mesh)
  folder = _make_workdir(workdir)
  directory = pathlib.Path(config.data.directory) if config.data.directory else folder / "data"
  config.data.directory = str(directory.absolute())
  if jax.process_index() == 0:
    prepare(config.data, directory)
  data = TrainingData(config.data, directory, process_index=jax.process_index(), process_count=jax.process_count())
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

  loop = _Loop(config, folder, directory, mesh, definition, data, checkpointer, make_train_step(
    config, definition, optimizer, mesh, state))
  with _Terminated() as terminated:
    return loop.run(state, first, terminated)


class _Loop:
  """The state of one call of `train`."""

  def __init__(self, config, folder, directory, mesh, definition, data, checkpointer, step):
    self.config, self.folder, self.mesh = config, folder, mesh
    self.data, self.checkpointer, self.step = data, checkpointer, step
    self.tokens_per_step = config.data.batch_size * config.data.sequence_length
    self.flops_per_step = training_flops_per_token(definition, config.data.sequence_length) * self.tokens_per_step
    self.peak = peak_flops(config.train.peak_tflops)
    self.sharding = named_sharding(mesh, ("batch", None))
    every = config.train.validate_every
    self.validate = make_validation(config, definition, mesh, directory) if every else None
    self.data_wait = self.elapsed = 0.0

  def run(self, state, first: int, terminated: threading.Event) -> str:
    train, writer = self.config.train, MetricWriter(self.folder, first_step=first, active=jax.process_index() == 0)
    pending, saved, save = None, first, False
    self.mark = time.perf_counter()
    self.window_wait, self.window_start = 0.0, first
    compiled = self._compile(state)
    started = self.mark = time.perf_counter()
    aside = 0.0  # saving and validating
    for number in range(first + 1, train.steps + 1):
      tokens = self._next_batch()
      if number == first + 1 + (train.profile_start or -10):
        jax.profiler.start_trace(str(self.folder / "profile"))
      with jax.transfer_guard("disallow"):
        state, metrics = compiled(state, tokens)
      if pending is not None:
        self._report(writer, *pending)
      pending = (number, metrics)
      if train.profile_start is not None and number == first + train.profile_start + train.profile_steps:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      last = number == train.steps
      save = save or last or number % train.checkpoint_every == 0 or terminated.is_set()
      validate = self.validate and (last or number % train.validate_every == 0)
      if save or validate:
        bad = self._report(writer, *pending)
        pending = None
        paused = time.perf_counter()
        if save and (last or terminated.is_set() or not bad):  # else at the end of this run of bad steps
          self._save(number, state)
          saved, save = number, False
        if validate and not terminated.is_set():
          results = self.validate(state.params)
          logging.info("step %d  %s", number, "  ".join(f"{name} {value:.4f}" for name, value in results.items()))
          writer.write(number, results)
        pause = time.perf_counter() - paused
        aside, self.mark = aside + pause, self.mark + pause
      if terminated.is_set():
        self.checkpointer.close()
        writer.close()
        logging.info("pre-empted: step %d is saved in %s; start the same command again", saved, self.folder)
        return PREEMPTED
    self.checkpointer.close()
    writer.close()
    self.data.close()
    total = time.perf_counter() - started - aside
    logging.info("done: %d steps in %.1f s, %.1f%% of it outside data waiting; %.1f s saving and validating; checkpoints in %s",
                 train.steps - first, total, 100 * (1 - self.data_wait / total), aside, self.checkpointer.directory)
    return DONE

  def _compile(self, state):
    began = time.perf_counter()
    shape = (self.config.data.batch_size, self.config.data.sequence_length + 1)
    with jax.set_mesh(self.mesh):
      compiled = self.step.lower(state, jax.ShapeDtypeStruct(shape, np.int32, sharding=self.sharding)).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - began)
    return compiled

  def _next_batch(self) -> jax.Array:
    began = time.perf_counter()
    tokens = next(self.data)["tokens"]
    self.data_wait += time.perf_counter() - began
    self.window_wait += time.perf_counter() - began
    return jax.make_array_from_process_local_data(self.sharding, tokens)

  def _report(self, writer: MetricWriter, number: int, metrics: dict[str, jax.Array]) -> bool:
    """Writes the metrics of a step on its turn; True if the step was skipped as not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = values["bad_steps"] > 0
    if bad:
      logging.warning("step %d: loss or gradient is not finite, update skipped (%d in a row, %d in all)", number,
                      values["bad_steps"], values["bad_steps_total"])
    if values["bad_steps"] >= self.config.train.max_bad_steps:
      writer.close()
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
                 "mfu": None if self.peak is None else self.flops_per_step / per_step / self.peak,
                 "device_memory_gib": None if not stats else stats["peak_bytes_in_use"] / 2**30}
      writer.write(number, values)
      log_progress(number, self.config.train.steps, values)
      self.mark, self.window_start, self.window_wait = now, number, 0.0
    return bad

  def _save(self, number: int, state) -> None:
    self.checkpointer.save(number, state, config=self.config, tokenizer=self.data.tokenizer,
                           data_state=self.data.get_state())


class _Terminated:
  """SIGTERM sets an event instead of ending the process; the old handler comes back afterwards."""

  def __enter__(self) -> threading.Event:
    event = threading.Event()
    self._old = None
    if threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, lambda *_: event.set())
    return event

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


def _make_workdir(workdir: str) -> pathlib.Path:
  folder = pathlib.Path(workdir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir={workdir}: cannot be made: {error.strerror}") from error
  return folder
