"""Suite ``babilong``: fine-tune on short questions, then answer the same kind of question in ever longer text.

Data in BABILong's published form (arXiv 2406.10149): ``FOLDER/TASK/LENGTH.json`` with TASK qa1 to qa20 and LENGTH 0k, 1k, 2k and
so on, each a JSON list, or a JSON object a line, of ``input``, ``question`` and ``target``. All parameters are trained on the
answer tokens and end-of-text alone, on all tasks and training lengths together; the answer is then decoded greedily and must
equal the target. The fine-tuned model is made when the first cell needs it and not kept.

Measure, one cell a task and length: ``babilong_exact`` with its Wilson interval; 0k has length 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import math
import pathlib
import re

from absl import logging
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from atma_jax.data.tokenizers import Tokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.cells import Cell, Inputs, Progress, fingerprint
from atma_jax.evaluation.options import BabilongOptions
from atma_jax.evaluation.records import Measurement
from atma_jax.evaluation.resources import OutOfMemory, available_bytes, memory_errors
from atma_jax.evaluation.statistics import wilson_interval
from atma_jax.inference.engine import Engine
from atma_jax.inference.sampling import Sampling
from atma_jax.models import Atma
from atma_jax.models.cache import Cache, nbytes
from atma_jax.ops import cross_entropy
from atma_jax.sharding import named_sharding

_SHORTEST_BATCH = 32  # tokens a row
_CHUNK = 512  # time steps whose logits exist at once
_ROWS, _ROWS_TOKENS = 8, 65_536  # decoded at once: so many rows, or tokens of cache
_PASS = 2048  # prompt tokens in a pass
_SEED = 0x6261


@dataclasses.dataclass(frozen=True)
class Example:
  """A question about a text, in tokens: what is given, from end-of-text on, and what is to follow, end-of-text included."""

  prompt: np.ndarray
  answer: np.ndarray
  target: str


def babilong_cells(inputs: Inputs) -> list[Cell]:
  """One cell a task and test length."""
  options = inputs.babilong
  if options is None or not options.train or not options.test:
    raise UserError("--suite=babilong: --babilong_train=FOLDER and --babilong_test=FOLDER are required, each of TASK/LENGTH.json")
  by_length = [[example for task in options.tasks for example in load_examples(options.train, task, length, inputs.tokenizer)]
               for length in options.train_lengths]
  text = np.concatenate([example.prompt for examples in by_length for example in examples])

  @functools.cache
  def tuned() -> Atma:
    return finetune(inputs.model, by_length, inputs.mesh, cap=inputs.config.model.logit_cap, pad=inputs.tokenizer.eot_id,
                    steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, seed=inputs.seed)

  settings = {"steps": options.steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate,
              "train_lengths": list(options.train_lengths), "tasks": list(options.tasks), "seed": inputs.seed,
              "train_text": fingerprint(text)}
  return [_cell(inputs, options, task, length, tuned, settings)
          for length in options.test_lengths for task in options.tasks]


def tokens_of(length: str) -> int:
  """0k -> 0, 4k -> 4096, 1M -> 1048576."""
  match = re.fullmatch(r"(\d+)([kKM]?)", length)
  if match is None:
    raise UserError(f"--babilong lengths: {length!r} is not one of BABILong's, such as 0k, 4k, 128k, 1M")
  return int(match[1]) << {"": 0, "k": 10, "K": 10, "M": 20}[match[2]]


def load_examples(folder: str, task: str, length: str, tokenizer: Tokenizer, count: int | None = None) -> list[Example]:
  """The first `count` examples of a file; a missing or malformed one raises `UserError` with its place."""
  tokens_of(length)
  paths = [pathlib.Path(folder) / task / f"{length}{suffix}" for suffix in (".json", ".jsonl")]
  path = next((p for p in paths if p.is_file()), None)
  if path is None:
    raise UserError(f"--suite=babilong: no file {paths[0]} or {paths[1].name}")
  try:
    text = path.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
  except (OSError, ValueError) as error:
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


def batch_of(examples: Sequence[Example], pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens (B, L + 1) padded to a power of two and weights (B, L) of the targets: 1 on answers, 0 elsewhere."""
  longest = max(len(e.prompt) + len(e.answer) for e in examples) - 1
  length = max(_SHORTEST_BATCH, 1 << (longest - 1).bit_length())
  tokens, weights = np.full((len(examples), length + 1), pad, np.int32), np.zeros((len(examples), length), np.float32)
  for row, example in enumerate(examples):
    start, stop = len(example.prompt), len(example.prompt) + len(example.answer)
    tokens[row, :stop] = np.concatenate([example.prompt, example.answer])
    weights[row, start - 1:stop - 1] = 1
  return tokens, weights


