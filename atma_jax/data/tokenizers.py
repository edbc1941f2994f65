"""Text to token ids and back: SentencePiece (trained here or loaded), bytes, or a tokenizer.json from a file or the hub.

Every tokenizer has one end-of-text id, `eot_id`, which separates documents and which no text encodes to. A SentencePiece model
trained here is lossless, ``decode(encode(text)) == text`` for any text: it uses identity normalisation and no dummy prefix, makes
every digit a piece of its own, and encodes unknown characters as their UTF-8 bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any, ClassVar, TypeVar

import huggingface_hub
from jaxtyping import Int
import numpy as np
import sentencepiece
import tokenizers

from atma_jax.config import TOKENIZER_OF_INIT_FROM, ModelConfig, shown
from atma_jax.data.chat_template import ChatTemplate
from atma_jax.data.remote import hub_address, retried
from atma_jax.errors import UserError
from atma_jax.json_input import MalformedJSON, parse_json, read_bytes

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_KNOWN_VOCABULARIES = {"gpt2": (50_257, 50_256)}  # size and end-of-text id
_MOST_BYTES = 256 << 20  # of a tokenizer's file
_MOST_IDS = 1 << 28  # as many as a model may have
_LEGAL = ("'sentencepiece' (train one), 'bytes', a SentencePiece .model file, a Hugging Face tokenizer.json, or the name of a "
          "model on the hub, such as gpt2")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?(?<!\.json)(?<!\.model)")
_HUB_FILES = ("tokenizer.json", "tokenizer.model")  # the first that a model has
_T = TypeVar("_T")
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care


class Tokenizer:
  """The interface of all tokenizers.

  Attributes:
    kind: name of the class of tokenizers, as stored beside its bytes.
    vocab_size: number of ids.
    eot_id: the end-of-text id.
    chat_template: how conversations are written, for a model that is trained on them; None otherwise.
  """

  kind: ClassVar[str]
  vocab_size: int
  eot_id: int
  chat_template: ChatTemplate | None = None

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    """Returns the token ids of a text, (T,) int32, without end-of-text."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    """Returns the text of token ids. End-of-text is dropped."""
    raise NotImplementedError

  def to_bytes(self) -> bytes:
    """Returns everything that defines the tokenizer."""
    raise NotImplementedError

  def to_dict(self) -> dict[str, Any]:
    """Returns a JSON-ready form for checkpoints and prepared directories; `tokenizer_from_dict` reads it back."""
    stored: dict[str, Any] = {"kind": self.kind, "base64": base64.b64encode(self.to_bytes()).decode()}
    return stored if self.chat_template is None else stored | {"chat_template": dataclasses.asdict(self.chat_template)}

  def __reduce__(self) -> tuple[Any, ...]:
    return tokenizer_from_dict, (self.to_dict(),)

  @property
  def fingerprint(self) -> str:
    """sha256 of the kind, the defining bytes and the chat template, if there is one."""
    template = b"" if self.chat_template is None else b"\0" + json.dumps(dataclasses.asdict(self.chat_template)).encode()
    return hashlib.sha256(self.kind.encode() + b"\0" + self.to_bytes() + template).hexdigest()


class ByteTokenizer(Tokenizer):
  """The bytes of UTF-8 as ids 0 to 255, and end-of-text as id 256."""

  kind = "bytes"
  vocab_size = 257
  eot_id = 256

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    values = np.asarray(ids, np.int64)
    return values[values < 256].astype(np.uint8).tobytes().decode(errors="replace")

  def to_bytes(self) -> bytes:
    return b""


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model.

  Args:
    model: the serialised protocol buffer.
    name: of the model, for error messages.
  """

  kind = "sentencepiece"

  def __init__(self, model: bytes, name: str = "SentencePiece model"):
    self._model = model
    if not model:
      raise UserError(f"{name} is not a SentencePiece model: it is empty")
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      self.vocab_size = self._processor.vocab_size()
    except (RuntimeError, ValueError) as error:
      raise UserError(f"{name} is not a SentencePiece model") from error
    if not 0 < self.vocab_size <= _MOST_IDS:
      raise UserError(f"{name} has a vocabulary of {self.vocab_size} pieces; legal: 1 to {_MOST_IDS}")
    try:
      self.eot_id = self._end_of_text(name)
    except (IndexError, RuntimeError, ValueError) as error:
      raise UserError(f"{name} is not a SentencePiece model that can be used: {error}") from error
    marks = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    self._space_mark_ids = marks if all(map(self._processor.is_byte, marks)) else None

  def _end_of_text(self, name: str) -> int:
    if self._processor.eos_id() >= 0:
      return self._processor.eos_id()
    for piece in _END_OF_TEXT_NAMES:
      if not self._processor.is_unknown(self._processor.piece_to_id(piece)):
        return self._processor.piece_to_id(piece)
    raise UserError(f"{name} has no end-of-text piece: an eos id or one of {', '.join(_END_OF_TEXT_NAMES)} is needed")

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    if _SPACE_MARK not in text or self._space_mark_ids is None:
      return np.asarray(self._processor.encode(text), np.int32)
    ids: list[int] = []
    for index, part in enumerate(text.split(_SPACE_MARK)):
      ids += self._space_mark_ids if index else []
      ids += self._processor.encode(part)
    return np.asarray(ids, np.int32)

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    return self._processor.decode([int(i) for i in ids if i != self.eot_id])

  def to_bytes(self) -> bytes:
    return self._model


