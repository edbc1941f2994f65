"""Files behind an address, such as ``gs://BUCKET/FILE`` or ``https://HOST/FILE``: found and read through fsspec.

A file is read in pieces, each of which is asked for again, after a pause that grows, when the server is busy (429, 5xx) or the
connection is cut. So a failure costs one piece, not the file, and nothing is kept on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
import io
import logging as std_logging
import os
import pathlib
import re
import tempfile
import time
from typing import Any, BinaryIO, TypeVar
import urllib.parse

from absl import logging
import fsspec

from atma_jax.data.files import write_atomically
from atma_jax.errors import RunError, UserError, described

EXTRAS = {"gs": "gcs", "s3": "s3", "https": "hf", "http": "hf"}  # the extra of this package that reads each scheme
PIECE = 16 << 20  # bytes asked for at a time
ATTEMPTS, FIRST_ATTEMPTS = 8, 4  # of a piece in the middle of the work; of the first question, whose answer somebody waits for
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; each pause is twice the one before
LONGEST_WAIT = 300.0  # seconds that a server may ask to wait for
_MOST_WHOLE = 4 << 30  # bytes of a file whose server does not serve parts of it
_SILENCE = 60  # seconds without a byte after which an HTTP connection counts as cut
_TEMPORARY = frozenset((408, 425, 429))  # HTTP statuses, beside 5xx
_CLIENTS = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "httpcore", "httpx", "httpx2", "requests", "urllib3")
_LASTING = re.compile("Cred|Offline")  # names of errors of clients that time does not mend
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class RemoteEntry:
  """A file that a pattern matched.

  Attributes:
    path: its address.
    size: in bytes; None if the server does not say.
  """

  path: str
  size: int | None


def is_remote_path(path: str) -> bool:
  """Whether a path is an address, with a scheme."""
  return _ADDRESS.match(path) is not None


def check_scheme(path: str) -> None:
  """Raises a ValueError that says which schemes are legal, if an address has another one."""
  scheme = path.partition("://")[0]
  if scheme not in EXTRAS:
    raise ValueError(f"has the scheme {scheme}://, which cannot be read; legal: " + ", ".join(f"{name}://" for name in EXTRAS))


def file_name(path: str) -> str:
  """A path without the query and the fragment that an address may have, from which the format of the file is told."""
  return urllib.parse.urlsplit(path).path if path.startswith(("http://", "https://")) else path


def find_files(pattern: str, what: str) -> list[RemoteEntry]:
  """Finds the files that an address or a pattern matches, those below a folder that it matches included, sorted.

  Args:
    pattern: an address, in which ``*``, ``**`` and, except on http, ``?`` match; a server of http must list its folders in HTML.
    what: asks for them, such as ``config.data.sources: 'text:...'``, for error messages.

  Raises:
    UserError: nothing matches, nobody may read it, or an extra is missing.
    RunError: the server does not answer.
  """
  system = _file_system(pattern, what)
  magic = "*[" if pattern.startswith("http") else "*?["

  def find() -> dict[str, dict[str, Any]]:
    if any(character in pattern for character in magic):
      found = system.glob(pattern, detail=True)
    else:
      found = {pattern: system.info(pattern)}
    below = {path: info for folder, entry in found.items() if entry["type"] == "directory"
             for path, info in system.find(folder, detail=True).items()}
    return {path: info for path, info in (found | below).items() if info["type"] == "file"}

  try:
    # The clients of gs:// and s3:// try again themselves.
    found = retried(find, what, attempts=FIRST_ATTEMPTS if pattern.startswith("http") else 1)
  except FileNotFoundError:
    found = {}
  entries = [RemoteEntry(str(system.unstrip_protocol(path)), info.get("size")) for path, info in found.items()]
  entries = [entry for entry in entries if not _hidden(entry.path, pattern)]
  if not entries:
    raise UserError(f"{what} matches no file (asked {pattern.partition('://')[0]}://)")
  return sorted(entries, key=lambda entry: entry.path)


def _hidden(path: str, pattern: str) -> bool:
  """Whether a file or one of its folders below the fixed part of the pattern is hidden."""
  fixed = re.split(r"[*?\[]", pattern)[0]
  return any(part.startswith(".") for part in path.removeprefix(fixed).split("/"))


def open_remote(path: str, size: int | None = None) -> io.BufferedReader:
  """Opens a file behind an address for reading; it can seek, and works with pyarrow.

  Args:
    path: its address.
    size: in bytes, which saves asking for it.

  Raises:
    UserError: there is no such file, or nobody may read it.
    RunError: the server does not answer, `ATTEMPTS` times in a row.
  """
  return io.BufferedReader(_RemoteFile(path, size), 1 << 20)


def fetch_file(path: str, target: pathlib.Path, size: int | None, progress: Callable[[int], object] = lambda count: None) -> None:
  """Copies a file behind an address to `target`, atomically; a file of that size that is there already is kept.

  Args:
    path: its address.
    target: where to write it.
    size: in bytes; None if not known.
    progress: is told of every piece how many bytes it has.
  """
  if size is not None and target.exists() and target.stat().st_size == size:
    progress(size)
    return

  def write(file: BinaryIO) -> None:
    while piece := source.read(PIECE):
      file.write(piece)
      progress(len(piece))

  with open_remote(path, size) as source:
    write_atomically(target, write)


def retried(call: Callable[[], _T], what: str, *, attempts: int | None = None, outcome: str = "cannot be read") -> _T:
  """Calls a function until it succeeds; only failures that may pass, such as a busy server and a cut connection, are tried again.

  Args:
    call: what to do, again from the start after each failure.
    what: it reads, for messages.
    attempts: how often; None is `ATTEMPTS`.
    outcome: what a failure means for `what`, for messages.

  Raises:
    RunError: every attempt failed.
    FileNotFoundError: there is no such thing.
    UserError: it may not be read, or the request is wrong.
  """
  attempts = attempts or ATTEMPTS
  pause = FIRST_PAUSE
  for attempt in range(1, attempts + 1):
    try:
      return call()
    except (UserError, RunError):
      raise
    except Exception as error:  # every client has its own
      cause = error
      if isinstance(error, FileNotFoundError):  # fsspec says so of anything that goes wrong on http
        cause = error.__cause__
        if not isinstance(cause, Exception) or (not _is_temporary(cause, _status(cause)) and _status(cause) in (None, 404)):
          raise
      status, reason = _status(cause), described(cause)
      if status == 404:
        raise FileNotFoundError(reason) from error
      if not _is_temporary(cause, status):
        raise UserError(f"{what} {outcome}: {reason}") from error
      if attempt == attempts:
        tried = f", tried {attempts} times" if attempts > 1 else ""
        raise RunError(f"{what} {outcome}{tried}: {reason}") from error
      wait = min(max(pause, _asked_to_wait(cause)), LONGEST_WAIT)
      logging.warning("%s: %s; trying again in %.3g s (%d of %d)", what, reason, wait, attempt + 1, attempts)
      time.sleep(wait)
      pause = min(2 * pause, LONGEST_PAUSE)
  raise AssertionError("unreachable")


class _Interrupted(OSError):
  """Fewer bytes came than were asked for."""


class _RemoteFile(io.RawIOBase):
  """A file behind an address, read piece by piece."""

  def __init__(self, path: str, size: int | None):
    self._path = path
    self._system = _file_system(path, path)
    self._position = 0
    self._whole: BinaryIO | None = None  # a copy, if the server does not serve parts
    if size is None:
      size = self._guarded(lambda: self._system.info(path).get("size"))
    if size is None:
      self._keep(self._guarded(lambda: self._system.cat_file(path)))
    else:
      self._size = size

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
    self._position = max(0, base + offset)
    return self._position

  def readinto(self, buffer: Any) -> int:
    wanted = max(0, min(len(buffer), PIECE, self._size - self._position))
    if wanted:
      content = self._read(self._position, self._position + wanted)
      buffer[:wanted] = content
      self._position += wanted
    return wanted

  def close(self) -> None:
    if self._whole is not None:
      self._whole.close()
    super().close()

  def _read(self, start: int, stop: int) -> bytes:
    if self._whole is None:
      content = self._guarded(lambda: self._fetch(start, stop))
      if len(content) == stop - start:
        return content
      self._keep(content)
    assert self._whole is not None  # `_keep` has set it
    self._whole.seek(start)
    return self._whole.read(stop - start)

  def _fetch(self, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`, or the whole file from a server that does not serve parts."""
    content = self._system.cat_file(self._path, start=start, end=stop)
    if len(content) not in (stop - start, self._size):
      raise _Interrupted(f"{len(content)} bytes came, not {stop - start}")
    return content

  def _keep(self, content: bytes) -> None:
    self._size = len(content)
    if self._size > _MOST_WHOLE:
      raise UserError(f"{self._path}: the server does not serve parts of a file (range requests), and this one has more than "
                      f"{_MOST_WHOLE >> 30} GiB: download it, and name it as a file")
    self._whole = tempfile.TemporaryFile()  # `close` closes it  # noqa: SIM115
    self._whole.write(content)

  def _guarded(self, call: Callable[[], _T]) -> _T:
    try:
      return retried(call, self._path)
    except FileNotFoundError as error:
      raise UserError(f"{self._path}: there is no such file") from error


