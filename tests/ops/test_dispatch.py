"""An implementation asked for by name is obeyed or refused, by every op and so by every model; only "auto" chooses."""

from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atma_jax.config import MemoryConfig, ModelConfig
from atma_jax.models import Atma
from atma_jax.ops.context_parallel import delta, ring_attention
from atma_jax.ops.core import dispatch
from atma_jax.ops.cross_entropy import api as cross_entropy
from atma_jax.ops.gated_delta import api as gated_delta
from atma_jax.ops.gated_delta import step
from atma_jax.ops.polar_attention import api as polar_attention
from atma_jax.ops.polar_attention.cached import api as cached
from atma_jax.ops.rms_norm import api as rms_norm
from atma_jax.ops.short_conv import api as short_conv
from atma_jax.ops.slot_memory import api as slot_memory
from atma_jax.ops.softmax_attention import api as softmax_attention
from atma_jax.ops.squared_gate import api as squared_gate

MODULES = (cross_entropy, gated_delta, step, polar_attention, cached, rms_norm, short_conv, slot_memory, softmax_attention,
           squared_gate)
OPS = {op.name: op for module in MODULES for op in vars(module).values() if isinstance(op, dispatch.Op)}
SPLIT = {op.name: op for op in (delta.TRANSITION, ring_attention.ATTENTION)}  # whose oracles are the unsplit ops


@pytest.mark.parametrize("op", [*OPS.values(), *SPLIT.values()], ids=lambda op: op.name)
def test_every_entry_names_a_function(op):
  for name, entry in op.implementations.items():
    assert name in dispatch.NAMES and callable(entry.function)
  assert "xla" in op.implementations and ("reference" in op.implementations) == (op.name in OPS)


@pytest.mark.parametrize("op", [*OPS.values(), *SPLIT.values()], ids=lambda op: op.name)
@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_where_the_plain_form_serves_a_kernels_name_it_does_so_on_the_kernels_device_alone(monkeypatch, op, name):
  if name not in op.implementations:
    with pytest.raises(NotImplementedError, match=f"{op.name} has no '{name}' implementation, only xla"):
      op.resolve(name)
  elif op.implementations[name].device is not None:
    with pytest.raises(NotImplementedError, match=rf"{op.name}: '{name}' needs a .PU, and this runs on cpu"):
      op.resolve(name)
    monkeypatch.setattr(dispatch, "platform", lambda: name.removeprefix("pallas_"))
    assert op.resolve(name) == name


def test_a_name_that_does_not_exist_is_told_from_one_that_an_op_lacks():
  with pytest.raises(ValueError, match=r"implementation='cudnn' is none of auto, reference"):
    OPS["softmax_attention"].resolve("cudnn")


@pytest.mark.parametrize("attention, pattern, op", [
  ("polar", ("global",), "polar_attention"), ("nope", ("global",), "softmax_attention"),
  ("rope", ("global",), "softmax_attention"), ("polar", ("local",), "gated_short_conv")])
@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_a_model_does_without_no_kernel_that_it_asks_for(attention, pattern, op, name):
  config = ModelConfig(vocab_size=32, num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, scan=False,
                       block_pattern=pattern, attention=attention, memory=MemoryConfig(enabled=False), implementation=name)
  with pytest.raises(NotImplementedError, match=f"{op}(: '{name}' (takes|needs)| has no '{name}' implementation)"):
    jax.eval_shape(lambda: Atma(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 8), jnp.int32)))


@pytest.mark.parametrize("attention", ["polar", "nope", "rope"])
def test_a_model_of_oracles_is_the_model(attention):
  def logits(name):
    config = ModelConfig(vocab_size=32, num_layers=3, width=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
                         attention=attention, activation_dtype="float32", init="mimetic", implementation=name)
    return jax.jit(lambda tokens: Atma(config, rngs=nnx.Rngs(0))(tokens))(jnp.arange(24).reshape(1, 24) % 32)

  with jax.default_matmul_precision("highest"):
    oracle, *others = map(logits, ("reference", "xla", "auto"))
  for other in others:
    np.testing.assert_allclose(other, oracle, atol=1e-5)