class HuggingFaceTokenizer(Tokenizer):
  """A Hugging Face tokenizer. Text that spells a special token is encoded as plain text.

  Args:
    text: the content of ``tokenizer.json``.
    name: of the file, for error messages.

  Attributes:
    end_of_text: the token that separates documents.
  """

  kind = "huggingface"

  def __init__(self, text: str, name: str = "tokenizer.json"):
    self._text = text
    self._name = name
    self._tokenizer = self._guarded("is not a Hugging Face tokenizer", lambda: tokenizers.Tokenizer.from_str(text))
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not 0 < self.vocab_size <= _MOST_IDS:
      found = f"an id of {self.vocab_size - 1}" if self.vocab_size else "an empty vocabulary"
      raise UserError(f"{name} has {found}; legal: ids from 0 to {_MOST_IDS - 1}")
    named = {token: self._tokenizer.token_to_id(token) for token in _END_OF_TEXT_NAMES}
    found = {token: eot_id for token, eot_id in named.items() if eot_id is not None}
    if not found:
      raise UserError(f"{name} has no end-of-text token: one of {', '.join(_END_OF_TEXT_NAMES)} is needed")
    self.end_of_text, self.eot_id = next(iter(found.items()))

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    # It leaves out the offsets, which take a third of the time.
    [found] = self._guarded("cannot encode a text", lambda: self._tokenizer.encode_batch_fast([text], add_special_tokens=False))
    ids = found.ids
    return np.asarray(ids, np.int32)

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    return self._tokenizer.decode([int(i) for i in ids if i != self.eot_id], skip_special_tokens=False)

  def _guarded(self, problem: str, call: Callable[[], _T]) -> _T:
    """The result of a call of the library; what it raises for a bad file, a bare Exception or a panic, becomes a `UserError`."""
    try:
      return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
      raise
    except BaseException as error:  # panics are no Exception
      raise UserError(f"{self._name} {problem}: {str(error)[:300]}") from error

  def to_bytes(self) -> bytes:
    return self._text.encode()


