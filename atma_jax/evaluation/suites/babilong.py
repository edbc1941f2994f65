"""Suite ``babilong``: fine-tune on short questions, then answer questions of the same kind inside longer and longer text.

The data has BABILong's published form (arXiv 2406.10149): ``FOLDER/TASK/LENGTH.json`` with TASK qa1 to qa20 and LENGTH 0k, 1k,
2k and so on. Each file is a JSON list, or one JSON object per line, of ``input``, ``question`` and ``target``. All parameters
are trained, on all tasks and training lengths together, with a loss on the answer tokens and end-of-text only. The answers are
then decoded greedily and must equal the targets. The fine-tuned model is made when the first cell needs it, and is not saved.

Measure, one cell per task and length: ``babilong_exact`` with its Wilson interval. 0k is recorded under the length 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import re
from typing import Any

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
import numpy as np
import optax

from atma_jax.config import POSITIVE, option
from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.decoding import make_engine
from atma_jax.evaluation.options import CheckedOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.report import figures, markup
from atma_jax.evaluation.report.runs import Run, series
from atma_jax.evaluation.resources import OutOfMemory, available_bytes, memory_errors
from atma_jax.evaluation.scoring import round_up_rows
from atma_jax.evaluation.statistics import wilson_interval
from atma_jax.evaluation.suite import Cell, Inputs, Progress, Suite, fingerprint
from atma_jax.inference.sampling import Sampling
from atma_jax.json_input import MalformedJSON, parse_json, read_bytes
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, nbytes
from atma_jax.sharding import named_sharding

_SHORTEST_ROW = 32  # tokens of a fine-tuning row, padding included
_CHUNK = 512  # time steps whose logits exist at once
_ROWS, _CACHED_TOKENS = 8, 65_536  # most rows, and most tokens of all caches together, that are decoded at once
_SEED = 0x6261


@dataclasses.dataclass(frozen=True)
class BabilongOptions(CheckedOptions):
  """Options of the suite; lengths are the names of BABILong's files, such as 0k and 128k."""

  babilong_train: str = option("", "Folder of TASK/LENGTH.json to fine-tune on.")
  babilong_test: str = option("", "Folder of TASK/LENGTH.json to answer.")
  babilong_tasks: tuple[str, ...] = option(("qa1",), "Tasks.")
  babilong_train_lengths: tuple[str, ...] = option(("0k", "1k", "2k"), "Lengths to fine-tune on.")
  babilong_test_lengths: tuple[str, ...] = option(("0k", "1k", "2k", "4k", "8k"), "Lengths to answer at.")
  babilong_examples: int = option(100, "Questions to read from each test file.", POSITIVE)
  babilong_steps: int = option(300, "Fine-tuning steps.", POSITIVE)
  babilong_batch_size: int = option(8, "Questions per fine-tuning step.", POSITIVE)
  babilong_learning_rate: float = option(3e-4, "Learning rate of Adam, constant.", POSITIVE)


@dataclasses.dataclass(frozen=True)
class Example:
  """A question about a text.

  Attributes:
    prompt: tokens that are given, from end-of-text on.
    answer: tokens that should follow, end-of-text included.
    target: the answer as text.
  """

  prompt: Int[np.ndarray, " n"]
  answer: Int[np.ndarray, " m"]
  target: str


def babilong_cells(inputs: Inputs, options: BabilongOptions) -> list[Cell]:
  """One cell per task and test length."""
  if not options.babilong_train or not options.babilong_test:
    raise UserError("--suite=babilong: --babilong_train=FOLDER and --babilong_test=FOLDER are required, each of TASK/LENGTH.json")
  by_length = [[example for task in options.babilong_tasks
                for example in load_examples(options.babilong_train, task, length, inputs.tokenizer)]
               for length in options.babilong_train_lengths]
  text = np.concatenate([example.prompt for examples in by_length for example in examples])

  @functools.cache
  def tuned() -> Atma:
    return finetune(inputs.model, by_length, inputs.mesh, pad=inputs.tokenizer.eot_id, steps=options.babilong_steps,
                    batch_size=options.babilong_batch_size, learning_rate=options.babilong_learning_rate, seed=inputs.seed)

  settings = {"steps": options.babilong_steps, "batch_size": options.babilong_batch_size,
              "learning_rate": options.babilong_learning_rate, "train_lengths": list(options.babilong_train_lengths),
              "tasks": list(options.babilong_tasks), "seed": inputs.seed, "train_text": fingerprint(text)}
  return [_cell(inputs, options, task, length, tuned, settings)
          for length in options.babilong_test_lengths for task in options.babilong_tasks]


