"""Reads pickles of plain values without running code, in bounded time and memory.

`pickle.Unpickler` imports what a file names, sizes its memo by what a file says and hashes whatever a file uses as a key. This
reader knows the opcodes that `torch.save` writes for dicts of tensors and plain values, and refuses all others. A value takes at
least one opcode, opcodes are counted, and nothing here recurses, compares or hashes anything but short keys.
"""

from __future__ import annotations

from collections.abc import Callable
import pickle
import struct
from typing import Any

MOST_BYTES = 16 << 20
MOST_OPCODES = 2_000_000  # a tensor takes about 30
MOST_KEY = 4096  # characters
_MOST_INTEGER_BYTES = 8


class MalformedPickle(ValueError):
  """The pickle is damaged, or holds something else than plain values; the message is the reason in one line."""


class Reconstructor:
  """A global that a pickle may call: whatever `call` does with the arguments is what it stands for."""

  def __init__(self, call: Callable[..., Any]):
    self.call = call


def read_pickle(content: bytes, find_global: Callable[[str, str], Any], load_persistent: Callable[[Any], Any]) -> Any:
  """The value that a pickle holds.

  Args:
    content: the pickle.
    find_global: of a module and a name, what stands for that global; only a `Reconstructor` can be called.
    load_persistent: of a persistent id, the object that it stands for.

  Raises:
    MalformedPickle: an opcode that is not known here, a value that is not plain, too many of them, or damage. `find_global` and
      `load_persistent` may raise it, too.
  """
  if len(content) > MOST_BYTES:
    raise MalformedPickle(f"its description of the tensors is larger than {MOST_BYTES >> 20} MiB")
  return _Reader(content, find_global, load_persistent).read()


class _Reader:
  """A stack machine over the opcodes of one pickle."""

  def __init__(self, content: bytes, find_global: Callable[[str, str], Any], load_persistent: Callable[[Any], Any]):
    self._content, self._place = content, 0
    self._find_global, self._load_persistent = find_global, load_persistent
    self._stack: list[Any] = []
    self._marks: list[int] = []  # their places on the stack
    self._memo: dict[int, Any] = {}  # a dict, so that an index costs nothing by itself

  def read(self) -> Any:
    """Runs to the opcode STOP."""
    for _ in range(MOST_OPCODES):
      opcode = self._take(1)
      if opcode == pickle.STOP:
        return self._pop()
      act = _ACTIONS.get(opcode)
      if act is None:
        raise MalformedPickle(f"refused opcode {opcode!r}")
      act(self)
    raise MalformedPickle(f"more than {MOST_OPCODES:,} opcodes")

  def _take(self, count: int) -> bytes:
    taken = self._content[self._place:self._place + count]
    if len(taken) < count:
      raise MalformedPickle("cut off")
    self._place += count
    return taken

  def _number(self, form: str) -> Any:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _line(self) -> str:
    end = self._content.find(b"\n", self._place, self._place + MOST_KEY)
    if end < 0:
      raise MalformedPickle("a name without an end")
    line = self._content[self._place:end]
    self._place = end + 1
    return self._decoded(line)

  def _decoded(self, content: bytes) -> str:
    try:
      return content.decode()
    except UnicodeDecodeError as error:
      raise MalformedPickle("a string is not UTF-8") from error

  def _pop(self) -> Any:
    if len(self._stack) <= (self._marks[-1] if self._marks else 0):
      raise MalformedPickle("an opcode finds nothing to work on")
    return self._stack.pop()

  def _pop_to_mark(self) -> list[Any]:
    if not self._marks:
      raise MalformedPickle("a group has no beginning")
    start = self._marks.pop()
    items = self._stack[start:]
    del self._stack[start:]
    return items

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _push_number(self, form: str) -> None:
    self._push(self._number(form))

  def _push_long(self) -> None:
    length = self._number("<B")
    if length > _MOST_INTEGER_BYTES:
      raise MalformedPickle(f"a whole number of {length} bytes")
    self._push(int.from_bytes(self._take(length), "little", signed=True))

  def _push_text(self, form: str) -> None:
    self._push(self._decoded(self._take(self._number(form))))

  def _push_bytes(self, form: str) -> None:
    self._push(self._take(self._number(form)))

  def _push_tuple(self, size: int) -> None:
    self._push(tuple([self._pop() for _ in range(size)][::-1]))

  def _put(self, index: int) -> None:
    value = self._pop()
    self._push(value)
    self._memo[index] = value

  def _get(self, index: int) -> None:
    if index not in self._memo:
      raise MalformedPickle("a reference to nothing")
    self._push(self._memo[index])

  def _set_items(self, items: list[Any]) -> None:
    target = self._pop()
    if not isinstance(target, dict) or len(items) % 2:
      raise MalformedPickle("items are set in what is no dict")
    for key, value in zip(items[::2], items[1::2]):
      if not ((isinstance(key, str) and len(key) <= MOST_KEY) or (type(key) is int and abs(key) < 1 << 31)):
        raise MalformedPickle(f"a key is a {type(key).__name__}, must be a short string or a whole number")
      target[key] = value
    self._push(target)

  def _set_item(self) -> None:
    value, key = self._pop(), self._pop()
    self._set_items([key, value])

  def _append(self, items: list[Any]) -> None:
    target = self._pop()
    if not isinstance(target, list):
      raise MalformedPickle("items are appended to what is no list")
    target.extend(items)
    self._push(target)

  def _global(self, module: Any, name: Any) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise MalformedPickle("a global without a name")
    self._push(self._find_global(module, name))

  def _stack_global(self) -> None:
    name, module = self._pop(), self._pop()
    self._global(module, name)

  def _reduce(self) -> None:
    arguments, function = self._pop(), self._pop()
    if not isinstance(function, Reconstructor) or not isinstance(arguments, tuple):
      raise MalformedPickle("refused call of what is no function")
    try:
      self._push(function.call(*arguments))
    except TypeError as error:  # another number of arguments
      raise MalformedPickle("refused call with these arguments") from error

  def _build(self) -> None:
    """Forgets the attributes of an object: ``_metadata`` of a state dict."""
    self._pop()
    if not isinstance(self._stack[-1] if self._stack else None, dict):
      raise MalformedPickle("refused attributes of what is no dict")

  def _frame(self) -> None:
    self._take(8)

  def _protocol(self) -> None:
    self._take(1)


