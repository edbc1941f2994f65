"""Reads and writes checkpoint directories in the published format: tensors, ``config.json`` and ``tokenizer.json``.

The tensors are in ``weights.pt`` or, for `transformers`, in ``*.safetensors``.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from absl import logging

from atma_jax.config import Config, DataConfig
from atma_jax.data.tokenizers import HuggingFaceTokenizer, NamedTokenizer, Tokenizer, load_tokenizer
from atma_jax.errors import UserError
from atma_jax.models import Atma
from atma_jax.pytorch.archive import Tensors, open_safetensors, open_state_dict, read_json, write_safetensors, write_state_dict
from atma_jax.pytorch.description import describe
from atma_jax.pytorch.published_config import from_published, model_config, read_config, to_published
from atma_jax.pytorch.published_limits import uncarried
from atma_jax.pytorch.published_raven import is_raven
from atma_jax.pytorch.published_tensors import from_state_dict, to_state_dict
from atma_jax.pytorch.transformers_export import OWN_TOKENIZER, check_exportable, write_for_transformers

# Formats, and the file that holds the weights.
FORMATS = {"pytorch": "weights.pt", "safetensors": "model.safetensors", "transformers": "model.safetensors"}


def is_published(directory: str | os.PathLike) -> bool:
  """Returns whether a directory is a published checkpoint, rather than one that this package trained."""
  folder = pathlib.Path(directory)
  return (folder / FORMATS["pytorch"]).is_file() or any(folder.glob("*.safetensors"))


def load_pytorch(directory: str | os.PathLike) -> Atma:
  """Loads the model of a published checkpoint directory, with weights in the dtype that they are stored in.

  PyTorch is not needed. `atma_jax.load_model` takes such a directory, too, and also reads the tokenizer.

  Args:
    directory: holds ``config.json``, and ``weights.pt`` or ``*.safetensors``.

  Returns:
    The model, its arrays on the default device.

  Raises:
    UserError: a file is missing or malformed, or a tensor, which is named, is missing, unexpected or of the wrong shape.

  Example:
    >>> model = load_pytorch("published/atma_378m")
    >>> logits = model(jnp.zeros((1, 16), jnp.int32))  # (1, 16, V) float32
  """
  tensors = _open_tensors(pathlib.Path(directory))
  return from_state_dict(tensors, model_config(pathlib.Path(directory) / "config.json", tensors), str(directory))


def read_published(directory: str | os.PathLike, tokenizer: str | None = None) -> tuple[Config, Atma, Tokenizer]:
  """Reads the configuration, model and tokenizer of a published checkpoint directory.

  Args:
    directory: the checkpoint.
    tokenizer: a file or "bytes", as `load_tokenizer` takes it. None is the directory's own tokenizer, of which the directory
      may hold no more than a name (see `NamedTokenizer`).

  Raises:
    UserError: in the cases of `load_pytorch`, or if the tokenizer is malformed.
  """
  folder = pathlib.Path(directory)
  if tokenizer not in (None, "bytes") and not pathlib.Path(tokenizer).is_file():
    raise UserError(f"--tokenizer={tokenizer}: no such file; legal: a tokenizer.json, a SentencePiece .model, or bytes")
  tensors = _open_tensors(folder)
  fields = read_config(folder / "config.json")
  model = from_published(fields, tensors, folder / "config.json")
  text = _read_tokenizer(folder) if tokenizer is None else load_tokenizer(tokenizer)
  field = "seq_len" if is_raven(fields) else "max_position_embeddings"
  length = fields.get(field)
  data = DataConfig() if length is None else DataConfig(sequence_length=length)
  config = Config(name=folder.absolute().name, model=model, data=data)
  try:
    config.validate()
  except UserError as error:
    raise UserError(f"{folder / 'config.json'}: {field}: {error}") from error
  return config, from_state_dict(tensors, model, str(directory)), text


def write_published(directory: str | os.PathLike, kind: str, config: Config, model: Atma, tokenizer: Tokenizer,
                    step: int, lossy: bool = False) -> None:
  """Writes a checkpoint directory, which appears as a whole or not at all.

  Args:
    directory: where to write; new or empty.
    kind: one of `FORMATS`. "safetensors" adds a model card and what ``AutoConfig`` of `transformers` needs to describe the
      model; "transformers" adds what ``AutoModelForCausalLM`` and ``AutoTokenizer`` need to run it.
    config: of the model.
    model: its weights.
    tokenizer: of the model.
    step: the training step of the weights, for the model card.
    lossy: write a model that the public code would not compute, or not load, too: in fields and names that only this package
      reads, with a warning for each. "transformers" loses nothing.

  Raises:
    UserError: the directory is not empty, or cannot be written; without `lossy`, the public code would not compute the model; or
      "transformers" cannot hold the model or its tokenizer.
  """
  if kind == "transformers":
    check_exportable(model, tokenizer)
  losses = [] if kind == "transformers" else uncarried(model)
  if losses and not lossy:
    raise UserError(f"--lossy is needed, because the public code would compute otherwise: {', '.join(losses)}")
  for loss in losses:
    logging.warning("--lossy: the public code would compute otherwise: %s", loss)
  target = pathlib.Path(directory).absolute()
  partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"--output={directory}: there is something already; name a new or empty directory")
  write = write_state_dict if kind == "pytorch" else write_safetensors
  try:
    partial.mkdir(parents=True)
    fields = to_published(config)
    if kind == "safetensors":
      fields |= describe(partial, config, model, tokenizer, step)
    if kind == "transformers":
      fields |= write_for_transformers(partial, config, model, tokenizer, step)
    else:
      _write_tokenizer(partial, kind, tokenizer)
    (partial / "config.json").write_text(json.dumps(fields, indent=1))
    write(partial / FORMATS[kind], *to_state_dict(model))
    os.replace(partial, target)
  except OSError as error:
    raise UserError(f"--output={directory}: cannot write: {error.strerror or error}") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _open_tensors(folder: pathlib.Path) -> Tensors:
  """Opens weights.pt if there is one, else all safetensors files."""
  weights, others = folder / FORMATS["pytorch"], sorted(folder.glob("*.safetensors"))
  return open_safetensors(others) if others and not weights.is_file() else open_state_dict(weights)


def _read_tokenizer(folder: pathlib.Path) -> Tokenizer:
  """Reads the directory's own tokenizer."""
  path = folder / "tokenizer.json"
  if (folder / OWN_TOKENIZER).is_file():
    return load_tokenizer(str(folder / OWN_TOKENIZER))
  if (folder / "tokenizer.model").is_file():
    return load_tokenizer(str(folder / "tokenizer.model"))
  values = read_json(path, "valid JSON", "give --tokenizer=FILE, the one the model was trained with")
  if isinstance(values, dict) and isinstance(values.get("tokenizer_name"), str):
    return NamedTokenizer(values["tokenizer_name"])
  return load_tokenizer(str(path))


def _write_tokenizer(folder: pathlib.Path, kind: str, tokenizer: Tokenizer) -> None:
  """Writes a tokenizer in the form that readers of this kind of checkpoint understand best."""
  if isinstance(tokenizer, NamedTokenizer):
    (folder / "tokenizer.json").write_text(json.dumps({"tokenizer_name": tokenizer.name}))
  elif isinstance(tokenizer, HuggingFaceTokenizer):
    (folder / "tokenizer.json").write_bytes(tokenizer.to_bytes())
  elif kind == "safetensors" and tokenizer.kind == "sentencepiece":
    (folder / "tokenizer.model").write_bytes(tokenizer.to_bytes())
  else:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()))
