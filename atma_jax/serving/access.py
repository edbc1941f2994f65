"""Who may use a server: API keys, the names it answers to, and a warning where neither protects it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import hmac
import ipaddress
import os
import re
import stat
from typing import Any
from urllib.parse import urlsplit

from absl import logging

from atma_jax.errors import UserError
from atma_jax.serving.protocol import ProtocolError

LARGEST_KEY_FILE = 64 * 1024  # bytes
SHORT_KEY = 16  # characters, below which a key can be guessed


def _option(default: Any, help: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Access:
  """The rules of who may use a server. Every field is a flag of ``serve``.

  ``/health`` is open to everybody, because what watches a server knows neither its keys nor its names.

  Raises:
    UserError: there is no such file, it holds no keys, or a name is none.
  """

  api_key_file: str | None = _option(None, "File of one API key a line; requests need one of them as Authorization: Bearer KEY.")
  allowed_hosts: tuple[str, ...] = _option((), "Names that a request's Host may have, such as a.org,*.b.org; default is any.")

  def __post_init__(self) -> None:
    for host in self.allowed_hosts:
      if not re.fullmatch(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", host.lower()) and not _is_address(host):
        raise UserError(f"allowed_hosts={host!r}: must be names or addresses without port, such as a.org, *.b.org or 127.0.0.1")
    self.read_keys()  # what is wrong with the file is said at once

  def read_keys(self) -> tuple[bytes, ...]:
    """Returns the digests of all keys; none without a file, and then no request needs a key."""
    if self.api_key_file is None:
      return ()
    return tuple(_digest(key) for key in _read_keys(self.api_key_file))

  def refusal(self, scope: Mapping[str, Any], keys: tuple[bytes, ...]) -> ProtocolError | None:
    """Returns why a request may not be served, judged by the header in its ASGI scope alone; None if it may."""
    if scope["path"] == "/health":
      return None
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    if self.allowed_hosts and not self._is_allowed(_host_name(headers.get("host", ""))):
      return ProtocolError(400, f"Host {headers.get('host', '')[:60]!r} is not a name of this server", code="host_not_allowed")
    if keys:
      kind, _, given = headers.get("authorization", "").partition(" ")
      own = _digest(given.strip().encode("latin-1"))
      # Every key is compared, each in constant time, so that the time tells nothing about any of them.
      known = sum([hmac.compare_digest(own, key) for key in keys])
      if kind.lower() != "bearer" or not known:
        return ProtocolError(401, "an API key is needed, as the header Authorization: Bearer KEY", code="invalid_api_key")
    return None

  def _is_allowed(self, host: str | None) -> bool:
    return host is not None and any(host == name.lower() or (name.startswith("*.") and host.endswith(name[1:].lower()))
                                    for name in self.allowed_hosts)


def warn_of_strangers(address: str, access: Access) -> None:
  """Logs a warning if a server listens on an address that other machines reach, and needs no key."""
  if access.api_key_file is None and not ipaddress.ip_address(address).is_loopback:
    logging.warning("whoever reaches %s can use this server: set --api_key_file, or --host=127.0.0.1", address)


def _host_name(value: str) -> str | None:
  """The name or address in a Host header, in lower case; None if it is none."""
  try:
    parts = urlsplit(f"//{value}")
    _ = parts.port  # raises if it is no number
  except ValueError:
    return None
  return parts.hostname if parts.netloc == value and parts.username is None else None


def _is_address(value: str) -> bool:
  try:
    ipaddress.ip_address(value)
  except ValueError:
    return False
  return True


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


def _read_keys(path: str) -> list[bytes]:
  """The keys in a file, one a line; empty lines and lines that begin with # are skipped."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"--api_key_file={path}: must be a regular file")
    with open(path, "rb") as file:
      content = file.read(LARGEST_KEY_FILE + 1)
  except (OSError, ValueError) as error:
    raise UserError(f"--api_key_file={path}: {getattr(error, 'strerror', None) or error}") from error
  if len(content) > LARGEST_KEY_FILE:
    raise UserError(f"--api_key_file={path}: larger than {LARGEST_KEY_FILE} bytes; it holds one key a line")
  keys = [line.strip() for line in content.splitlines()]
  keys = [key for key in keys if key and not key.startswith(b"#")]
  if not keys:
    raise UserError(f"--api_key_file={path}: holds no key; write one a line")
  if not all(33 <= byte < 127 for key in keys for byte in key):
    raise UserError(f"--api_key_file={path}: a key must be visible ASCII characters without spaces")
  if any(len(key) < SHORT_KEY for key in keys):
    logging.warning("--api_key_file=%s: a key of less than %d characters can be guessed", path, SHORT_KEY)
  return keys
