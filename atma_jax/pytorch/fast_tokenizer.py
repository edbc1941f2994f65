"""Writes any tokenizer as a ``tokenizer.json`` of the library `tokenizers`, which ``transformers.AutoTokenizer`` reads.

The written tokenizer encodes and decodes as ours does, and a few texts are compared before anything is written. What differs
belongs to SentencePiece models. A run of byte pieces that is not UTF-8 as a whole decodes to U+FFFD for each byte, while
SentencePiece keeps the valid characters in it. Models that were not trained here may differ in three more places: text with
U+2581 after a dummy prefix, texts that spell a control piece of a unigram model, and ties between two ways to cut a text in one.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from atma_jax.data.tokenizers import END_OF_TEXT, ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from atma_jax.errors import UserError

_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of SentencePiece models
_PROBES = (
  "", " ", "a", "def main(argv):\n  return 0\n", "  two leading spaces", "trailing  ", "a  b   c    d     e", "\n\n\t\r\n",
  "2026-11-30 12345", "Grüße, naïve café, Ελληνικά, кириллица", "日本語のテキスト", "שלום مرحبا", "e\u0301 \u00a0 \u3000 \ufb01",
  "\U0001f469\u200d\U0001f467 \U0001f600", "\u0000\u0001\u007f", "don't (stop)... \"quoted\" -- x==y!=z",
  "====----    ....    ____", "The quick brown fox jumps over the lazy dog.", f"a{_SPACE_MARK}b{_SPACE_MARK}",
)


def tokenizer_json(tokenizer: Tokenizer) -> str:
  """Returns the content of a ``tokenizer.json`` that encodes and decodes as a tokenizer of ours does.

  Raises:
    UserError: there is none, which names what stands in the way.
  """
  if isinstance(tokenizer, HuggingFaceTokenizer):
    content = _plain(tokenizer)
  elif isinstance(tokenizer, SentencePieceTokenizer):
    content = _from_sentencepiece(tokenizer).to_str()
  elif isinstance(tokenizer, ByteTokenizer):
    content = _from_bytes(tokenizer).to_str()
  else:
    tokenizer.encode("")  # of a tokenizer that is only a name this says so
    raise UserError(f"--format=transformers: a tokenizer of kind {tokenizer.kind!r} cannot be written as tokenizer.json")
  _compare(tokenizer, tokenizers.Tokenizer.from_str(content))
  return content


def end_of_text(tokenizer: Tokenizer) -> str:
  """Returns how the end-of-text token is spelt in `tokenizer_json`."""
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return tokenizer.end_of_text
  if isinstance(tokenizer, SentencePieceTokenizer):
    return _text(_parsed(tokenizer).pieces[tokenizer.eot_id])
  return END_OF_TEXT


def _plain(tokenizer: HuggingFaceTokenizer) -> str:
  """Returns the tokenizer's own file, without what adds special tokens, cuts or pads, none of which is done here."""
  content = tokenizer.to_bytes().decode()
  values = json.loads(content)  # `HuggingFaceTokenizer` has read it already
  changes: dict[str, Any] = {name: None for name in ("truncation", "padding") if values.get(name) is not None}
  if tokenizers.Tokenizer.from_str(content).num_special_tokens_to_add(False):
    changes["post_processor"] = None
  return json.dumps(values | changes, ensure_ascii=False) if changes else content


