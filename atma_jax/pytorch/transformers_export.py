"""What `transformers` needs to run a checkpoint besides weights and ``config.json``: modelling code, tokenizer, defaults.

The code is one file, `atma_jax/pytorch/modeling_atma.py`, which is copied beside the weights. It computes every model of local
and global mixers, so nothing that the public PyTorch code lacks is lost here.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from flax import nnx

from atma_jax.config import Config, shown
from atma_jax.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.models.memory import LogGammaCap
from atma_jax.pytorch.description import common_fields, model_card
from atma_jax.pytorch.fast_tokenizer import end_of_text, tokenizer_json

OWN_TOKENIZER = "atma_tokenizer.json"  # ours, where no other file holds it to the last byte
_CODE = "modeling_atma"  # the module
_KINDS = ("local", "global")  # of mixers, that it computes

_USE = """\
`AutoModelForCausalLM.from_pretrained(THIS_DIRECTORY, trust_remote_code=True)` loads it, in {dtype}; the code it trusts is
`modeling_atma.py`. `AutoTokenizer.from_pretrained(THIS_DIRECTORY)` adds no special tokens. The token that begins and ends
documents is `{end}` ({end_id}): generate from it where there is no prompt.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
    model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY", trust_remote_code=True)
    print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=32)[0]))

atma_jax reads the directory, too:

    python -m atma_jax.generate --checkpoint=THIS_DIRECTORY --prompt="..."
    python -m atma_jax.evaluate --checkpoint=THIS_DIRECTORY --data=PREPARED_DATA --output=RESULTS"""


def check_exportable(model: Atma, tokenizer: Tokenizer) -> None:
  """Raises `UserError` for what ``modeling_atma.py`` does not compute, and for a tokenizer that does not fit the model."""
  config = model.config
  kinds = sorted(set(config.layer_kinds) - set(_KINDS))
  if kinds:
    raise UserError(f"--format=transformers: config.model.block_pattern={shown(tuple(config.block_pattern))} cannot be written: "
                    f"modeling_atma.py has no {', '.join(kinds)} blocks; legal: {', '.join(_KINDS)}")
  if nnx.to_flat_state(nnx.state(model, LogGammaCap)):
    raise UserError("--format=transformers: the model has a retention cap, which the format does not hold; load it without one")
  if not 0 < tokenizer.vocab_size <= config.vocab_size:
    raise UserError(f"--format=transformers: the {tokenizer.kind} tokenizer has {tokenizer.vocab_size} ids; legal: 1 to "
                    f"config.model.vocab_size={config.vocab_size}")


def write_for_transformers(folder: pathlib.Path, config: Config, model: Atma, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
  """Writes modelling code, tokenizer, generation defaults and model card into a folder; arguments are those of `describe`.

  Returns:
    The fields that config.json needs in addition to the published ones.

  Raises:
    UserError: the tokenizer cannot be written as tokenizer.json.
  """
  (folder / f"{_CODE}.py").write_text(pathlib.Path(__file__).with_name(f"{_CODE}.py").read_text())
  content, end = tokenizer_json(tokenizer), end_of_text(tokenizer)
  (folder / "tokenizer.json").write_text(content)
  if isinstance(tokenizer, SentencePieceTokenizer):
    (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
    complete = True
  else:
    complete = isinstance(tokenizer, HuggingFaceTokenizer) and content.encode() == tokenizer.to_bytes()
  if not complete or tokenizer.chat_template is not None:
    (folder / OWN_TOKENIZER).write_text(json.dumps(tokenizer.to_dict()))
  # No text encodes to a special token, except in a conversation: `apply_chat_template` encodes the end of a turn as text.
  chat = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template.to_jinja()}
  _write_json(folder / "tokenizer_config.json", chat | {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end, "padding_side": "left",
    "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
    "split_special_tokens": not chat})
  ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
  _write_json(folder / "generation_config.json", ids)
  use = _USE.format(dtype=config.model.param_dtype, end=end, end_id=tokenizer.eot_id)
  (folder / "README.md").write_text(model_card(config, model, tokenizer, step, "transformers", use))
  classes = {"AutoConfig": f"{_CODE}.AtmaConfig", "AutoModelForCausalLM": f"{_CODE}.AtmaForCausalLM"}
  return common_fields(config, tokenizer) | ids | {"auto_map": classes, "dtype": config.model.param_dtype,
                                                   "activation_dtype": config.model.activation_dtype}


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=1))
