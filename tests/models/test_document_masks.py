"""Document masks: a packed row of a model is its documents one by one, gradients included; nothing changes without them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, TrainConfig
from atma_jax.errors import UserError
from atma_jax.models import mixers
from atma_jax.models.definition import ModelDefinition
from atma_jax.ops import document_starts
from atma_jax.sharding import make_mesh
from atma_jax.training.objective import language_model_loss
from atma_jax.training.state import abstract_state, optimizer_for
from atma_jax.training.train_step import make_train_step

END = 0  # the end-of-text token, with which documents start
T = 37
# A row that starts with a document, has two of one token and starts one with its last token; one that goes on from an earlier
# row; one of a single document, longer than the row.
ROWS = ((0, 9, 10, 11, 30, T - 1), (17,), ())
BASE = ModelConfig(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32,
                   block_pattern=("local", "global"), activation_dtype="float32", implementation="xla")


def packed() -> np.ndarray:
  """Rows (3, T + 1) in which documents start at `ROWS`."""
  rows = np.random.default_rng(1).integers(1, 64, (len(ROWS), T + 1)).astype(np.int32)
  for row, starts in zip(rows, ROWS, strict=True):
    row[list(starts)] = END
  return rows


def apart() -> tuple[np.ndarray, np.ndarray]:
  """Every document as a row (n, T + 1) of its own, filled up behind it, and the weights (n, T) of its targets."""
  rows, weights = [], []
  for row, starts in zip(packed(), ROWS, strict=True):
    edges = sorted({0, *starts, T})
    for first, end in itertools.pairwise(edges):
      rows.append(np.concatenate([row[first : end + 1], np.full(T - (end - first), 5, np.int32)]))
      weights.append(np.arange(T) < end - first)
  return np.stack(rows), np.stack(weights).astype(np.float32)


def lively(config: ModelConfig) -> dict[str, jax.Array]:
  """Parameters none of which is zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(ModelDefinition(config).init, jax.random.key(0))
  return {name: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for name, leaf in shapes.items()}


def case(name: str, *marks: pytest.MarkDecorator, **changes):
  return pytest.param(changes, id=name, marks=marks)


@pytest.mark.parametrize("changes", [
  case("polar", attention="polar", memory_reset=7, num_layers=3), case("nope", attention="nope", window=6),
  case("polar-without-memory", pytest.mark.slow, attention="polar", window=5, count_length=4, num_kv_heads=1,
       memory=MemoryConfig(enabled=False)),
  case("rope", pytest.mark.slow, attention="rope", scan=False)])
def test_a_packed_row_is_its_documents_one_by_one(changes):
  config = dataclasses.replace(copy.deepcopy(BASE), **changes)
  definition, params = ModelDefinition(config), lively(config)

  @jax.jit
  def together(params):
    return language_model_loss(definition.merge(params), jnp.asarray(packed()), z_loss=1e-3, chunk=8, first_token=END)[0]

  @jax.jit
  def separately(params):
    rows, weights = apart()
    model = definition.merge(params)
    total, _ = model.next_token_loss(model.hidden(rows[:, :-1]), rows[:, 1:], weights, z_loss=1e-3, chunk=8)
    return total / (len(ROWS) * T)

  loss, gradients = jax.value_and_grad(together)(params)
  expected_loss, expected = jax.value_and_grad(separately)(params)
  # Sums of a hundred tokens in another order; rope turns a document by the angle of its start.
  np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
  for name, value in gradients.items():
    scale = float(jnp.abs(expected[name]).max())
    np.testing.assert_allclose(value, expected[name], atol=3e-5 * max(scale, 1e-3), err_msg=name)
  unmasked = language_model_loss(definition.merge(params), jnp.asarray(packed()), z_loss=1e-3, chunk=8)[0]
  assert abs(float(unmasked) - float(loss)) > 1e-3


