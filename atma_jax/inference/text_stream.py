"""Incremental detokenisation: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence

from atma_jax.data.tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_PATIENCE = 64  # tokens that do not complete a character, after which they are emitted as they are


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  """Returns the text of token ids; each id that the tokenizer does not have, but a model may, becomes U+FFFD."""
  text, known = "", []
  for token in ids:
    if 0 <= token < tokenizer.vocab_size:
      known.append(token)
      continue
    text += tokenizer.decode(known) if known else ""
    text, known = text + _INCOMPLETE, []
  return text + tokenizer.decode(known) if known or not ids else text


class TextStream:
  """The text of one request, emitted in pieces as its tokens arrive.

  A tokenizer may write a token differently at the start of a text. The new piece is therefore what the last few tokens add to the
  text of the tokens before them, so a token costs the same however long the text is.

  Args:
    tokenizer: of the tokens.
    stop: strings that end the text and are not part of it.

  Attributes:
    stopped: whether a stop string has appeared. `push` has then emitted the text in front of it.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    self._context: list[int] = []  # the last tokens emitted, after which the pending ones are decoded
    self._pending: list[int] = []
    self._held = ""  # complete text that may be the start of a stop string
    self.stopped = False

  def push(self, token: int) -> str:
    """Takes the next token and returns the text that is now certain, which may be empty."""
    self._pending.append(token)
    text = self._new_text()
    if text.endswith(_INCOMPLETE) and token < self._tokenizer.vocab_size and len(self._pending) < _PATIENCE:
      return ""
    self._context, self._pending = self._pending, []
    return self._release(text)

  def finish(self) -> str:
    """Returns the text that was held back, once no token follows."""
    text = self._release(self._new_text()) if self._pending and not self.stopped else ""
    rest, self._held, self._pending = self._held, "", []
    return text + rest

  def _new_text(self) -> str:
    known = decode_ids(self._tokenizer, self._context)
    return decode_ids(self._tokenizer, self._context + self._pending)[len(known):]

  def _release(self, text: str) -> str:
    """Emits `text` after what was held back: up to a stop string, or all but what may be the start of one."""
    text = self._held + text
    found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[: min(found)]
    keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    self._held = text[len(text) - keep:]
    return text[: len(text) - keep]
