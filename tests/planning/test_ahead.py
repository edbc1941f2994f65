"""Plans: the counts of programs whose counts are known, and plans that fit, do not fit, or are impossible."""

from __future__ import annotations

import copy
import math
import os

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

from atma_jax.config import Config, MeshConfig
from atma_jax.errors import UserError
from atma_jax.models.definition import ModelDefinition
from atma_jax.models.operations import training_flops_per_token
from atma_jax.planning import ahead
from atma_jax.planning.hlo import traffic

pytest.importorskip("libtpu")
TINY = """
from atma_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig

def get_config():
  return Config(
    name="tiny",
    model=ModelConfig(vocab_size=512, num_layers=2, width=128, num_heads=2, num_kv_heads=1, head_dim=64, mlp_width=256,
                      block_pattern=("local",)),
    data=DataConfig(tokenizer="bytes", sequence_length=128, batch_size=8), mesh=MeshConfig(data=1, fsdp=-1),
    train=TrainConfig(steps=10))
"""


@pytest.fixture(scope="module")
def recipe() -> Config:
  namespace = {}
  exec(TINY, namespace)
  return namespace["get_config"]().validate()


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
  for name, value in ahead.ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
  return jax.sharding.Mesh(devices, ("x",))


def compiled(mesh: jax.sharding.Mesh, function, out: jax.P, *arguments: tuple[tuple[int, ...], str, jax.P]):
  """The traffic of `function` on four devices, given shape, dtype and placement of its arguments."""
  shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, where)) for shape, dtype, where in arguments]
  return traffic(jax.jit(function, out_shardings=jax.NamedSharding(mesh, out)).lower(*shapes).compile().as_text())


def test_a_product_is_counted_on_each_device(mesh):
  found = compiled(mesh, jnp.matmul, jax.P("x"), ((512, 256), "bfloat16", jax.P("x")), ((256, 384), "bfloat16", jax.P()))
  assert found.flops == 2 * (512 // 4) * 256 * 384
  assert found.collectives == {} and found.network_bytes == 0 and found.unknown_loops == 0
  moved = 2 * (512 // 4 * 256 + 256 * 384 + 512 // 4 * 384)  # each array once: read, read, written
  assert moved <= found.memory_bytes <= 2 * moved


@pytest.mark.parametrize("rounds", [3, 11])
def test_what_a_loop_holds_is_counted_as_often_as_it_runs(mesh, rounds):
  def loop(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  found = compiled(mesh, loop, jax.P("x"), ((512, 256), "bfloat16", jax.P("x")), ((rounds, 256, 256), "bfloat16", jax.P()))
  assert found.flops == rounds * 2 * (512 // 4) * 256 * 256
  assert found.unknown_loops == 0


@pytest.mark.slow
def test_a_loop_over_stacked_arrays_moves_a_slice_a_round(mesh):
  """16 weights of 8 MiB, forward and backward; the residuals are stacked, and read again by the backward pass."""
  rounds, width, rows = 16, 2048, 4096  # rows of a device

  def loss(x, w):
    return jnp.sum(jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].astype(jnp.float32)))

  arguments = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=jax.NamedSharding(mesh, where))
               for shape, where in (((4 * rows, width), jax.P("x")), ((rounds, width, width), jax.P()))]
  found = traffic(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text())
  weights, activations = 2 * rounds * width * width, 2 * rounds * rows * width
  least = 2 * weights + weights + 2 * activations  # read twice, their gradient written; activations written and read
  assert least <= found.memory_bytes <= 4 * least


def test_collectives_are_counted_with_their_bytes(mesh):
  size = 1024 * 512
  found = compiled(mesh, lambda x: x * 2, jax.P(), ((1024, 512), "float32", jax.P("x")))
  assert found.collectives == {"all-gather": (1, 4 * size)}  # the whole buffer ends in every device
  found = compiled(mesh, lambda a, b: a @ b, jax.P(), ((1024, 2048), "float32", jax.P(None, "x")),
                   ((2048, 512), "float32", jax.P("x")))
  assert found.collectives == {"all-reduce": (1, 2 * 4 * size)}  # a ring's two passes over it


def test_a_collective_that_is_spread_over_a_loop_counts_once():
  """As the TPU compiler writes an all-gather that runs beside a loop: its pieces are fused into the loop's instructions."""
  gather = 'f32[8,128]{1,0} all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="7"}'

  def fusion(name, calls):
    return f"  %{name} = f32[8,128]{{1,0}} fusion(%x), kind=kCustom, calls=%{calls}"

  pieces = [line for name in ("start", "piece", "done") for line in (
    f"%{name}.body (p: f32[4,128]) -> f32[8,128] {{", "  %p = f32[4,128]{1,0} parameter(0)",
    f"  ROOT %{name}.gather = {gather}", "}")]
  text = "\n".join([
    *pieces,
    "%loop (x: f32[4,128]) -> f32[4,128] {", "  %x = f32[4,128]{1,0} parameter(0)", fusion("inner", "piece.body"), "}",
    "%condition (x: f32[4,128]) -> pred[] {", "  %bound = s32[] constant(12)", "  %i = s32[] parameter(0)",
    "  ROOT %less = pred[] compare(%i, %bound), direction=LT", "}",
    "ENTRY %main (x: f32[4,128]) -> f32[4,128] {", "  %x = f32[4,128]{1,0} parameter(0)", fusion("first", "start.body"),
    "  ROOT %while = f32[4,128]{1,0} while(%x), condition=%condition, body=%loop", fusion("last", "done.body"), "}"])
  assert traffic(text).collectives == {"all-gather": (1, 4 * 8 * 128)}


