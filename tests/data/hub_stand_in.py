"""A Hugging Face hub and a plain file server on the loopback address, with faults on demand."""

from __future__ import annotations

import base64
from collections.abc import Iterator
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
from typing import Any

import huggingface_hub.constants
import pytest

from atma_jax.data import remote

SHA = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
  """Serves datasets, models and files, and takes models that are pushed.

  Attributes:
    address: of the server.
    datasets: by name, the files by path, and the card's metadata.
    digests: by name, a sha256 that is not that of the file, to be said of it.
    models: by name, the files by path; pushed files are added.
    private: names of the models that were made private.
    tokens: Authorization headers that may write; empty is everybody.
    large: files of at least so many bytes are pushed to a store of large files, beside the commit.
    files: by path, what is served under ``/files/``; with ``ranges`` False always whole.
    faults: regular expression of a path -> faults to answer with, one after the other: a status, "cut", or "cut at once".
    requests: method, path and range of every request.
    authorizations: first part of the path and Authorization header of every request.
  """

  def __init__(self, address: str):
    self.address = address
    self.datasets: dict[str, tuple[dict[str, bytes], dict[str, Any] | None]] = {}
    self.models: dict[str, dict[str, bytes]] = {}
    self.private: set[str] = set()
    self.tokens: set[str] = set()
    self.large = 10_000
    self.stored: dict[str, bytes] = {}  # large files by digest
    self.files: dict[str, bytes] = {}
    self.digests: dict[str, str] = {}
    self.ranges = True
    self.faults: dict[str, list[int | str]] = {}
    self.requests: list[tuple[str, str, str]] = []
    self.authorizations: set[tuple[str, str | None]] = set()

  def fault(self, path: str) -> int | str | None:
    """The next fault for a request."""
    for pattern, faults in self.faults.items():
      if faults and re.search(pattern, path):
        return faults.pop(0)
    return None

  def lfs(self, name: str, content: bytes) -> dict[str, Any]:
    """What the hub says of a large file."""
    digest = self.digests.get(name) or hashlib.sha256(content).hexdigest()
    return {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}

  def find(self, path: str) -> tuple[str, Any]:
    """What is at a path: ("json", value), ("move", path), ("file", content) or ("missing", None)."""
    none: tuple[dict[str, bytes], None] = ({}, None)
    if match := re.fullmatch(rf"/api/datasets/(.+?)(?:/revision/(main|{SHA}))?", path):
      files, card = self.datasets.get(match[1], none)
      siblings = [{"rfilename": name, "size": len(content), "lfs": self.lfs(name, content)} for name, content in files.items()]
      found = {"id": match[1], "sha": SHA, "siblings": siblings, "cardData": card, "private": False, "tags": []}
      return ("json", found) if files else ("missing", None)
    if match := re.fullmatch(rf"/datasets/(.+)/resolve/{SHA}/(.+)", path):
      known = match[2] in self.datasets.get(match[1], none)[0]
      return ("move", f"/cdn/{match[1]}/{match[2]}") if known else ("missing", None)
    if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
      return "file", self.datasets[match[1]][0][match[2]]
    if match := re.fullmatch(rf"/api/models/([^/]+/[^/]+?)(?:/revision/(main|{SHA}))?", path):
      files = self.models.get(match[1], {})
      siblings = [{"rfilename": name} for name in files]
      return ("json", {"id": match[1], "sha": SHA, "siblings": siblings, "private": match[1] in self.private, "tags": []}
              ) if files else ("missing", None)
    if match := re.fullmatch(rf"/api/models/([^/]+/[^/]+)/tree/{SHA}", path):
      return "json", [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                      for name, content in self.models.get(match[1], {}).items()]
    if match := re.fullmatch(rf"/(.+?)/resolve/(?:main|{SHA})/(.+)", path):
      content = self.models.get(match[1], {}).get(match[2])
    else:
      content = self.files.get(path.removeprefix("/files/"))
    return ("file", content) if content is not None else ("missing", None)


  def take(self, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
    """What a POST or PUT to a path is answered with: a status and a value."""
    if self.tokens and authorization not in self.tokens and not path.startswith("/store/"):
      return 401, {"error": "Invalid username or password."}
    if match := re.fullmatch(r"/store/(\w+)", path):
      self.stored[match[1]] = body
      return 200, {}
    if path == "/api/repos/create":
      wanted = json.loads(body)
      name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
      if wanted.get("visibility") == "private" or wanted.get("private"):
        self.private.add(name)
      known = name in self.models
      self.models.setdefault(name, {})
      return (409 if known else 200), {"url": f"{self.address}/{name}", "id": name}
    if path == "/api/validate-yaml":
      return 200, {"errors": [], "warnings": []}
    if re.fullmatch(r"/api/models/.+/preupload/main", path):
      modes = [{"path": file["path"], "uploadMode": "lfs" if file["size"] >= self.large else "regular", "shouldIgnore": False}
               for file in json.loads(body)["files"]]
      return 200, {"files": modes}
    if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
      objects = [wanted | {"actions": {"upload": {"href": f"{self.address}/store/{wanted['oid']}"}}}
                 for wanted in json.loads(body)["objects"]]
      return 200, {"transfer": "basic", "objects": objects}
    if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
      for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
          self.models[match[1]][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
          self.models[match[1]][value["path"]] = self.stored[value["oid"]]
      return 200, {"commitUrl": f"{self.address}/{match[1]}/commit/{SHA}", "commitOid": SHA}
    return 404, {"error": "not found"}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize = 1 << 16  # header and body in one packet, for which no acknowledgement is awaited
  hub: HubStandIn

  def do_HEAD(self) -> None:
    self._answer(body=False)

  def do_GET(self) -> None:
    self._answer(body=True)

  def do_POST(self) -> None:
    path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.hub.requests.append((self.command, path, ""))
    self.hub.authorizations.add((path.split("/")[1], self.headers.get("Authorization")))
    fault = self.hub.fault(path)
    if fault in ("cut", "cut at once"):
      self.close_connection = True
      return
    status, value = (fault, {}) if isinstance(fault, int) else self.hub.take(path, body, self.headers.get("Authorization"))
    self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", "Retry-After": "0"}, body=True)

  do_PUT = do_POST

  def _answer(self, body: bool) -> None:
    path = self.path.partition("?")[0]
    wanted = self.headers.get("Range", "")
    self.hub.requests.append((self.command, path, wanted))
    self.hub.authorizations.add((path.split("/")[1], self.headers.get("Authorization")))
    fault = self.hub.fault(path)
    if isinstance(fault, int):
      return self._send(fault, b"busy", {"Retry-After": "0"}, body)
    if fault == "cut at once":
      self.close_connection = True
      return None
    kind, found = self.hub.find(path)
    if kind == "json":
      return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
    if kind == "move":
      return self._send(302, b"", {"Location": found}, body)
    if kind == "missing":
      return self._send(404, b"", {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"}, body)
    headers = {"ETag": f'"{hashlib.sha1(found).hexdigest()}"', "X-Repo-Commit": SHA}
    status = 200
    if wanted and self.hub.ranges:
      first, last = wanted.removeprefix("bytes=").split("-")
      start, stop = int(first), min(int(last) + 1 if last else len(found), len(found))
      status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(found)}"
      found = found[start:stop]
    return self._send(status, found, headers, body, cut=fault == "cut")

  def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    if body:
      self.wfile.write(content[: len(content) // 2] if cut else content)
    if cut:
      self.close_connection = True

  def log_message(self, format: str, *args: object) -> None:
    del format, args


@contextlib.contextmanager
def serve_hub() -> Iterator[HubStandIn]:
  """Runs a stand-in in a thread."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  server.daemon_threads = True
  hub = HubStandIn(f"http://127.0.0.1:{server.server_address[1]}")
  server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
  thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def connected_hub(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> Iterator[HubStandIn]:
  """Runs a stand-in that HF_ENDPOINT names, with quick repetitions, an empty cache in a folder, and a token to send."""
  for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
  monkeypatch.setenv("HF_TOKEN", "hf_token")
  with serve_hub() as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    yield hub
