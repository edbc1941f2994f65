"""One host's devices together against one of them: training, a long sequence, decoding, recovery from a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import copy
import dataclasses
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from atma_jax.benchmarks.generation_speed import NoText
from atma_jax.benchmarks.model_speed import peak_bytes
from atma_jax.benchmarks.profiles import communication
from atma_jax.benchmarks.timing import milliseconds
from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.evaluation.scoring import Scorer
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models.definition import ModelDefinition
from atma_jax.sharding import make_mesh, named_sharding
from atma_jax.training.optimizer import NEWTON_SCHULZ
from atma_jax.training.state import TrainState, create_state, optimizer_for
from atma_jax.training.train_step import make_train_step

PARTS = ("recovery", "training", "agreement", "sequence", "decoding")
AGREEMENT_STEPS = 10
_HEARTBEAT_SECONDS = 10
_REPOSITORY = pathlib.Path(__file__).parents[2]

Axes = dict[str, int]
Run = tuple[np.ndarray, dict[str, np.ndarray], float]  # losses, parameters, the norm of what the steps changed


@dataclasses.dataclass
class Training:
  """A recipe's training step on one mesh, compiled, with its state and a batch of random tokens."""

  step: jax.stages.Compiled
  state: TrainState
  batches: list[jax.Array]

  @classmethod
  def build(cls, config: Config, axes: Axes, seed: int, batches: int = 1) -> Training:
    """Compiles the step of `config` on a mesh of `axes` over as many devices as they multiply to."""
    mesh = mesh_of(axes)
    definition = ModelDefinition(config.model)
    optimizer = optimizer_for(config, definition)
    state = create_state(config, definition, optimizer, mesh)
    with jax.set_mesh(mesh):
      tokens = [jax.device_put(rows, named_sharding(mesh, ("batch", None))) for rows in _rows(config, seed, batches)]
      step = make_train_step(config, definition, optimizer, mesh, state, end_of_text=0).lower(state, tokens[0]).compile()
    return cls(step, state, tokens)

  def run(self, number: int = 0) -> dict[str, jax.Array]:
    """Takes one step on batch `number`; the metrics, on the device."""
    self.state, metrics = self.step(self.state, self.batches[number])
    return metrics


def mesh_of(axes: Axes) -> jax.sharding.Mesh:
  """A mesh of these axes over the first devices."""
  return make_mesh(**{"data": 1, **axes}, devices=jax.devices()[:int(np.prod(list(axes.values()), initial=1))])


def label(axes: Axes) -> str:
  """How a table names a mesh."""
  return ", ".join(f"{name}={size}" for name, size in axes.items()) or "one device"


def _rows(config: Config, seed: int, batches: int) -> Iterator[np.ndarray]:
  random = np.random.default_rng(seed)
  for _ in range(batches):
    yield random.integers(0, config.model.vocab_size, (config.data.batch_size, config.data.sequence_length + 1), np.int32)


def training_table(config: Config, devices: int, step_tokens: int, long_length: int, repeats: int, seed: int) -> None:
  """Prints speed, scaling, memory and exposed communication of the recipe's step on every mesh."""
  print(f"\n| {config.name}, {step_tokens:,} tokens per device | mesh | ms | tokens/s | of linear | memory GiB per device | "
        "collectives: busy / exposed | compiled in s |\n|---|---|---|---|---|---|---|---|")
  for length, meshes in ((config.data.sequence_length, [{}, {"data": devices}, {"fsdp": devices}, {"tensor": 2}]),
                         (long_length, [{}, {"context": 2}])):
    if step_tokens % length:
      raise UserError(f"--step_tokens={step_tokens}: must be a multiple of the sequence length {length}")
    single = None
    for axes in meshes:
      recipe, count = copy.deepcopy(config), int(np.prod(list(axes.values()), initial=1))
      recipe.data.sequence_length, recipe.train.accumulation = length, 1
      recipe.data.batch_size = step_tokens * count // length
      began = time.perf_counter()
      training = Training.build(recipe, axes, seed)
      compiled = time.perf_counter() - began
      ms = milliseconds(training.run, repeats=repeats)
      rate = step_tokens * count / ms * 1e3
      single = single or rate
      busy, exposed = communication(lambda: jax.block_until_ready(training.run()))  # noqa: B023
      shares = "-" if busy is None else f"{busy:.1%} / {exposed:.1%}"
      print(f"| T {length:,} | {label(axes)} | {ms:.1f} | {rate:,.0f} | {rate / single / count:.1%} | "
            f"{peak_bytes(training.step) / 2**30:.1f} | {shares} | {compiled:.0f} |", flush=True)
      del training


def agreement_recipe(devices: int) -> Config:
  """A float32 model small enough to compile quickly, with heads that the kernels take."""
  model = ModelConfig(vocab_size=1024, num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=1024,
                      activation_dtype="float32")
  return Config(name="agreement", model=model, data=DataConfig(sequence_length=256, batch_size=2 * devices),
                train=TrainConfig(steps=40)).validate()