@pytest.mark.slow
def test_a_tiny_plan(recipe):
  plan = ahead.plan(recipe, "v5e:2x2")
  definition = ModelDefinition(recipe.model)
  parameters = sum(math.prod(p.shape) for p in jax.eval_shape(definition.init, jax.random.key(0)).values())
  assert plan.devices == 4 and plan.mesh["fsdp"] == 4 and plan.tokens == 8 * 128
  assert parameters < plan.parameter_bytes <= 4 * parameters  # float32, the matrices over four devices
  assert plan.optimizer_bytes >= plan.parameter_bytes  # a moment of each; two for what AdamW has
  assert plan.batch_bytes == 8 // 4 * 129 * 4
  assert plan.flops == training_flops_per_token(definition, 128) * plan.tokens
  assert plan.traffic.flops * plan.devices > plan.flops  # the optimizer's too
  assert plan.peak_bytes >= plan.parameter_bytes + plan.optimizer_bytes
  assert plan.traffic.collectives and plan.step_seconds == max(plan.seconds.values()) and 0 < plan.mfu < 1
  text = "\n".join(plan.lines())
  for words in ("4 devices, fsdp=4", "of 15.75 GiB: fits", "useful operations", "limit:", "MFU", "all-"):
    assert words in text, text


@pytest.mark.slow
def test_two_slices_lie_along_data_and_talk_over_the_network(recipe):
  config = copy.deepcopy(recipe)
  config.mesh = MeshConfig(data=2, fsdp=4)
  plan = ahead.plan(config, "v5e:2x2", slices=2)
  assert plan.devices == 8 and plan.topology == "2 x v5e:2x2"
  assert plan.traffic.network_bytes > 0 and plan.seconds["network"] > 0
  assert "between slices" in "\n".join(plan.lines())
  with pytest.raises(UserError, match=r"data=1 must be a multiple of the 2 slices"):
    ahead.plan(recipe, "v5e:2x2", slices=2)


@pytest.mark.slow
def test_evaluation_has_a_plan_too(recipe):
  plan = ahead.plan(recipe, "v6e:2x2", mode="evaluate", length=256)
  assert plan.tokens == 4 * 256 and plan.optimizer_bytes == 0
  assert plan.flops == pytest.approx(training_flops_per_token(ModelDefinition(recipe.model), 256) * plan.tokens / 3)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_one_line_with_the_numbers(main, tmp_path):
  """Through the main: 17 GB of embedding on each device of 15.75 GiB."""
  (tmp_path / "tiny.py").write_text(TINY)
  done = main("compile_ahead", f"--config={tmp_path / 'tiny.py'}", "--topology=v5e:2x2", "--mode=evaluate",
              "--config.mesh.data=4", "--config.mesh.fsdp=1", f"--config.model.vocab_size={2**25}")
  errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert done.returncode == 2 and len(errors) == 1 and done.stdout == "", done.stderr
  assert "--topology=v5e:2x2: the step does not fit the 15.75 GiB of a device: needs " in errors[0]
  assert "of 15.75G" in errors[0] and "config.mesh.fsdp" in errors[0]


@pytest.mark.parametrize(("topology", "changes", "message"), [
  ("v5e:3x5", {}, "--topology=v5e:3x5: not a shape this libtpu knows"),
  ("v5e:4by4", {}, "--topology=v5e:4by4: not a shape this libtpu knows"),
  ("v9:2x2", {}, "--topology=v9:2x2: must be one of v4, v5e, v5p, v6e and a shape"),
  ("v5e:2x2", {"fsdp": 3}, "mesh data=1 x fsdp=3 x tensor=1 x context=1 does not fit 4 devices"),
  ("v5e:4x4", {}, "config.data.batch_size=8: axis 'batch' of size 8 does not divide over mesh data*fsdp=16"),
])
def test_what_cannot_be_is_one_line(recipe, topology, changes, message):
  config = copy.deepcopy(recipe)
  for axis, size in changes.items():
    setattr(config.mesh, axis, size)
  with pytest.raises(UserError) as error:
    ahead.plan(config, topology)
  assert message in str(error.value) and "\n" not in str(error.value)