def test_no_document_reaches_another():
  """In bfloat16: what an earlier document says changes no bit after it, and gradients that go back to it are of rounding size."""
  config = dataclasses.replace(BASE, activation_dtype="bfloat16")
  definition, params, tokens = ModelDefinition(config), lively(config), jnp.asarray(packed()[:, :-1])

  @jax.jit
  def hidden(params, tokens):
    return definition.merge(params).hidden(tokens, document_starts(tokens, END))

  found, other = hidden(params, tokens), hidden(params, tokens.at[:, 1:9].set(3))
  assert jnp.isfinite(found.astype(jnp.float32)).all()
  np.testing.assert_array_equal(found[0, 9:], other[0, 9:])
  np.testing.assert_array_equal(found[1, 17:], other[1, 17:])
  assert not np.array_equal(found[2, 17:], other[2, 17:])

  embedding, = (name for name in params if name.startswith("embed"))
  starts = document_starts(tokens[1:2], END)

  @jax.jit
  @jax.grad
  def gradient_of(table):
    found = definition.merge({**params, embedding: table}).hidden(tokens[1:2], starts)
    return jnp.sum(jnp.square(found[0, 17:].astype(jnp.float32)))

  gradient = gradient_of(params[embedding])
  before = np.setdiff1d(tokens[1, :17], tokens[1, 17:])
  # Decays of a chunk are differences of running sums, whose gradients cancel but for their rounding, some 2^-24.
  assert jnp.abs(gradient[before]).max() <= 1e-5 * jnp.abs(gradient[tokens[1, 20]]).max()


def recipe(model: ModelConfig = BASE, **changes) -> Config:
  config = Config(model=copy.deepcopy(model), data=DataConfig(sequence_length=16, batch_size=4),
                  train=TrainConfig(document_masks=True, loss_chunk=8))
  for name, value in changes.items():
    part, _, field = name.partition("_")
    setattr(getattr(config, part), field, value)
  return config


@functools.cache
def step_text(masks: bool, end_of_text: int | None) -> str:
  """The program of a training step."""
  config = recipe(train_document_masks=masks)
  definition, mesh = ModelDefinition(config.model), make_mesh(devices=jax.devices()[:1])
  optimizer = optimizer_for(config, definition)
  state = abstract_state(config, definition, optimizer, mesh)
  step = make_train_step(config, definition, optimizer, mesh, state, end_of_text=end_of_text)
  with jax.set_mesh(mesh):
    return step.lower(state, jax.ShapeDtypeStruct((4, 17), jnp.int32)).as_text()


def test_without_masks_the_step_knows_of_no_documents():
  assert step_text(False, None) == step_text(False, 5) != step_text(True, 5)
  with pytest.raises(ValueError, match="end_of_text"):
    step_text(True, None)


@pytest.mark.parametrize(("changes", "message"), [
  ({"train_foreign_keys": (0, 8)}, r"config.train.foreign_keys=\(0, 8\): must be \(0,\) with train.document_masks"),
  ({"mesh_context": 2}, "config.mesh.context=2: must be 1 with train.document_masks"),
  ({"model_block_pattern": ("local", "raven")}, "config.train.document_masks=True: must be False with mixer raven")])
def test_what_knows_no_documents_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    recipe(**changes).validate()
  assert recipe().validate()


def test_distractors_are_refused():
  config = recipe()
  config.train.auxiliary.distractors = 4
  with pytest.raises(UserError, match=r"config.train.auxiliary.distractors=4: must be 0 with train.document_masks"):
    config.validate()


def test_a_mixer_that_lets_documents_see_each_other_is_refused(monkeypatch):
  monkeypatch.setattr(mixers.mixer_class("local"), "accepts_documents", False)
  with pytest.raises(UserError, match=r"config.train.document_masks=True: must be False with mixer local"):
    step_text.__wrapped__(True, 5)
  with pytest.raises(ValueError, match="starts: mixer 'local'"):
    ModelDefinition(BASE).merge(lively(BASE)).hidden(jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32))