def finetune(model: Atma, examples: Sequence[Sequence[Example]], mesh: Mesh, *, cap: float, pad: int, steps: int,
             batch_size: int, learning_rate: float, seed: int) -> Atma:
  """A copy of the model trained on answers alone, with Adam at a constant rate and gradients clipped to norm 1.

  Args:
    model: is left as it is.
    examples: by length; a batch is of one length, drawn at random.
    mesh: that the model lies on; a batch has at least a row for each device.
    cap: of the logits.
    pad: token to fill rows with.
    steps, batch_size, learning_rate, seed: of the training.

  Raises:
    OutOfMemory: a device cannot hold what a step takes.
  """
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
  rows = named_sharding(mesh, ("batch", None))
  parts = math.prod(mesh.shape[axis] for axis in rows.spec[0])
  batch_size = -(-batch_size // parts) * parts

  def loss_fn(params: nnx.State, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params, rest)
    total, _ = cross_entropy(model.hidden(tokens[:, :-1]), model.head.kernel[...], model.head.bias[...], tokens[:, 1:], weights,
                             cap=cap, z_loss=0.0, chunk=_CHUNK)
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
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
    for _ in range(steps):
      pool = examples[rng.integers(len(examples))]
      tokens, weights = batch_of([pool[i] for i in rng.integers(len(pool), size=batch_size)], pad)
      state, loss = step(state, jax.device_put(tokens, rows), jax.device_put(weights, rows))
      losses.append(loss)
    if losses:
      first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
      logging.info("babilong: %d steps on answers alone, loss %.3f to %.3f nats a token", steps, first, last)
  return nnx.merge(graph, state[0], rest)


def answers(model: Atma, tokenizer: Tokenizer, examples: Sequence[Example], mesh: Mesh,
            progress: Progress = lambda tokens: None) -> list[str]:
  """What the model answers, decoded greedily to end-of-text or a little past the longest target's length.

  Raises:
    OutOfMemory: the cache or what reading takes does not fit.
  """
  most = max(len(e.answer) for e in examples) + 4
  capacity = 1 << (max(len(e.prompt) for e in examples) + most - 1).bit_length()
  parts = math.prod(mesh.shape[axis] for axis in named_sharding(mesh, ("batch",)).spec[0])
  rows = -(-max(1, min(_ROWS, _ROWS_TOKENS // capacity, len(examples))) // parts) * parts
  needed = nbytes(jax.eval_shape(lambda: Cache.create(model.config, rows + 1, capacity)))
  free = available_bytes(mesh.devices.flat[0])
  if free is not None and 2 * needed > free:
    raise OutOfMemory(f"decoding at {capacity} tokens needs {2 * needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free")
  texts = [""] * len(examples)
  with memory_errors(), jax.set_mesh(mesh):
    engine = Engine(model, tokenizer, rows=rows, capacity=capacity, chunk=chunk_for(capacity))
    for piece in engine.stream([e.prompt for e in examples], Sampling(max_tokens=most, temperature=0.0)):
      texts[piece.request] += piece.text
      if piece.finish_reason is not None:
        progress(len(examples[piece.request].prompt))
  return texts


def chunk_for(capacity: int) -> int:
  """Prompt tokens in a pass of an engine of this capacity: a power of two."""
  return 1 << (min(_PASS, capacity).bit_length() - 1)


def _cell(inputs: Inputs, options: BabilongOptions, task: str, length: str, tuned: Callable[[], Atma],
          settings: dict[str, object]) -> Cell:
  examples = load_examples(options.test, task, length, inputs.tokenizer, options.examples)
  text = fingerprint(np.concatenate([part for e in examples for part in (e.prompt, e.answer)]))

  def run(progress: Progress) -> list[Measurement]:
    found = answers(tuned(), inputs.tokenizer, examples, inputs.mesh, progress)
    right = sum(answer.strip() == example.target for answer, example in zip(found, examples, strict=True))
    return [Measurement("babilong_exact", tokens_of(length), right / len(examples), len(examples),
                        interval=wilson_interval(right, len(examples)))]

  return Cell(f"babilong {task} at {length}", (("babilong_exact", tokens_of(length)),),
              {**settings, "task": task, "examples": len(examples), "text": text}, sum(len(e.prompt) for e in examples), run)