def agreement_table(config: Config, devices: int, seed: int) -> None:
  """Prints how far ten float32 steps of `config` on every mesh end from those on one device, beside the bound.

  The distance of two sets of parameters is the norm of their difference over the norm of what the ten steps changed. The bounds
  follow from float32's unit eps and the n tokens of a batch: a sum over them is off by sqrt(n) eps, taking its roundings for a
  random walk, which is what losses may differ by. The orthogonalised update multiplies small singular values, and with them what
  is wrong in a gradient, by up to the product of the linear coefficients of its iterations. For comparison, the first lines show
  what one device differs by from itself with the rows in another order, and with every operation in XLA.
  """
  def steps(axes: Axes, order: slice = slice(None), implementation: str = "auto") -> Run:
    recipe = copy.deepcopy(config)
    recipe.model.implementation = implementation
    training, losses = Training.build(recipe, axes, seed, AGREEMENT_STEPS), []
    start = jax.tree.map(np.array, training.state.params)  # a copy: the step takes the state
    for number in range(AGREEMENT_STEPS):
      rows = training.batches[number]
      training.batches[number] = jax.device_put(np.asarray(rows)[order], rows.sharding)
      losses.append(float(training.run(number)["loss"]))
    end = jax.tree.map(np.asarray, training.state.params)
    return np.asarray(losses), end, _norm_of_difference(end, start)

  def distance(other: Run) -> list[float]:
    return [float(np.max(np.abs(single[0] - other[0]))), _norm_of_difference(single[1], other[1]) / single[2]]

  with jax.default_matmul_precision("highest"):
    single = steps({})
    same = {"one device, rows in reverse": distance(steps({}, order=slice(None, None, -1))),
            "one device, every operation in XLA": distance(steps({}, implementation="xla"))}
    rounding = float((config.data.batch_size * config.data.sequence_length) ** 0.5 * np.finfo(np.float32).eps)
    amplified = math.prod(linear for linear, *_ in NEWTON_SCHULZ[config.optimizer.muon_variant])
    bounds = [rounding * float(np.max(single[0])), rounding * amplified]
    print(f"\n| {AGREEMENT_STEPS} float32 steps | largest difference of a loss | of the parameters, relative to their change | "
          f"within the bound ({bounds[0]:.1e}, {bounds[1]:.1e}) |\n|---|---|---|---|")
    for name, found in same.items():
      print(f"| {name} | {found[0]:.1e} | {found[1]:.1e} | |", flush=True)
    for axes in ({"data": devices}, {"fsdp": devices}, {"tensor": 2}, {"context": 2}):
      found = distance(steps(axes))
      fits = all(difference <= bound for difference, bound in zip(found, bounds, strict=True))
      print(f"| {label(axes)} | {found[0]:.1e} | {found[1]:.1e} | {'yes' if fits else 'NO'} |", flush=True)


def _norm_of_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
  return float(np.sqrt(sum(np.sum((value.astype(np.float64) - other[name]) ** 2) for name, value in one.items())))


def sequence_table(config: Config, devices: int, length: int, seed: int) -> None:
  """Prints the time and memory of scoring one long sequence split over all devices, and its mean loss beside one device's."""
  print("\n| losses of one sequence | mesh | s | tokens/s | program GiB per device | mean loss |\n|---|---|---|---|---|---|")
  shorter = min(length, 65_536)
  for tokens, axes in ((shorter, {}), (shorter, {"context": devices}), (length, {"context": devices})):
    mesh = mesh_of(axes)
    scorer = Scorer(_random_model(config.model, mesh, seed), mesh, batch_tokens=8192, chunk=512)
    rows = np.random.default_rng(seed).integers(0, config.model.vocab_size, (1, tokens + 1), np.int32)
    seconds = []
    for _ in range(2):  # the first call compiles
      began = time.perf_counter()
      losses = np.concatenate(list(scorer.losses(rows)))
      seconds.append(time.perf_counter() - began)
    print(f"| {tokens:,} tokens | {label(axes)} | {seconds[-1]:.2f} | {tokens / seconds[-1]:,.0f} | "
          f"{scorer.largest_program / 2**30:.2f} | {losses.mean():.5f} |", flush=True)