def _file_system(path: str, what: str) -> Any:
  """The client for an address. Raises `UserError` if the extra that brings it is not installed."""
  scheme = path.partition("://")[0]
  extra = EXTRAS.get(scheme)
  std_logging.getLogger("gcsfs").setLevel(std_logging.CRITICAL)  # it prints a traceback before the error that is reported here
  try:
    options = _http_options(path) if scheme in ("http", "https") else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, **options)  # what is listed may change while a run waits
  except ImportError as error:
    raise UserError(f"{what}: {scheme}:// needs the extra {extra}: pip install 'atma_jax[{extra}]' ({error})") from error


def _http_options(path: str) -> dict[str, Any]:
  import aiohttp
  headers = {"Accept-Encoding": "identity"}  # parts of a compressed answer would be of no use
  if path.startswith(hub_address() + "/"):
    from huggingface_hub.utils import build_hf_headers
    headers |= build_hf_headers()  # the token, if there is one; a redirect elsewhere goes without
  return {"headers": headers, "client_kwargs": {
    "trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)}}


def hub_address() -> str:
  """Where the Hugging Face hub is."""
  return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _status(error: Exception) -> int | None:
  """The HTTP status that an error of any client tells of."""
  for owner in (error, getattr(error, "response", None)):
    for name in ("status", "status_code", "code"):
      value = getattr(owner, name, None)
      if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
        return int(value)
  return None


def _is_temporary(error: Exception, status: int | None) -> bool:
  if status is not None and status >= 300:
    return status in _TEMPORARY or status >= 500
  kind = type(error)
  if issubclass(kind, (PermissionError, IsADirectoryError, NotADirectoryError, ValueError)) or _LASTING.search(kind.__name__):
    return False
  return isinstance(error, OSError) or kind.__module__.partition(".")[0] in _CLIENTS


def _asked_to_wait(error: Exception) -> float:
  """Seconds that the server asks to wait for (Retry-After); 0 if it does not."""
  headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
  with contextlib.suppress(TypeError, ValueError, AttributeError):
    return max(0.0, float(headers.get("Retry-After", 0)))
  return 0.0