class NamedTokenizer(Tokenizer):
  """A tokenizer that a published checkpoint only names. Without its vocabulary it can neither encode nor decode.

  Attributes:
    name: as the checkpoint gives it.
  """

  kind = "named"

  def __init__(self, name: str):
    self.name = name
    self.vocab_size, self._eot_id = _KNOWN_VOCABULARIES.get(name, (0, None))

  @property
  def eot_id(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
    """The end-of-text id. Raises `UserError` for a name that is not known here."""
    if self._eot_id is None:
      raise self._error()
    return self._eot_id

  def encode(self, text: str) -> Int[np.ndarray, " T"]:
    raise self._error()

  def decode(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
    raise self._error()

  def to_bytes(self) -> bytes:
    return self.name.encode()

  def _error(self) -> UserError:
    return UserError(f"the checkpoint only names its tokenizer, {self.name!r}, and holds no vocabulary: convert it with "
                     "python -m atma_jax.convert --tokenizer=FILE, a full tokenizer.json of that name")


def load_tokenizer(spec: str) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    spec: ``"bytes"``, a SentencePiece ``.model``, a Hugging Face ``tokenizer.json``, the ``tokenizer.json`` of a prepared
      directory, or the name of a model on the hub, such as ``"gpt2"`` (see `is_hub_name`).

  Raises:
    UserError: the file is missing or of another kind, or it names a tokenizer without holding its vocabulary.
    RunError: the hub does not answer, and the tokenizer is not in its cache on this machine.
  """
  if spec == ByteTokenizer.kind:
    return ByteTokenizer()
  if spec == TOKENIZER_OF_INIT_FROM:
    raise UserError(f"config.data.tokenizer={spec!r}: only train has a checkpoint to take it from, config.train.init_from; "
                    f"otherwise legal: {_LEGAL}")
  path = _from_hub(spec) if is_hub_name(spec) else pathlib.Path(os.path.expanduser(spec))
  try:
    content = read_bytes(path, most_bytes=_MOST_BYTES)
  except (OSError, ValueError) as error:
    reason = error.strerror if isinstance(error, OSError) else None
    raise UserError(f"config.data.tokenizer={spec!r}: {reason or error}; legal: {_LEGAL}") from error
  if path.suffix != ".json":
    return SentencePieceTokenizer(content, spec)
  try:
    values = parse_json(content)
  except MalformedJSON as error:
    raise UserError(f"{spec} is not valid JSON: {error}") from error
  if isinstance(values, dict) and "tokenizer_name" in values:
    raise UserError(f"{spec} only names the tokenizer {shown(values['tokenizer_name'])} and holds no vocabulary: give a "
                    "full Hugging Face tokenizer.json of that name (the one with a 'model' section) instead")
  if isinstance(values, dict) and "kind" in values:
    return tokenizer_from_dict(values, spec)
  return HuggingFaceTokenizer(content.decode(), spec)


def is_hub_name(spec: str) -> bool:
  """Whether a tokenizer is one of a model on the Hugging Face hub: MODEL or OWNER/MODEL, also @REVISION, and no file here."""
  reserved = (ByteTokenizer.kind, SentencePieceTokenizer.kind, TOKENIZER_OF_INIT_FROM)
  return spec not in reserved and _HUB_NAME.fullmatch(spec) is not None and not pathlib.Path(spec).exists()


def _from_hub(spec: str) -> pathlib.Path:
  """Fetches the tokenizer of a model on the hub into the hub's cache, or finds it there."""
  from huggingface_hub.errors import LocalEntryNotFoundError  # takes a quarter of a second

  name, _, revision = spec.partition("@")

  def fetch(file: str) -> str:
    try:
      return huggingface_hub.hf_hub_download(name, file, revision=revision or None, endpoint=hub_address())
    except LocalEntryNotFoundError as error:  # which hides why the hub could not be asked
      raise ConnectionError(f"not in the cache, and the hub does not answer: {error.__cause__ or error}") from error

  what = f"config.data.tokenizer={spec!r}: no such file here; on the hub it"
  for file in _HUB_FILES:
    try:
      return pathlib.Path(retried(functools.partial(fetch, file), what, attempts=1))  # the hub's client tries again itself
    except FileNotFoundError:
      continue
  raise UserError(f"config.data.tokenizer={spec!r}: no such file here, and {hub_address()} has no model of that name with "
                  f"{' or '.join(_HUB_FILES)}; legal: {_LEGAL}")


def tokenizer_from_dict(values: dict[str, Any], name: str = "stored tokenizer") -> Tokenizer:
  """Reads what `Tokenizer.to_dict` returned.

  Args:
    values: the stored form.
    name: of the place where it was stored, for error messages.

  Raises:
    UserError: the values describe no tokenizer.
  """
  try:
    kind, content = values["kind"], base64.b64decode(values["base64"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{name}: no tokenizer: kind or base64 is missing or malformed") from error
  try:
    match kind:
      case ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
      case SentencePieceTokenizer.kind:
        tokenizer = SentencePieceTokenizer(content, name)
      case HuggingFaceTokenizer.kind:
        tokenizer = HuggingFaceTokenizer(content.decode(), name)
      case NamedTokenizer.kind:
        tokenizer = NamedTokenizer(content.decode())
      case _:
        raise UserError(f"{name}: tokenizer kind {shown(kind)} does not exist; legal: bytes, huggingface, named, sentencepiece")
  except UnicodeDecodeError as error:
    raise UserError(f"{name}: no tokenizer: its base64 is not UTF-8 at byte {error.start}") from error
  if "chat_template" in values:
    tokenizer.chat_template = ChatTemplate.from_dict(values["chat_template"], name)
  return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
  """Trains a byte-pair encoding of `vocab_size` pieces, or of fewer if the text has nothing more to merge."""
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_passages(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        hard_vocab_limit=False, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, byte_fallback=True,
        character_coverage=0.9995, unk_id=0, bos_id=-1, eos_id=1, pad_id=-1, eos_piece=END_OF_TEXT,
        max_sentence_length=1 << 20, shuffle_input_sentence=False, minloglevel=2)
  except (RuntimeError, ValueError) as error:
    reason = str(error).rpartition("] ")[2]
    raise UserError(f"config.data.tokenizer_vocab_size={vocab_size}: {reason} (256 bytes, 2 marks and the text's "
                    "characters must fit)") from error
  return SentencePieceTokenizer(model.getvalue())


def _passages(texts: Iterable[str], characters: int = 4096) -> Iterable[str]:
  """Cuts texts at line ends into passages of about `characters`; the trainer reads one at a time."""
  for text in texts:
    passage, length = [], 0
    for line in text.splitlines(keepends=True):
      for start in range(0, len(line), characters):
        passage.append(line[start:start + characters])
        length += len(passage[-1])
        if length >= characters:
          yield "".join(passage)
          passage, length = [], 0
    if passage:
      yield "".join(passage)


def check_tokens(tokens: Int[np.ndarray, " *shape"], vocab_size: int, source: str) -> None:
  """Raises `UserError` if ready tokens of `source` include an id that a tokenizer of `vocab_size` ids does not have."""
  largest = tokens.max(initial=0)
  if tokens.min(initial=0) < 0:  # of 32 bits, the highest of which is set
    largest = int(tokens.min()) + (1 << 32)
  if largest >= vocab_size:
    raise UserError(f"config.data.sources: {source!r} holds token {largest}, but config.data.tokenizer has "
                    f"{vocab_size} tokens: it is not the tokenizer that made them")


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
  """Raises `UserError` if the tokenizer has ids that the model has no embedding for."""
  if tokenizer.vocab_size > model.vocab_size:
    raise UserError(f"config.model.vocab_size={model.vocab_size}: must be at least {tokenizer.vocab_size}, the size of "
                    f"the {tokenizer.kind} tokenizer of the data")