def _from_bytes(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
  """Returns byte-pair encoding without merges over the alphabet in which GPT-2 spells bytes."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  alphabet = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
  fast = tokenizers.Tokenizer(models.BPE(vocab=alphabet | {END_OF_TEXT: tokenizer.eot_id}, merges=[]))
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
  fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
  return fast


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
  """Returns the same model over pieces that spell a space as a space, so that U+2581 in a text is a character like others."""
  model = _parsed(tokenizer)
  trainer, rules = model.trainer_spec, model.normalizer_spec
  if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
    raise UserError("--format=transformers: the SentencePiece model is of a type that cannot be written as tokenizer.json; "
                    "legal: bpe and unigram, without treat_whitespace_as_suffix")
  pieces, types = [_text(piece) for piece in model.pieces], [piece.type for piece in model.pieces]
  with_bytes = _BYTE in types
  unknown = types.index(_UNKNOWN) if _UNKNOWN in types else None
  if len(set(pieces)) < len(pieces):
    raise UserError("--format=transformers: the SentencePiece model has two pieces that differ only in how they spell a space")
  if trainer.model_type == _UNIGRAM:
    fast = tokenizers.Tokenizer(models.Unigram([(text, piece.score) for text, piece in zip(pieces, model.pieces, strict=True)],
                                               unk_id=unknown, byte_fallback=with_bytes))
  else:
    scores = {text: piece.score for text, piece, kind in zip(pieces, model.pieces, types, strict=True) if kind == _NORMAL}
    fast = tokenizers.Tokenizer(models.BPE(
      vocab={text: index for index, text in enumerate(pieces)}, merges=list(_merges(scores)), byte_fallback=with_bytes,
      unk_token=None if unknown is None else pieces[unknown], fuse_unk=True))
  steps = _normalizers(rules, with_bytes)
  if steps:
    fast.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
  ends = [*([decoders.ByteFallback()] if with_bytes else []), decoders.Fuse()]
  fast.decoder = decoders.Sequence([*ends, *([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])])  # pyright: ignore[reportAttributeAccessIssue]
  for text, kind in zip(pieces, types, strict=True):
    if kind in (_UNKNOWN, _CONTROL):
      fast.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    elif kind == _USER_DEFINED:
      special = text == pieces[tokenizer.eot_id]
      (fast.add_special_tokens if special else fast.add_tokens)([AddedToken(text, special=special, normalized=False)])
  return fast


def _normalizers(rules: Any, with_bytes: bool) -> list[Any]:
  """Returns the steps of a SentencePiece model's normaliser."""
  steps: list[Any] = []
  if rules.precompiled_charsmap:
    steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
  if not with_bytes:  # U+2581 has no bytes to be spelt with, and is a space
    steps.append(normalizers.Replace(_SPACE_MARK, " "))
  if rules.remove_extra_whitespaces:
    steps += [normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
  if rules.add_dummy_prefix:
    steps.append(normalizers.Prepend(" "))
  return steps


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
  """Yields the pairs of pieces that make a piece, in the order in which SentencePiece merges them: the best score first.

  Of several pairs that make the same piece the one with the longest left part comes first, because merging from left to right
  leaves longer pieces on the left.
  """
  for text in sorted(scores, key=lambda text: -scores[text]):
    for split in range(len(text) - 1, 0, -1):
      if text[:split] in scores and text[split:] in scores:
        yield text[:split], text[split:]


def _parsed(tokenizer: SentencePieceTokenizer) -> Any:
  """Returns the protocol buffer of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2  # takes a while, and needs protobuf

  return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.to_bytes())  # pyright: ignore[reportAttributeAccessIssue]


def _text(piece: Any) -> str:
  """Returns the text of a piece, with spaces as spaces."""
  return piece.piece.replace(_SPACE_MARK, " ") if piece.type in (_NORMAL, _USER_DEFINED) else piece.piece


def _compare(ours: Tokenizer, fast: tokenizers.Tokenizer) -> None:
  """Raises `UserError` if one of a few texts is encoded or, where nothing in it is unknown, decoded otherwise than by ours."""
  fast.encode_special_tokens = True
  unknown, probes = None, _PROBES
  if isinstance(ours, SentencePieceTokenizer):
    model = _parsed(ours)
    unknown = model.trainer_spec.unk_id
    if model.normalizer_spec.add_dummy_prefix:
      probes = [text for text in _PROBES if _SPACE_MARK not in text]
  for text in probes:
    ids, found = ours.encode(text).tolist(), fast.encode(text, add_special_tokens=False).ids
    if ids != found:
      raise UserError(f"--format=transformers: the {ours.kind} tokenizer cannot be written as tokenizer.json: {text!r} would be "
                      f"encoded as {found[:20]}, not as {ids[:20]}")
    decoded = fast.decode(ids, skip_special_tokens=True)
    if unknown not in ids and decoded != ours.decode(ids):
      raise UserError(f"--format=transformers: the {ours.kind} tokenizer cannot be written as tokenizer.json: the tokens of "
                      f"{text!r} would be decoded as {decoded!r}")