def tokens_of(length: str) -> int:
  """The number of tokens that a length of BABILong stands for: 0k -> 0, 4k -> 4096, 1M -> 1048576."""
  match = re.fullmatch(r"(\d+)([kKM]?)", length)
  if match is None:
    raise UserError(f"--babilong lengths: {length!r} is not one of BABILong's, such as 0k, 4k, 128k, 1M")
  return int(match[1]) << {"": 0, "k": 10, "K": 10, "M": 20}[match[2]]


def load_examples(folder: str, task: str, length: str, tokenizer: Tokenizer, count: int | None = None) -> list[Example]:
  """Reads the first `count` examples, or all of them, from ``FOLDER/TASK/LENGTH.json`` or ``.jsonl``.

  Raises:
    UserError: there is no such file, or it is malformed; the message says where.
  """
  tokens_of(length)
  paths = [pathlib.Path(folder) / task / f"{length}{suffix}" for suffix in (".json", ".jsonl")]
  path = next((p for p in paths if p.is_file()), None)
  if path is None:
    raise UserError(f"--suite=babilong: no file {paths[0]} or {paths[1].name}")
  try:
    content = read_bytes(path, most_bytes=1 << 30)
    lines = [line for line in content.splitlines() if line.strip()]
    items = parse_json(content) if content.lstrip().startswith(b"[") else [parse_json(line) for line in lines]
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  except MalformedJSON as error:
    raise UserError(f"{path}: not JSON: {error}") from error
  examples = []
  for number, item in enumerate(items[:count], 1):
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("input", "question", "target")):
      raise UserError(f"{path}: item {number} must be an object with the texts input, question and target")
    prompt = f"{item['input'].strip()}\n{item['question'].strip()}\nAnswer:"
    answer = tokenizer.encode(" " + item["target"].strip())
    examples.append(Example(np.concatenate([[tokenizer.eot_id], tokenizer.encode(prompt)]).astype(np.int32),
                            np.append(answer, tokenizer.eot_id).astype(np.int32), item["target"].strip()))
  if not examples:
    raise UserError(f"{path}: holds no examples")
  return examples


def make_batch(examples: Sequence[Example], pad: int) -> tuple[Int[np.ndarray, "B T+1"], Float[np.ndarray, "B T"]]:
  """Tokens of examples, with T padded to a power of two, and weights of their targets: 1 on answers, 0 elsewhere."""
  longest = max(len(e.prompt) + len(e.answer) for e in examples) - 1
  length = max(_SHORTEST_ROW, 1 << (longest - 1).bit_length())
  tokens, weights = np.full((len(examples), length + 1), pad, np.int32), np.zeros((len(examples), length), np.float32)
  for row, example in enumerate(examples):
    start, stop = len(example.prompt), len(example.prompt) + len(example.answer)
    tokens[row, :stop] = np.concatenate([example.prompt, example.answer])
    weights[row, start - 1:stop - 1] = 1
  return tokens, weights


