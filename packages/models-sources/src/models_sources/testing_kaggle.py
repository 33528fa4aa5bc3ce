"""Kaggle on the loopback, for tests: it speaks the protocol of the API for models and fails on demand.

    with KaggleServer() as kaggle:
      kaggle.add_version("google/gemma-2/flax/gemma2-2b-it", {"gemma2-2b-it/_METADATA": b"{}", ...})
      for name, value in kaggle.environment.items():
        monkeypatch.setenv(name, value)

Requests are POSTs of JSON. Here the values of the JSON are appended to the path, so that faults and assertions can name
them: `GET /DownloadModelInstanceVersion/google/gemma-2/flax/gemma2-2b-it/1/gemma2-2b-it/_METADATA`. Files are served as
Kaggle serves them: by a redirect to a signed address on another host, which states the MD5 in a header.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping

from models_sources.testing import SIGNATURE, HubServer, Request, _Answer, _Handler, _json

# A host that does not exist: the client sends its requests through the proxy, which is this server.
_STORAGE = "http://storage.invalid"
_FIELDS = ("ownerSlug", "modelSlug", "framework", "instanceSlug", "versionNumber", "path")


class KaggleServer(HubServer):
  """Kaggle's API and storage, on a port of the loopback, while the context lasts.

  Attributes:
    requests: all received requests, in order. A test may clear the list.
    page: number of files in one page of a list of files.
  """

  def __init__(self, page: int = 200) -> None:
    super().__init__()
    self.page = page
    self._versions: dict[str, list[dict[str, bytes]]] = {}
    self._private: set[str] = set()
    for server in self._servers.values():
      server.RequestHandlerClass = _KaggleHandler

  @property
  def environment(self) -> dict[str, str]:
    """Environment variables that direct the client to this server; they hold no credentials."""
    proxy = {"HTTP_PROXY": self.endpoint, "http_proxy": self.endpoint, "NO_PROXY": "", "no_proxy": ""}
    return proxy | {"KAGGLE_API_ENVIRONMENT": "LOCALHOST"}

  def add_version(self, handle: str, files: Mapping[str, bytes], *, licensed: bool = False) -> int:
    """Adds a version to a variation and returns its number.

    Args:
      handle: owner/model/framework/variation.
      files: content by name.
      licensed: whether only users with credentials get the files.
    """
    with self._lock:
      versions = self._versions.setdefault(handle, [])
      versions.append(dict(files))
      self._blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
      if licensed:
        self._private.add(handle)
      return len(versions)

  def _answer(self, request: Request, query: str, body: bytes) -> _Answer:
    if request.path.startswith("/blobs/"):
      stored = self._stored(request.path)
      digest = base64.b64encode(hashlib.md5(stored.body, usedforsecurity=False).digest()).decode()
      return _Answer(stored.status, {"x-goog-hash": f"md5={digest}"}, stored.body)
    _, call, *parts = request.path.split("/")
    handle, rest = "/".join(parts[:4]), parts[4:]
    versions = self._versions.get(handle)
    if versions is None:
      return _refusal(404, "Not found")
    if call == "GetModelInstance":
      return _json({"versionNumber": len(versions), "slug": parts[3]})
    if handle in self._private and "authorization" not in request.headers:
      return _refusal(403, "Permission denied")
    if not 0 < int(rest[0]) <= len(versions):
      return _refusal(404, "Not found")
    files = versions[int(rest[0]) - 1]
    if call == "ListModelInstanceVersionFiles":
      names, start = sorted(files), int(query or 0)
      stop = start + self.page
      entries = [{"name": name, "size": len(files[name])} for name in names[start:stop]]
      return _json({"files": entries, "nextPageToken": str(stop) if stop < len(names) else ""})
    data = files.get("/".join(rest[1:]))
    if data is None:
      return _refusal(404, "Not found")
    place = f"{_STORAGE}/blobs/{hashlib.sha256(data).hexdigest()}?{SIGNATURE}"
    return _Answer(302, {"Location": place})


def _refusal(status: int, message: str) -> _Answer:
  body = json.dumps({"code": status, "message": message}).encode()
  return _Answer(status, {"Content-Type": "application/json"}, body)


class _KaggleHandler(_Handler):
  def do_POST(self) -> None:
    body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
    call = self.path.rpartition("/")[2]
    stated = [str(body[field]) for field in _FIELDS if body.get(field)]
    # The framework is sent as an enumeration member, MODEL_FRAMEWORK_FLAX.
    stated = [part.removeprefix("MODEL_FRAMEWORK_").lower() if part.isupper() else part for part in stated]
    self.path = "/".join(["", call, *stated]) + f"?{body.get('pageToken', '')}"
    self.command = "GET"
    self.do_GET()