_ACTIONS: dict[bytes, Callable[[_Reader], None]] = {
  pickle.PROTO: _Reader._protocol, pickle.FRAME: _Reader._frame,
  pickle.MARK: lambda r: r._marks.append(len(r._stack)),
  pickle.NONE: lambda r: r._push(None), pickle.NEWTRUE: lambda r: r._push(True), pickle.NEWFALSE: lambda r: r._push(False),
  pickle.BININT: lambda r: r._push_number("<i"), pickle.BININT1: lambda r: r._push_number("<B"),
  pickle.BININT2: lambda r: r._push_number("<H"), pickle.BINFLOAT: lambda r: r._push_number(">d"),
  pickle.LONG1: _Reader._push_long,
  pickle.SHORT_BINUNICODE: lambda r: r._push_text("<B"), pickle.BINUNICODE: lambda r: r._push_text("<I"),
  pickle.BINUNICODE8: lambda r: r._push_text("<Q"),
  pickle.SHORT_BINBYTES: lambda r: r._push_bytes("<B"), pickle.BINBYTES: lambda r: r._push_bytes("<I"),
  pickle.EMPTY_DICT: lambda r: r._push({}), pickle.EMPTY_LIST: lambda r: r._push([]), pickle.EMPTY_TUPLE: lambda r: r._push(()),
  pickle.TUPLE1: lambda r: r._push_tuple(1), pickle.TUPLE2: lambda r: r._push_tuple(2),
  pickle.TUPLE3: lambda r: r._push_tuple(3), pickle.TUPLE: lambda r: r._push(tuple(r._pop_to_mark())),
  pickle.BINPUT: lambda r: r._put(r._number("<B")), pickle.LONG_BINPUT: lambda r: r._put(r._number("<I")),
  pickle.MEMOIZE: lambda r: r._put(len(r._memo)),
  pickle.BINGET: lambda r: r._get(r._number("<B")), pickle.LONG_BINGET: lambda r: r._get(r._number("<I")),
  pickle.SETITEM: _Reader._set_item, pickle.SETITEMS: lambda r: r._set_items(r._pop_to_mark()),
  pickle.APPEND: lambda r: r._append([r._pop()]), pickle.APPENDS: lambda r: r._append(r._pop_to_mark()),
  pickle.GLOBAL: lambda r: r._global(r._line(), r._line()), pickle.STACK_GLOBAL: _Reader._stack_global,
  pickle.BINPERSID: lambda r: r._push(r._load_persistent(r._pop())),
  pickle.REDUCE: _Reader._reduce, pickle.BUILD: _Reader._build,
}