def finetune(model: Atma, examples: Sequence[Sequence[Example]], mesh: Mesh, *, pad: int, steps: int, batch_size: int,
             learning_rate: float, seed: int) -> Atma:
  """Trains a copy of the model on answers only, with Adam at a constant rate and gradients clipped to norm 1.

  Args:
    model: left as it is.
    examples: grouped by length; every batch is drawn at random from one group.
    mesh: the devices that the model is placed on.
    pad: token that rows are filled up with.
    steps: number of updates.
    batch_size: examples per update, rounded up to a multiple of the devices that rows are spread over.
    learning_rate: of Adam.
    seed: of the draws.

  Raises:
    OutOfMemory: a device cannot hold what an update needs.
  """
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
  rows = named_sharding(mesh, ("batch", None))
  batch_size = round_up_rows(batch_size, mesh)

  def loss_fn(params: nnx.State, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params, rest)
    total, _ = model.next_token_loss(model.hidden(tokens[:, :-1]), tokens[:, 1:], weights, chunk=_CHUNK)
    return total / jnp.sum(weights)

  def step(state: tuple, tokens: jax.Array, weights: jax.Array) -> tuple[tuple, jax.Array]:
    params, opt_state = state
    loss, gradients = jax.value_and_grad(loss_fn)(params, tokens, weights)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  everywhere = NamedSharding(mesh, PartitionSpec())

  def placed(leaf: jax.Array) -> jax.Array:
    return jax.device_put(leaf, leaf.sharding if isinstance(leaf.sharding, NamedSharding) else everywhere)

  rng, losses = np.random.default_rng([_SEED, seed]), []
  with memory_errors(), jax.set_mesh(mesh):
    params = jax.tree.map(lambda leaf: placed(jnp.copy(leaf)), params)  # donated below
    state = params, jax.tree.map(placed, optimizer.init(params))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
    for _ in range(steps):
      pool = examples[int(rng.integers(len(examples)))]
      tokens, weights = make_batch([pool[i] for i in rng.integers(len(pool), size=batch_size)], pad)
      state, loss = compiled_step(state, jax.device_put(tokens, rows), jax.device_put(weights, rows))
      losses.append(loss)
    if losses:
      first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
      logging.info("babilong: %d steps on answers alone, loss %.3f to %.3f nats a token", steps, first, last)
  return nnx.merge(graph, state[0], rest)


def answer_examples(model: Atma, tokenizer: Tokenizer, examples: Sequence[Example], mesh: Mesh,
                    progress: Progress = lambda tokens: None) -> list[str]:
  """The model's answers, decoded greedily up to end-of-text or slightly beyond the length of the longest target.

  Raises:
    OutOfMemory: the cache or the pass over the prompts does not fit.
  """
  most = max(len(e.answer) for e in examples) + 4
  capacity = 1 << (max(len(e.prompt) for e in examples) + most - 1).bit_length()
  rows = round_up_rows(max(1, min(_ROWS, _CACHED_TOKENS // capacity, len(examples))), mesh)
  needed = nbytes(jax.eval_shape(lambda: Cache.create(model.config, rows + 1, capacity)))
  free = available_bytes(mesh.devices.flat[0])
  if free is not None and 2 * needed > free:
    raise OutOfMemory(f"decoding at {capacity} tokens needs {2 * needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free")
  texts = [""] * len(examples)
  with memory_errors(), jax.set_mesh(mesh):
    engine = make_engine(model, tokenizer, mesh, rows=rows, capacity=capacity)
    for output in engine.stream([e.prompt for e in examples], Sampling(max_tokens=most, temperature=0.0)):
      texts[output.request] += output.text
      if output.finish_reason is not None:
        progress(len(examples[output.request].prompt))
  return texts


def _cell(inputs: Inputs, options: BabilongOptions, task: str, length: str, tuned: Callable[[], Atma],
          settings: dict[str, Any]) -> Cell:
  examples = load_examples(options.babilong_test, task, length, inputs.tokenizer, options.babilong_examples)
  text = fingerprint(np.concatenate([part for e in examples for part in (e.prompt, e.answer)]))

  def run(progress: Progress) -> list[Measurement]:
    answers = answer_examples(tuned(), inputs.tokenizer, examples, inputs.mesh, progress)
    right = sum(answer.strip() == example.target for answer, example in zip(answers, examples, strict=True))
    return [Measurement("babilong_exact", tokens_of(length), right / len(examples), len(examples),
                        interval=wilson_interval(right, len(examples)))]

  return Cell(f"babilong {task} at {length}", (("babilong_exact", tokens_of(length)),),
              {**settings, "task": task, "examples": len(examples), "text": text}, sum(len(e.prompt) for e in examples), run)


def babilong_section(runs: Sequence[Run]) -> str:
  """Exact match against length, one panel per task."""
  tasks = sorted({r["settings"]["task"] for run in runs for r in run.select("babilong_exact")}, key=lambda t: (len(t), t))
  if not tasks:
    return ""
  panels = {task: series(runs, "babilong_exact", task=task) for task in tasks}
  return markup.image(figures.accuracy_panels(panels, chance=False), "BABILong exact match")


SUITE = Suite(
  help="BABILong's questions in long text, after fine-tuning on short ones",
  cells=babilong_cells,
  options=BabilongOptions,
  columns=("babilong_exact",),
  settings={"task": str},
  sections={"BABILong after answer-only fine-tuning": babilong_section},
  order=50,
  schema={"settings": {"task": str}},
)
