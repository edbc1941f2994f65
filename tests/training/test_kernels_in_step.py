"""How often each kernel runs in a training step, and the whole step compiled with its kernels for a TPU that is not there."""

from __future__ import annotations

import collections
import importlib.util

from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import pytest

from atma_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from atma_jax.models.block import Group
from atma_jax.models.definition import ModelDefinition
from atma_jax.models.model import REMAT_POLICIES
from atma_jax.models.residual import ResidualStream
from atma_jax.ops.core import dispatch
from atma_jax.planning import ahead
from atma_jax.sharding import make_mesh
from atma_jax.training.objective import language_model_loss

FORWARD = {
  "pallas_gpu": ("polar_attention", "gated_delta_within", "gated_delta_carry", "gated_delta_read"),
  "pallas_tpu": ("polar_attention", "gated_delta"),
}
BACKWARD = {
  "pallas_gpu": ("polar_attention_dq", "polar_attention_dkv", "gated_delta_read_back", "gated_delta_carry_back",
                 "gated_delta_read_chunks_back", "gated_delta_write_chunks_back"),
  "pallas_tpu": ("polar_attention_dq", "polar_attention_dkv", "gated_delta_back"),
}
LOCAL = {"pallas_gpu": ("gated_short_conv", "gated_short_conv_back"), "pallas_tpu": ()}  # forward and backward, of a local layer
# Of any layer, forward and backward: two norms, a gate.
EVERY = {"pallas_gpu": ({"sum_and_norm": 2}, {"sum_and_norm_back": 2, "squared_gate_gradients": 1}), "pallas_tpu": ({}, {})}


def tiny(implementation: str, remat: str, scan: bool) -> Config:
  model = ModelConfig(vocab_size=128, num_layers=8 if scan else 3, width=128, num_heads=2, num_kv_heads=1, head_dim=64,
                      mlp_width=128, remat=remat, scan=scan, implementation=implementation)
  return Config(model=model, data=DataConfig(sequence_length=128, batch_size=2), train=TrainConfig(loss_chunk=64))


def kernels(jaxpr) -> collections.Counter[str]:
  """How often each kernel that contributes to a result runs, the bodies of scans counted as often as they run."""
  found, used = collections.Counter(), {id(v) for v in jaxpr.outvars}
  for eqn in reversed(jaxpr.eqns):
    if not any(id(v) in used for v in eqn.outvars):
      continue
    used |= {id(v) for v in eqn.invars}
    if eqn.primitive.name == "pallas_call":
      found[eqn.params["name"]] += 1
      continue
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        for name, count in kernels(inner).items():
          found[name] += count * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return found


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("remat, forwards", [("none", 1), ("dots", 1), ("block", 2)])
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_a_kernel_runs_once_a_layer_and_forward_ones_again_only_under_full_rematerialisation(
    monkeypatch, implementation, remat, forwards, scan):
  monkeypatch.setattr(dispatch, "platform", lambda: implementation.removeprefix("pallas_"))
  config = tiny(implementation, remat, scan)
  definition = ModelDefinition(config.model)
  mesh = make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    params, tokens = definition.abstract_params(mesh), jax.ShapeDtypeStruct((2, 129), jnp.int32)

    def loss(params, tokens):
      return language_model_loss(definition.merge(params), tokens, z_loss=0.0, chunk=config.train.loss_chunk)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens).jaxpr
  live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  layers = 2 if scan else 1
  local = config.model.num_layers - layers
  expected = {name: layers * forwards for name in FORWARD[implementation]} | dict.fromkeys(
    BACKWARD[implementation], layers) | {name: local * times for name, times in zip(LOCAL[implementation], (forwards, 1))} | {
    name: (layers + local) * times * count for times, counts in zip((forwards, 1), EVERY[implementation])
    for name, count in counts.items()
  }
  if implementation == "pallas_gpu":
    expected |= {"log_partition": 2, "logit_gradients": 2}  # of two chunks
    for name in () if scan else ("sum_and_norm", "sum_and_norm_back"):  # of the last sum; a scan ends with that of its stream
      expected[name] += 1
  assert kernels(live) == expected


def test_remat_dots_keeps_the_residual_stream_and_what_norms_divide_by():
  """They take as much memory as the products that are added to the stream, and the backward pass recomputes neither."""
  C, config = 128, tiny("xla", "dots", scan=False).model
  config.block_pattern, config.num_layers, config.mlp_width = ("local",), 2, 2 * C
  group = nnx.eval_shape(lambda: Group(config, ("local", "local"), rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(group)

  def gradient(params, x):
    def blocks(params, x):
      return nnx.merge(graphdef, params)(ResidualStream(x))[0].value

    y, transpose = jax.vjp(jax.checkpoint(blocks, policy=REMAT_POLICIES["dots"]), params, x)
    return transpose(y)

  eqns = jax.make_jaxpr(gradient)(params, jax.ShapeDtypeStruct((2, 24, C), jnp.bfloat16)).jaxpr.eqns
  backward, = (eqn.params["jaxpr"] for eqn in eqns if eqn.params.get("policy") is REMAT_POLICIES["dots"])
  backward, _ = partial_eval.dce_jaxpr(backward, [True] * len(backward.outvars))
  kept = collections.Counter(v.aval.str_short() for v in backward.invars)
  # The stream before, between and after mixers and MLPs but the last, inputs of the convolutions, the cotangent.
  assert kept["bfloat16[2,24,128]"] == 4 + 2 * 3 + 1
  assert kept["float32[2,24,1]"] == 4
  sums = [eqn for eqn in backward.eqns if eqn.primitive.name == "reduce_sum" and eqn.params["axes"] == (2,)
          and eqn.invars[0].aval.shape == (2, 24, C)]
  assert len(sums) == 4  # of the norms' gradients


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: install atma_jax[dev]")
def test_a_whole_training_step_compiles_for_a_tpu_and_keeps_each_kernel_once():
  config = tiny("pallas_tpu", "dots", scan=False)
  config.model.block_pattern, config.model.num_layers = ("local", "global"), 2
  config.data.batch_size, config.data.sequence_length = 16, 1024  # more than stays on the chip
  plan = ahead.plan(config, "v5e:1x1")
  print("\n".join(plan.lines()))
  assert plan.traffic.kernels == len(FORWARD["pallas_tpu"] + BACKWARD["pallas_tpu"])
  assert 0 < plan.temporary_bytes < plan.peak_bytes < 2**30


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: install atma_jax[dev]")
def test_a_training_step_over_a_context_axis_compiles_for_tpus_with_the_kernels_of_every_stop():
  config = tiny("auto", "dots", scan=False)  # which takes the kernels
  config.model.block_pattern, config.model.num_layers = ("local", "global"), 2
  config.data.sequence_length, config.data.batch_size, context = 1024, 4, 4
  config.mesh.data, config.mesh.fsdp, config.mesh.context = 2, 2, context
  plan = ahead.plan(config, "v5e:4x4")
  print("\n".join(plan.lines()))
  # One global layer. Attention: three kernels a stop. Memory: its summary, forward, and backward twice.
  assert plan.traffic.kernels == 3 * context + 4
  assert plan.traffic.unknown_loops == 0
  assert plan.traffic.collectives["collective-permute"][0] >= 2 * (context - 1) + 4 * (context - 1)  # k, v; back with dk, dv
  assert 0 < plan.temporary_bytes < plan.peak_bytes < 2**30
