"""Describes a model to `transformers`: fields of config.json, a configuration class, a model card."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np

from atma_jax.config import Config
from atma_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from atma_jax.models import Atma
from atma_jax.pytorch.published_tensors import ROTARY_BUFFER, to_state_dict

_CONFIGURATION = '''"""Configuration of an Atma model, for AutoConfig.from_pretrained(..., trust_remote_code=True)."""

from transformers import PretrainedConfig


class AtmaConfig(PretrainedConfig):
  """Holds the fields of config.json."""

  model_type = "atma"
'''

_CARD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- atma
- polar-attention
- gated-delta
---

# {name}

A decoder of [Polar Attention](https://arxiv.org/abs/2606.25156): {kind}, {millions:.2f}M parameters, trained at {length} tokens
(step {step}).

| | |
|---|---|
{rows}

{use}
"""

_USE = """\
`config.json` is the configuration of the published PyTorch code with the fields that `transformers` describes a model by;
tensors have the names of that code. There is no modelling code for `transformers` here. To use it:

    python -m atma_jax.generate --checkpoint=THIS_DIRECTORY --prompt="..."
    python -m atma_jax.evaluate --checkpoint=THIS_DIRECTORY --data=PREPARED_DATA --output=RESULTS

`AutoConfig.from_pretrained(THIS_DIRECTORY, trust_remote_code=True)` describes it; the code it trusts is `configuration_atma.py`.\
"""


def describe(folder: pathlib.Path, config: Config, model: Atma, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
  """Writes the configuration class, the tokenizer's configuration and the model card into a folder.

  Args:
    folder: where to write.
    config: of the model.
    model: its weights.
    tokenizer: of the model.
    step: the training step of the weights.

  Returns:
    The fields that config.json needs in addition to the published ones.
  """
  (folder / "configuration_atma.py").write_text(_CONFIGURATION)
  if isinstance(tokenizer, HuggingFaceTokenizer):
    end = tokenizer.end_of_text
    (folder / "tokenizer_config.json").write_text(json.dumps(
      {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "clean_up_tokenization_spaces": False,
       "model_max_length": config.data.sequence_length}, indent=1))
  (folder / "README.md").write_text(model_card(config, model, tokenizer, step, "atma_jax", _USE))
  return common_fields(config, tokenizer) | {"auto_map": {"AutoConfig": "configuration_atma.AtmaConfig"}}


def common_fields(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns the fields by which `transformers` describes any decoder."""
  m = config.model
  fields = {"architectures": ["AtmaForCausalLM"], "model_type": "atma", "num_attention_heads": m.num_heads,
            "num_key_value_heads": m.num_kv_heads, "intermediate_size": m.mlp_width}
  if 0 < tokenizer.vocab_size <= m.vocab_size:
    fields |= {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
  return fields


def model_card(config: Config, model: Atma, tokenizer: Tokenizer, step: int, library: str, use: str) -> str:
  """Returns the text of the model card, with the library that loads the model and what to say about its use."""
  m = config.model
  cores = {"polar": "polar attention", "nope": "softmax attention without positions", "rope": "softmax attention with rotary "
           "positions"}
  kinds = {kind: cores[m.attention] if kind == "global" else "routed slot memory (Raven)" if kind == "raven" else kind
           for kind in m.layer_kinds if kind != "local"}
  kind = ", ".join(kinds.values()) or "short convolutions"
  kind += " and gated-delta memory" if m.memory.enabled and kinds else ""
  specs = [spec for spec in to_state_dict(model)[0] if not spec[0].endswith(ROTARY_BUFFER)]
  parameters = sum(math.prod(shape) for _, shape, _ in specs)
  rows = {"layers": m.num_layers, "width": m.width, "heads (keys and values)": f"{m.num_heads} ({m.num_kv_heads})",
          "head size": m.head_dim, "vocabulary": m.vocab_size, "tokenizer": tokenizer.kind,
          "window": "none" if m.window is None else m.window,
          "weights": ", ".join(sorted({np.dtype(dtype).name for _, _, dtype in specs}))}
  return _CARD.format(name=config.name, library=library, use=use, kind=kind, millions=parameters / 1e6,
                      length=config.data.sequence_length, step=step,
                      rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()))