def decoding_table(config: Config, context: int, seed: int) -> None:
  """Prints whether tensor=2 decodes one device's tokens, and the time of a token on both."""
  exact = dataclasses.replace(config.model, activation_dtype="float32")
  random = np.random.default_rng(seed)
  prompts = [random.integers(1, config.model.vocab_size, n).tolist() for n in (3, 100, 500)]
  tokens = []
  with jax.default_matmul_precision("highest"):
    for axes in ({}, {"tensor": 2}):
      engine = Engine(_random_model(exact, mesh_of(axes), seed), NoText(exact.vocab_size), rows=4, capacity=1024)
      tokens.append([done.tokens for done in engine.generate(prompts, Sampling(max_tokens=64, temperature=0.0, ignore_end=True))])
  equal = sum(a == b for one, two in zip(*tokens, strict=True) for a, b in zip(one, two, strict=True))
  print(f"\n| decoding at {context:,} tokens | ms per token | float32 tokens equal to one device's |\n|---|---|---|")
  for axes in ({}, {"tensor": 2}):
    engine = Engine(_random_model(config.model, mesh_of(axes), seed), NoText(config.model.vocab_size), rows=1,
                    capacity=context + 512)
    prompt = random.integers(1, config.model.vocab_size, context).tolist()
    times = []
    for count in (64, 320, 64, 320):  # the difference of two lengths leaves the prompt out; the first two compile
      began = time.perf_counter()
      engine.generate([prompt], Sampling(max_tokens=count, temperature=0.0, ignore_end=True))
      times.append(time.perf_counter() - began)
    share = f"{equal} of {sum(map(len, tokens[0]))}" if axes else ""
    print(f"| {label(axes)} | {(times[3] - times[2]) / 256 * 1e3:.3f} | {share} |", flush=True)


def _random_model(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int) -> Any:
  """A model without zero matrices, its parameters sharded over `mesh`."""
  definition = ModelDefinition(config)
  shardings = {name: leaf.sharding for name, leaf in definition.abstract_params(mesh).items()}

  def init() -> dict[str, jax.Array]:
    key = jax.random.key(seed)
    return {name: value if value.ndim < 2 else jax.random.normal(jax.random.fold_in(key, i), value.shape, value.dtype)
            * (1.0 if name.startswith("embed") else value.shape[-2] ** -0.5)
            for i, (name, value) in enumerate(sorted(definition.init(key).items()))}

  with jax.set_mesh(mesh):
    return definition.merge(jax.jit(init, out_shardings=shardings)())


def recovery_table(devices: int) -> None:
  """Prints how long the others run on after one of N processes was killed, and that half of the devices resume the run."""
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    for i in range(40):
      (work / f"{i}.txt").write_text(f"Document {i}: the quick brown fox jumps {i * 7} times over the lazy dog.\n" * 40)
    options = [
      "--config=configs/debug.py", f"--workdir={work / 'run'}", f"--config.data.sources=('text:{work}/*.txt',)",
      f"--config.data.batch_size={4 * devices}", "--config.train.checkpoint_every=20", "--config.train.validate_every=0",
      "--config.train.log_every=20", "--config.mesh.fsdp=-1", "--config.mesh.data=1", "--config.data.heldout_documents=0"]
    print("\n| recovery | result |\n|---|---|", flush=True)
    processes = _start(devices, [*options, "--config.train.steps=1000000"], work)
    try:
      _await(lambda: _latest(work / "run") >= 20, 300, processes)
      os.killpg(processes[-1].pid, signal.SIGKILL)
      began = time.perf_counter()
      codes = [process.wait(timeout=120) for process in processes[:-1]]
      print(f"| one of {devices} processes killed at step {_latest(work / 'run')} or later: the others end after | "
            f"{time.perf_counter() - began:.1f} s (heartbeat {_HEARTBEAT_SECONDS} s), exit codes {codes} |", flush=True)
    finally:
      _kill(processes)
    saved, half = _latest(work / "run"), max(1, devices // 2)
    processes = _start(half, [*options, f"--config.train.steps={saved + 20}"], work)
    try:
      codes = [process.wait(timeout=300) for process in processes]
    finally:
      _kill(processes)
    resumed = f"resuming at step {saved}" in (work / "0.log").read_text()
    print(f"| the same command on {half} of {devices} devices | exit codes {codes}, "
          f"{'resumed' if resumed else 'DID NOT RESUME'} at step {saved}, ended at step {_latest(work / 'run')} |", flush=True)


def _start(count: int, options: list[str], work: pathlib.Path) -> list[subprocess.Popen[bytes]]:
  """One training process per device, started by launch/run.sh, which does not restart it."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
  processes = []
  for i in range(count):
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": str(i), "JAX_NUM_CPU_DEVICES": "1"}
    environ["XLA_FLAGS"] = " ".join(flag for flag in environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    together = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}",
                f"--heartbeat_seconds={_HEARTBEAT_SECONDS}"] if count > 1 else []
    with (work / f"{i}.log").open("wb") as log:
      command = ["bash", "launch/run.sh", "--max-restarts=0", "--", sys.executable, "-m", "atma_jax.train", *options, *together]
      processes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT, cwd=_REPOSITORY,
                                        start_new_session=True))
  return processes


def _latest(workdir: pathlib.Path) -> int:
  """The newest complete checkpoint step of a run, 0 without one."""
  steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return max(steps, default=0)


def _await(condition: Callable[[], bool], seconds: float, processes: list[subprocess.Popen[bytes]]) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
      raise RuntimeError(f"the training processes did not reach a checkpoint (exit codes {[p.poll() for p in processes]})")
    time.sleep(0.2)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
  for process in processes:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
