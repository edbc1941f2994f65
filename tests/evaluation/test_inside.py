"""The suites ``diagnostics`` and ``retention`` against arrays taken block by block and reduced in float64."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import Config, DataConfig, MemoryConfig, ModelConfig, RetentionCap
from atma_jax.data.tokenizers import ByteTokenizer
from atma_jax.errors import UserError
from atma_jax.evaluation.api import evaluate
from atma_jax.evaluation.options import CheckedOptions, parse_caps
from atma_jax.evaluation.records import Measurement, ResultsFile
from atma_jax.evaluation.scoring import Scorer
from atma_jax.evaluation.suite import Inputs
from atma_jax.evaluation.suites import diagnostics
from atma_jax.evaluation.suites.diagnostics import diagnostics_cells, diagnostics_table
from atma_jax.evaluation.suites.retention import outliers, retention_cells, retention_table
from atma_jax.evaluation.tapping import document_rows
from atma_jax.models import Atma
from atma_jax.models.residual import ResidualStream
from atma_jax.models.retention_cap import with_retention_cap
from atma_jax.ops.polar_attention.api import attention_statistics
from atma_jax.sharding import make_mesh

LENGTHS, TRAINING = (16, 48), 16
CONFIG = Config(data=DataConfig(sequence_length=TRAINING, batch_size=8), model=ModelConfig(
  vocab_size=257, num_layers=3, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24,
  block_pattern=("local", "global"), activation_dtype="float32"))


def make_inputs(config: Config = CONFIG) -> Inputs:
  graphdef, params = nnx.split(nnx.eval_shape(lambda: Atma(config.model, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  model = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.3, p.dtype), params))
  mesh = make_mesh(devices=jax.devices()[:1])
  scorer = Scorer(model, mesh, batch_tokens=512, chunk=16)
  documents = [rng.integers(0, 256, n).astype(np.int32) for n in (60, 52, 47, 46)]
  return Inputs(scorer, ByteTokenizer(), documents, documents[0], LENGTHS, 0, 2, config, model, mesh, trials=24)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
  return make_inputs()


def by_hand(model: Atma, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
  """The trace of every block and the block itself, from blocks that are called one after the other."""

  def blocks(model: Atma) -> list:
    graphdef, stacked = nnx.split(model.groups)  # a single repetition
    return [*nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], stacked)).blocks, *model.tail.blocks]

  @nnx.jit
  def compute(model: Atma, tokens: jax.Array) -> list[dict[str, jax.Array]]:
    x, traces = ResidualStream(model.embed(tokens)), []
    for block in blocks(model):
      traces.append({})
      x, _ = block(x, trace=traces[-1])
    return traces

  traces = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), compute(model, rows))
  return [trace | {"block": block} for trace, block in zip(traces, blocks(model), strict=True)]


def run(cells) -> dict:
  return {(m.measure, m.length, m.layer, m.head): m for cell in cells for m in cell.run(lambda tokens: None)}


@pytest.fixture(scope="module")
def rows(inputs) -> np.ndarray:
  return document_rows(inputs, "test")


def test_rows_are_end_of_text_and_whole_prefixes(inputs, rows):
  assert rows.shape == (3, 48) and np.all(rows[:, 0] == 256)
  np.testing.assert_array_equal(rows[2, 1:], inputs.documents[2])
  with pytest.raises(UserError, match=r"--suite=test: no held-out document has the longest length of 480 .* has 60"):
    document_rows(dataclasses.replace(inputs, lengths=(480,)), "test")


@pytest.mark.slow
def test_diagnostics(inputs, rows):
  cells = diagnostics_cells(inputs, CheckedOptions())
  found = run(cells)
  assert set(found) == {number for cell in cells for number in cell.expected}
  traces = {length: by_hand(inputs.model, rows[:, :length]) for length in LENGTHS}
  for length, layers in traces.items():
    half = length // 2
    for layer, trace in enumerate(layers):
      x, base = trace["output"][:, half:].reshape(-1, 16), traces[TRAINING][layer]["output"][:, TRAINING // 2:].reshape(-1, 16)
      std = math.sqrt(base.var(0).mean())
      expected = {"residual_mean_shift": np.linalg.norm(x.mean(0) - base.mean(0)) / 4 / std,
                  "residual_std_ratio": math.sqrt(x.var(0).mean()) / std,
                  "residual_rms_ratio": math.sqrt((x**2).mean() / (base**2).mean())}
      if layer == 1:
        magnitude = trace["magnitude"][:, half:]
        core = trace["block"].mixer.core
        statistics = attention_statistics(*(jnp.asarray(trace[n], jnp.float32) for n in "qkv"), core.params, core.spec,
                                          implementation="reference")
        expected |= {name: np.asarray(value, np.float64)[:, half:].mean() for name, value in statistics.items()}
        expected |= {"magnitude": magnitude.mean(), "magnitude_saturation": (magnitude > 0.99).mean(),
                     "memory_norm": np.sqrt((trace["memory"]**2).sum((2, 3))).mean(),
                     "readout_rms": np.sqrt((trace["readout"][:, half:]**2).mean((1, 3))).mean()}
      for name, value in expected.items():
        np.testing.assert_allclose(found[name, length, layer, None].value, value, rtol=1e-4, atol=1e-6, err_msg=name)
      if layer == 1:
        heads = [b["value"] for b in found["magnitude", length, 1, None].bins]
        np.testing.assert_allclose(heads, magnitude.mean((0, 1)), rtol=1e-4)
  assert found["residual_mean_shift", TRAINING, 0, None].value == 0
  assert found["residual_std_ratio", TRAINING, 2, None].value == 1
  text = diagnostics_table([dataclasses.asdict(m) for m in found.values()])
  assert "n_eff" in text and text.count("layer 1") == 9 and text.count("layer 0") == 3


@pytest.mark.slow
def test_the_reference_is_the_training_length_even_when_it_is_not_asked_for(inputs):
  longer = dataclasses.replace(inputs, lengths=(48,))
  found, both = run(diagnostics_cells(longer, CheckedOptions())), run(diagnostics_cells(inputs, CheckedOptions()))
  for name in diagnostics.RESIDUAL:
    assert found[name, 48, 2, None].value == both[name, 48, 2, None].value


def test_baselines_have_what_they_have():
  model = dataclasses.replace(CONFIG.model, attention="nope", memory=MemoryConfig(enabled=False), num_layers=3)
  inputs = make_inputs(dataclasses.replace(CONFIG, model=model))
  inputs = dataclasses.replace(inputs, lengths=(16,))
  cells = diagnostics_cells(inputs, CheckedOptions())
  assert {name for name, *_ in run(cells)} == set(diagnostics.RESIDUAL) == {name for name, *_ in cells[0].expected}
  with pytest.raises(UserError, match="--suite=retention: the model has no memory"):
    retention_cells(inputs, CheckedOptions())


def test_retention_of_the_memory_beside_raven():
  model = dataclasses.replace(CONFIG.model, block_pattern=("local", "raven"), num_layers=2)
  inputs = dataclasses.replace(make_inputs(dataclasses.replace(CONFIG, model=model)), lengths=(16,))
  cells = retention_cells(inputs, CheckedOptions())
  assert {(layer, head) for *_, layer, head in run(cells)} == {(1, head) for head in range(model.num_heads)}


def test_retention(inputs, rows):
  cells = retention_cells(inputs, CheckedOptions())
  found = run(cells)
  assert set(found) == {number for cell in cells for number in cell.expected}
  trace = by_hand(inputs.model, rows)[1]
  memory = trace["block"].mixer.memory
  for head in range(2):
    zero_input = math.log(0.5) / np.log(1 / (1 + np.exp(-(float(memory.gamma.bias[head]) + 3.9))))
    np.testing.assert_allclose(found["half_life_zero_input", 0, 1, head].value, zero_input, rtol=1e-4)
    for length in LENGTHS:
      half_lives = math.log(0.5) / trace["log_gamma"][:, :length, head]
      measured = found["half_life_measured", length, 1, head]
      np.testing.assert_allclose(measured.value, np.median(half_lives), rtol=1e-4)
      quantiles = {b["quantile"]: b["value"] for b in measured.bins}
      np.testing.assert_allclose([quantiles[0.0], quantiles[0.95], quantiles[1.0]],
                                 np.quantile(half_lives, [0, 0.95, 1]), rtol=1e-4)
      assert measured.n == 3 * length and measured.outlier is False
  capped = dataclasses.replace(inputs, model=with_retention_cap(inputs.model, RetentionCap(3.0, "1:1")))
  capped = run(retention_cells(capped, CheckedOptions()))
  assert capped["half_life_zero_input", 0, 1, 1].value == pytest.approx(3) and max(
    b["value"] for b in capped["half_life_measured", 48, 1, 1].bins) == pytest.approx(3)
  assert capped["half_life_measured", 48, 1, 0].bins == found["half_life_measured", 48, 1, 0].bins
  text = retention_table([dataclasses.asdict(m) for m in found.values()])
  assert len(text.splitlines()) == 4 and "*" not in text.split("\n", 1)[1]


def test_outliers_exceed_the_training_length_and_the_other_heads():
  heads = {(2, h): 40.0 for h in range(7)}
  assert outliers(heads | {(6, 3): 3.07e6}, 2048) == {(6, 3)}
  assert outliers(heads | {(6, 3): 2000.0}, 2048) == set()  # within the training length
  assert outliers({where: 1e6 for where in heads} | {(6, 3): 3.07e6}, 2048) == set()  # no more than the others
  assert outliers(heads | {(6, 3): math.inf}, 2048) == {(6, 3)}
  table = retention_table([dataclasses.asdict(Measurement("half_life_zero_input", 0, 3.07e6, 1, layer=6, head=3, outlier=True))])
  assert table.splitlines()[-1].split() == ["6", "3", "3.07e+06", "*"]


def test_records_of_heads_are_told_apart(tmp_path):
  results = ResultsFile(tmp_path / "results.jsonl")
  results.append([dataclasses.asdict(Measurement("half_life_zero_input", 0, 1.0 + h, 1, layer=2, head=h)) for h in range(2)])
  results.append([{"measure": "document_loss", "length": 8, "value": 3.0}])  # written before there were layers
  again = ResultsFile(tmp_path / "results.jsonl")
  assert again.find({}, "half_life_zero_input", 0, 2, 1)["value"] == 2.0
  assert again.find({}, "half_life_zero_input", 0) is None and again.find({}, "document_loss", 8)["value"] == 3.0


def test_an_unread_tap_compiles_to_the_plain_program(inputs, rows):
  """A pass without a tap, or with one that reads nothing, compiles to the program of blocks that know of no tap."""
  graphdef, state = nnx.split(inputs.model)

  def plain(state, tokens):
    """The forward pass, written out without taps."""
    model = nnx.merge(graphdef, state)
    group_graph, stacked = nnx.split(model.groups)

    def group(x, params):
      x = ResidualStream(x)
      for block in nnx.merge(group_graph, params).blocks:
        x, _ = block(x)
      return x.value, None

    x, _ = jax.lax.scan(group, model.embed(tokens), stacked)
    x = ResidualStream(x)
    for block in model.tail.blocks:
      x, _ = block(x)
    return model.norm(x.value)

  def program(function):
    compiled = jax.jit(function).lower(state, rows).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

  expected = program(plain)
  assert program(lambda state, tokens: nnx.merge(graphdef, state).hidden(tokens)) == expected
  assert program(lambda state, tokens: nnx.merge(graphdef, state).tapped(tokens, lambda *_: None)[0]) == expected


@pytest.mark.parametrize(("texts", "heads", "caps"), [
  ((), "all", []), (("0.5",), "6:3,10:1", ["0.5 (6:3,10:1)"]),
  (("none", "256", "1e3"), "worst", [None, "256 (worst)", "1000 (worst)"])])
def test_caps_of_a_sweep(texts, heads, caps):
  assert [None if cap is None else str(cap) for cap in parse_caps(texts, heads)] == caps


@pytest.mark.parametrize(("texts", "heads", "message"), [
  (("none", "many"), "all", "--retention_cap_sweep=none,many"), (("inf",), "all", "--retention_cap=inf"),
  (("8",), "a:b", "--retention_heads=a:b")])
def test_illegal_caps_of_a_sweep(texts, heads, message):
  with pytest.raises(UserError, match=message):
    parse_caps(texts, heads)


@pytest.mark.parametrize(("overrides", "options", "message"), [
  ({"retention_cap": -1.0}, {}, "--retention_cap=-1.0"),
  ({"retention_cap": 8.0}, {"retention_caps": (None,)}, "--retention_cap and --retention_cap_sweep: only one of them"),
  ({"window": 8}, {"keep_window": True}, "--keep_window and --window: only one of them")])
def test_overrides_that_evaluate_refuses(tmp_path, overrides, options, message):
  """The message comes before anything is read."""
  with pytest.raises(UserError, match=message):
    evaluate("/nowhere", tmp_path, overrides=overrides, **options)


def test_capped_scorers_share_programs(inputs):
  rows = np.asarray(inputs.documents[0][:17])[None]
  one, two = (with_retention_cap(inputs.model, RetentionCap(tokens)) for tokens in (0.5, 4.0))
  scorer = inputs.scorer.for_model(one)
  before = scorer.compilations
  a, = scorer.losses(rows)
  b, = scorer.for_model(two).losses(rows)
  plain, = inputs.scorer.losses(rows)
  assert scorer.compilations == before + 2 and not np.allclose(a, b) and not np.allclose(b, plain)
