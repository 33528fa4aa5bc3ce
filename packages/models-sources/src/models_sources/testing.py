"""A model hub and an object store on the loopback, for tests: they speak the real protocols and fail on demand.

    with HubServer() as hub:
      commit = hub.add("org/name", {"config.json": b"{}", "model.safetensors": weights})
      monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
      ...
      assert [r.line for r in hub.requests] == ["GET /api/models/org/name/revision/main"]

A HubServer takes files, too, as a client sends them without Xet: it makes repositories and commits, and says which large
files its storage host has already. `writers` are the tokens that may.

Large files are served as the hub serves them: by a redirect to a signed address on a storage host, which has another
name and another port.

    with StoreServer() as store:
      store.put("bucket/folder/config.json", b"{}")
      monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)  # or AWS_ENDPOINT_URL
      ...
      assert store.objects("bucket/folder") == {"config.json": b"{}"}

Needs only the standard library.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

LARGE = (".safetensors", ".gguf", ".bin")
SIGNATURE = "X-Signature=not-to-be-shown"
_XET_TOKEN = "/api/xet-read-token"

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_BLOCK = 64 * 1024
_DRIP = 1024
# Methods of requests that change something, and may have a body.
_WITH_BODY = ("PUT", "POST", "DELETE")


@dataclasses.dataclass(frozen=True)
class Request:
  """A request that a server received.

  Attributes:
    host: the server: "hub" or "storage" of a HubServer, "store" of a StoreServer.
    method: GET, HEAD, PUT, POST or DELETE.
    path: of the address, without the query.
    headers: by name in lower case.
    query: of the address.
  """

  host: str
  method: str
  path: str
  headers: Mapping[str, str]
  query: str = ""
  _sent: list[int] = dataclasses.field(default_factory=lambda: [0], repr=False)

  @property
  def line(self) -> str:
    """Method and path."""
    return f"{self.method} {self.path}"

  @property
  def range(self) -> str | None:
    """The header Range; None if there is none."""
    return self.headers.get("range")

  @property
  def sent(self) -> int:
    """Bytes of the body that have been handed to the connection so far."""
    return self._sent[0]


@dataclasses.dataclass
class Fault:
  """How the next answers to matching requests go wrong.

  Attributes:
    where: regular expression that is searched for in "host METHOD path", or "host METHOD path?query" if there is one.
    times: number of answers that the fault changes.
    status: HTTP status of an error that is sent instead of the answer.
    headers: sent in addition; they replace headers of the same name.
    alter: maps the body to the body that is sent.
    cut: bytes of the body after which the connection is closed.
    reset: whether the connection is reset instead of closed; without `cut`, before any answer.
    stall: seconds of silence before the body.
    silence: seconds of silence before any answer.
    take: bytes of the request's body after which the connection is closed.
    drip: seconds of silence before each KiB of the body.
    ignore_range: whether the whole file is sent although a range was requested.
    shift: bytes by which the range that is sent is off.
  """

  where: str
  times: int = 1
  status: int | None = None
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  alter: Callable[[bytes], bytes] | None = None
  cut: int | None = None
  reset: bool = False
  stall: float = 0.0
  silence: float = 0.0
  take: int | None = None
  drip: float = 0.0
  ignore_range: bool = False
  shift: int = 0


@dataclasses.dataclass
class _Repo:
  commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
  refs: dict[str, str] = dataclasses.field(default_factory=dict)
  gated: bool = False
  readers: frozenset[str] | None = None


@dataclasses.dataclass(frozen=True)
class _Answer:
  status: int = 200
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  body: bytes = b""
  ranges: bool = False


class _Loopback:
  """Servers on ports of the loopback, while the context lasts.

  Attributes:
    requests: all received requests, in order. A test may clear the list.
  """

  def __init__(self, *hosts: str) -> None:
    self.requests: list[Request] = []
    self._faults: list[Fault] = []
    self._lock = threading.Lock()
    self._servers = {host: _Server(self, host) for host in hosts}

  def __enter__(self) -> Self:
    for server in self._servers.values():
      threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    for server in self._servers.values():
      server.shutdown()
      server.close()

  def fail(self, where: str, **how: Any) -> Fault:
    """Makes the next answers to matching requests go wrong.

    Args:
      where: as the field of `Fault`.
      **how: other fields of `Fault`.
    """
    fault = Fault(where, **how)
    with self._lock:
      self._faults.append(fault)
    return fault

  def lines(self, host: str = "") -> list[str]:
    """Method and path of the requests that one host received, or all hosts if `host` is empty."""
    return [request.line for request in list(self.requests) if host in ("", request.host)]

  def _take_fault(self, request: Request) -> Fault:
    asked = {f"{request.host} {request.line}", f"{request.host} {request.line}?{request.query}"}
    with self._lock:
      self.requests.append(request)
      for fault in self._faults:
        if fault.times > 0 and any(re.search(fault.where, line) for line in asked):
          fault.times -= 1
          return fault
    return Fault("", 0)

  def _answer(self, request: Request, query: str, body: bytes) -> _Answer:
    raise NotImplementedError


class HubServer(_Loopback):
  """A hub and its storage host, on two ports of the loopback, while the context lasts.

  Attributes:
    requests: all received requests, in order. A test may clear the list.
    writers: tokens that may make repositories and commits.
    has_xet: whether large files are offered by the protocol Xet, too. Its host, "xet", only hands out tokens: a client
      that uses it fails there, as `fail` says, or with 404.
  """

  def __init__(self, *, has_xet: bool = False) -> None:
    super().__init__("hub", "storage", "xet")
    self.has_xet = has_xet
    self._repos: dict[str, _Repo] = {}
    self._blobs: dict[str, bytes] = {}
    self._moved: dict[str, str] = {}
    self.writers: frozenset[str] = frozenset()

  @property
  def endpoint(self) -> str:
    """Address of the hub, for HF_ENDPOINT."""
    return self._servers["hub"].address

  @property
  def storage(self) -> str:
    """Address of the storage host."""
    return self._servers["storage"].address

  def add(
    self,
    repo: str,
    files: Mapping[str, bytes],
    *,
    revision: str = "main",
    gated: bool = False,
    readers: frozenset[str] | None = None,
  ) -> str:
    """Adds a commit to a repository, creates the repository if there is none, and returns the commit's hash.

    Args:
      repo: organisation/name.
      files: content by name.
      revision: the branch that is moved to the commit.
      gated: whether only `readers` get the files; the list of files is public all the same.
      readers: tokens that may read; None is everybody. Unless `gated`, the repository does not exist for others.
    """
    with self._lock:
      place = self._repos.setdefault(repo, _Repo())
      place.gated, place.readers = gated, frozenset() if gated and readers is None else readers
      content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
      commit = hashlib.sha1(repr((repo, len(place.commits), content)).encode()).hexdigest()
      place.commits[commit] = dict(files)
      place.refs[revision] = commit
      self._blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    return commit

  def move(self, old: str, new: str) -> None:
    """Renames a repository; the old name redirects to the new one."""
    with self._lock:
      self._repos[new] = self._repos.pop(old)
      self._moved[old] = new

  def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a revision of a repository."""
    place = self._repos[repo]
    return dict(place.commits[place.refs.get(revision, revision)])

  def _answer(self, request: Request, query: str, body: bytes) -> _Answer:
    if request.host == "storage" and request.method == "PUT":
      return self._taken(request.path, body)
    if request.host == "storage":
      return self._stored(request.path)
    if request.host == "xet":
      return _Answer(404)
    if request.path == _XET_TOKEN:
      address = self._servers["xet"].address
      lasting = {"X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
      return _Answer(
        200,
        {"X-Xet-Cas-Url": address, **lasting},
        json.dumps({"casUrl": address, "exp": int(time.time()) + 3600, "accessToken": "token"}).encode(),
      )
    for old, new in self._moved.items():
      if (
        target := re.sub(rf"^(/api/models)?/{re.escape(old)}(?=/|$)", rf"\1/{new}", request.path)
      ) != request.path:
        return _Answer(307, {"Location": target + (f"?{query}" if query else "")})
    if request.method == "POST":
      return self._changed(request, body)
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", request.path):
      return self._listed(
        request, match[1], match[3] or "main", match[2] == "tree", "blobs" in parse_qs(query)
      )
    if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path):
      return self._resolved(request, match[1], unquote(match[2]), unquote(match[3]))
    return _error(404, "", "Not found")

  def _commit(
    self, request: Request, name: str, revision: str, of_file: bool
  ) -> tuple[str, dict[str, bytes]] | _Answer:
    repo, token = self._repos.get(name), request.headers.get("authorization", "").removeprefix("Bearer ")
    allowed = repo is not None and (repo.readers is None or token in repo.readers)
    if repo is None or not (allowed or repo.gated):
      return _error(
        404 if token else 401,
        "RepoNotFound",
        "Repository not found" if token else "Invalid username or password.",
      )
    if of_file and not allowed:
      return _error(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
    commit = repo.refs.get(revision, revision)
    if commit not in repo.commits:
      return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit, repo.commits[commit]

  def _listed(self, request: Request, name: str, revision: str, tree: bool, blobs: bool) -> _Answer:
    found = self._commit(request, name, unquote(revision), of_file=False)
    if isinstance(found, _Answer):
      return found
    commit, files = found
    if tree:
      return _json([_tree_entry(file, data) for file, data in files.items()])
    siblings = [_sibling(file, data) if blobs else {"rfilename": file} for file, data in files.items()]
    return _json(
      {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
    )

  def _resolved(self, request: Request, name: str, revision: str, file: str) -> _Answer:
    found = self._commit(request, name, revision, of_file=True)
    if isinstance(found, _Answer):
      return found
    commit, files = found
    headers = {"X-Repo-Commit": commit}
    if file not in files:
      missing = _error(404, "EntryNotFound", "Entry not found")
      return dataclasses.replace(missing, headers={**missing.headers, **headers})
    data = files[file]
    if not file.endswith(LARGE):
      return _Answer(
        200, headers | {"ETag": f'"{_git_hash(data)}"', "Accept-Ranges": "bytes"}, data, ranges=True
      )
    linked = hashlib.sha256(data).hexdigest()
    headers |= {
      "X-Linked-Etag": f'"{linked}"',
      "X-Linked-Size": str(len(data)),
      "ETag": f'"{_git_hash(linked.encode())}"',
    }
    if self.has_xet:
      headers |= {"X-Xet-Hash": linked, "X-Xet-Refresh-Route": f"{self.endpoint}{_XET_TOKEN}"}
    return _Answer(302, headers | {"Location": f"{self.storage}/blobs/{linked}?{SIGNATURE}"})

  def _changed(self, request: Request, body: bytes) -> _Answer:
    """Makes a repository, or takes a step of an upload."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if request.path == "/api/validate-yaml":
      return _json({"errors": [], "warnings": []})
    if token not in self.writers:
      return _error(403 if token else 401, "", "You don't have the rights to write")
    if request.path == "/api/repos/create":
      return self._made(json.loads(body))
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", request.path):
      found = self._commit(request, match[1], unquote(match[3]), of_file=False)
      if isinstance(found, _Answer):
        return found
      if match[2] == "preupload":
        return self._asked(found[1], json.loads(body))
      return self._committed(match[1], unquote(match[3]), *found, body)
    if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", request.path):
      return self._batch(json.loads(body))
    return _error(404, "", "Not found")

  def _made(self, asked: Mapping[str, Any]) -> _Answer:
    name = f"{asked['organization']}/{asked['name']}"
    url = f"{self.endpoint}/{name}"
    if name in self._repos:
      refused = _error(409, "", "You already created this model repo")
      return dataclasses.replace(refused, body=json.dumps({"error": "it exists", "url": url}).encode())
    self.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
    if asked.get("private") or asked.get("visibility") == "private":
      self._repos[name].readers = self.writers
    return _json({"url": url, "name": name})

  def _asked(self, there: Mapping[str, bytes], asked: Mapping[str, Any]) -> _Answer:
    """Says which files are large, and what the branch has under their names."""
    files = []
    for name in (file["path"] for file in asked["files"]):
      large, data = name.endswith(LARGE), there.get(name)
      oid = None if data is None else hashlib.sha256(data).hexdigest() if large else _git_hash(data)
      mode = "lfs" if large else "regular"
      files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return _json({"files": files})

  def _batch(self, asked: Mapping[str, Any]) -> _Answer:
    """Says where large content goes, for that which the storage host does not have yet."""
    objects = []
    for one in asked["objects"]:
      href = f"{self.storage}/blobs/{one['oid']}?{SIGNATURE}"
      new = one["oid"] not in self._blobs
      objects.append(dict(one) | ({"actions": {"upload": {"href": href}}} if new else {}))
    return _json({"transfer": "basic", "objects": objects})

  def _taken(self, path: str, body: bytes) -> _Answer:
    oid = path.removeprefix("/blobs/")
    if hashlib.sha256(body).hexdigest() != oid:
      return _error(400, "", "the content does not have its hash")
    self._blobs[oid] = body
    return _Answer(200)

  def _committed(
    self, repo: str, revision: str, parent: str, there: Mapping[str, bytes], body: bytes
  ) -> _Answer:
    lines = [json.loads(line) for line in body.splitlines()]
    files = dict(there)
    for kind, value in ((line["key"], line["value"]) for line in lines):
      if kind == "header" and value.get("parentCommit") not in (None, parent):
        return _error(412, "", "A commit has happened since. Please refresh and try again.")
      if kind == "file":
        files[value["path"]] = base64.b64decode(value["content"])
      elif kind == "lfsFile":
        if value["oid"] not in self._blobs:
          return _error(400, "", f"{value['path']}: its content was not uploaded")
        files[value["path"]] = self._blobs[value["oid"]]
      elif kind == "deletedFile":
        del files[value["path"]]
    place = self._repos[repo]
    commit = self.add(repo, files, revision=revision, gated=place.gated, readers=place.readers)
    return _json(
      {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit}"}
    )

  def _stored(self, path: str) -> _Answer:
    data = self._blobs.get(path.removeprefix("/blobs/"))
    if data is None:
      return _error(403, "", "Access denied")
    return _Answer(200, {"Accept-Ranges": "bytes"}, data, ranges=True)


@dataclasses.dataclass(frozen=True)
class _Object:
  data: bytes
  etag: str


class StoreServer(_Loopback):
  """An object store on the loopback with the protocols of Google Cloud Storage (XML interface) and S3.

  It answers list, HEAD and GET requests, with ranges, `If-Match`, pages of listings, private buckets, and a virtual
  machine's metadata service that has no account. It takes objects whole, with a condition or without, and in parts, and
  removes them one by one or many at a time. It does not check signatures.

  Attributes:
    requests: all received requests, in order. A test may clear the list.
    page: number of keys in one page of a listing.
    part: the fewest bytes of a part that is not an object's last one.
    uploads: objects that are being uploaded in parts: by the upload's name, the path and the parts so far.
  """

  def __init__(self, page: int = 1000, part: int = 5 << 20) -> None:
    super().__init__("store")
    self.page, self.part = page, part
    self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
    self._objects: dict[str, _Object] = {}
    self._buckets: set[str] = set()
    self._readers: dict[str, str] = {}
    self._frozen: set[str] = set()

  @property
  def endpoint(self) -> str:
    """Address of the store, for STORAGE_EMULATOR_HOST or AWS_ENDPOINT_URL."""
    return self._servers["store"].address

  def put(self, path: str, data: bytes) -> None:
    """Creates or replaces the object `bucket/key` in one step, and the bucket if there is none."""
    with self._lock:
      self._buckets.add(path.partition("/")[0])
      self._objects[path] = _Object(data, _md5(data).hexdigest())

  def make(self, bucket: str) -> None:
    """Creates an empty bucket."""
    self._buckets.add(bucket)

  def freeze(self, bucket: str) -> None:
    """Refuses to change a bucket from now on; it can still be read."""
    self._frozen.add(bucket)

  def objects(self, folder: str) -> dict[str, bytes]:
    """The objects below `bucket/folder`, by the rest of their names."""
    start = f"{folder}/"
    found = sorted(self._objects.items())
    return {path.removeprefix(start): one.data for path, one in found if path.startswith(start)}

  def remove(self, path: str) -> None:
    """Removes an object."""
    with self._lock:
      del self._objects[path]

  def lock(self, bucket: str, token: str) -> None:
    """Makes a bucket private: it refuses requests without this bearer token."""
    self._readers[bucket] = token

  def received(self, path: str) -> int:
    """Bytes of an object that have been sent so far, over all requests."""
    return sum(r.sent for r in list(self.requests) if r.method == "GET" and unquote(r.path) == f"/{path}")

  def _answer(self, request: Request, query: str, body: bytes) -> _Answer:
    path, asked = unquote(request.path).strip("/"), parse_qs(query)
    if path.startswith(("computeMetadata/", "latest/")):
      return _Answer(404)
    if as_json := _JSON_INTERFACE.fullmatch(path):
      return self._as_json(as_json["bucket"], as_json["key"], asked)
    bucket, _, key = path.partition("/")
    if (token := self._readers.get(bucket)) is not None:
      sent = request.headers.get("authorization")
      if sent != f"Bearer {token}":
        return _xml_error(401 if sent is None else 403, "AccessDenied")
    if bucket not in self._buckets:
      return _xml_error(404, "NoSuchBucket")
    if request.method in _WITH_BODY:
      return self._changed(request, path, parse_qs(query, keep_blank_values=True), body)
    if not key:
      return self._listed(bucket, asked)
    found = self._objects.get(path)
    if found is None:
      return _xml_error(404, "NoSuchKey")
    condition = request.headers.get("if-match")
    if condition is not None and condition.strip('"') != found.etag:
      return _xml_error(412, "PreconditionFailed")
    return _Answer(200, {"ETag": f'"{found.etag}"', "Last-Modified": _NOON}, found.data, ranges=True)

  def _changed(self, request: Request, path: str, asked: Mapping[str, list[str]], body: bytes) -> _Answer:
    """Answers a request that changes something."""
    if path.partition("/")[0] in self._frozen:
      return _xml_error(403, "AccessDenied")
    upload = asked.get("uploadId", [""])[0]
    with self._lock:
      match request.method, sorted(asked):
        case "POST", ["delete"]:
          keys = [unescape(key) for key in re.findall("<Key>(.*?)</Key>", body.decode())]
          for key in keys:
            self._objects.pop(f"{path}/{key}", None)
          return _xml("DeleteResult", "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys))
        case "POST", ["uploads"]:
          upload = f"upload-{len(self.requests)}"
          self.uploads[upload] = path, {}
          return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        case "DELETE", []:
          return _Answer(204) if self._objects.pop(path, None) else _xml_error(404, "NoSuchKey")
        case "PUT", []:
          exists = path in self._objects
          wanted_new = "if-none-match" in request.headers or (
            request.headers.get("x-goog-if-generation-match") == "0"
          )
          if wanted_new and exists:
            return _xml_error(412, "PreconditionFailed")
          return self._stored(path, body, _md5(body).hexdigest())
        case _ if upload not in self.uploads:
          return _xml_error(404, "NoSuchUpload")
        case "PUT", ["partNumber", "uploadId"]:
          self.uploads[upload][1][int(asked["partNumber"][0])] = body
          return _Answer(200, {"ETag": f'"{_md5(body).hexdigest()}"', **_GENERATION})
        case "POST", ["uploadId"]:
          wanted = [int(number) for number in re.findall(r"<PartNumber>(\d+)<", body.decode())]
          parts = self.uploads[upload][1]
          if any(number not in parts for number in wanted):
            return _xml_error(400, "InvalidPart")
          if any(len(parts[number]) < self.part for number in wanted[:-1]):
            return _xml_error(400, "EntityTooSmall")
          etag = _md5(b"".join(_md5(parts[number]).digest() for number in wanted)).hexdigest()
          del self.uploads[upload]
          answer = self._stored(path, b"".join(parts[number] for number in wanted), f"{etag}-{len(wanted)}")
          done = _xml("CompleteMultipartUploadResult", f"<ETag>{answer.headers['ETag']}</ETag>")
          return dataclasses.replace(done, headers={**answer.headers, **done.headers})
        case "DELETE", ["uploadId"]:
          del self.uploads[upload]
          return _Answer(204)
    return _xml_error(400, "InvalidRequest")

  def _stored(self, path: str, data: bytes, etag: str) -> _Answer:
    self._objects[path] = _Object(data, etag)
    return _Answer(200, {"ETag": f'"{etag}"', **_GENERATION})

  def _listed(self, bucket: str, asked: Mapping[str, list[str]]) -> _Answer:
    prefix, delimiter = (asked.get(name, [""])[0] for name in ("prefix", "delimiter"))
    after = asked.get("continuation-token", [""])[0]
    entries: dict[str, str] = {}
    for path, found in sorted(self._objects.items()):
      home, _, key = path.partition("/")
      if home != bucket or not key.startswith(prefix):
        continue
      head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
      if cut:
        folder = prefix + head + cut
        entries[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
      else:
        entries[key] = (
          f"<Contents><Key>{escape(key)}</Key><LastModified>2024-01-01T12:00:00.000Z</LastModified>"
          f"<ETag>&quot;{found.etag}&quot;</ETag><Size>{len(found.data)}</Size></Contents>"
        )
    rest = [name for name in sorted(entries) if name > after]
    page, more = rest[: self.page], len(rest) > self.page
    token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
    body = "".join(entries[name] for name in page)
    text = (
      f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
      f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}</ListBucketResult>"
    )
    return _Answer(200, {"Content-Type": "application/xml"}, text.encode())

  def _as_json(self, bucket: str, key: str | None, asked: Mapping[str, list[str]]) -> _Answer:
    if key is None:
      prefix = f"{bucket}/{asked.get('prefix', [''])[0]}"
      names = sorted(name for name in self._objects if name.startswith(prefix))
      items = [{"name": n.partition("/")[2], "size": str(len(self._objects[n].data))} for n in names]
      return _json({"items": items})
    found = self._objects.get(f"{bucket}/{key}")
    if found is None:
      return _Answer(404)
    generation = str(int(found.etag[:12], 16))
    return _Answer(200, {"x-goog-generation": generation}, found.data, ranges=True)


# Google's JSON interface, which TensorStore uses.
_JSON_INTERFACE = re.compile(r"storage/v1/b/(?P<bucket>[^/]+)/o(?:/(?P<key>.+))?")
_NOON = "Mon, 01 Jan 2024 12:00:00 GMT"
# Google's client wants a version in the answer to a change, but does nothing with it here.
_GENERATION = {"x-goog-generation": "1"}


def _md5(data: bytes) -> Any:
  return hashlib.md5(data, usedforsecurity=False)


def _xml(name: str, content: str) -> _Answer:
  return _Answer(200, {"Content-Type": "application/xml"}, f"<{name}>{content}</{name}>".encode())


def _xml_error(status: int, code: str) -> _Answer:
  return _Answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def _git_hash(data: bytes) -> str:
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
  entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_hash(data)}
  if name.endswith(LARGE):
    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
  return entry


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
  entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
  if name.endswith(LARGE):
    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
  return entry


def _json(value: Any) -> _Answer:
  return _Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _error(status: int, code: str, message: str) -> _Answer:
  headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
  return _Answer(
    status, headers | {"Content-Type": "application/json"}, json.dumps({"error": message}).encode()
  )


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  block_on_close = False

  def __init__(self, hub: _Loopback, host: str):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.hub, self.host = hub, host
    self.connections: set[socket.socket] = set()

  @property
  def address(self) -> str:
    # Two names of one machine: some clients take two ports of one name for the same host.
    name = "localhost" if self.host == "storage" else "127.0.0.1"
    return f"http://{name}:{self.server_address[1]}"

  def close(self) -> None:
    self.server_close()
    for connection in list(self.connections):
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)

  def handle_error(self, request: Any, client_address: Any) -> None:
    pass  # clients hang up in many tests


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: _Server

  def setup(self) -> None:
    super().setup()
    self.server.connections.add(self.connection)

  def finish(self) -> None:
    self.server.connections.discard(self.connection)
    super().finish()

  def do_HEAD(self) -> None:
    self.do_GET()

  def do_PUT(self) -> None:
    self.do_GET()

  def do_POST(self) -> None:
    self.do_GET()

  def do_DELETE(self) -> None:
    self.do_GET()

  def do_GET(self) -> None:
    url, hub = urlsplit(self.path), self.server.hub
    headers = {name.lower(): value for name, value in self.headers.items()}
    request = Request(self.server.host, self.command, url.path, headers, url.query)
    fault = hub._take_fault(request)
    if fault.reset and fault.cut is None and fault.take is None:
      return self._hang_up(reset=True)
    length = int(headers.get("content-length") or 0) if self.command in _WITH_BODY else 0
    sent = self.rfile.read(length if fault.take is None else min(fault.take, length))
    if fault.take is not None:
      return self._hang_up(fault.reset)
    time.sleep(fault.silence)
    answer = (
      hub._answer(request, url.query, sent)
      if fault.status is None
      else _error(fault.status, "", "told to fail")
    )
    status, body = answer.status, answer.body
    extra: dict[str, str] = {}
    if answer.ranges and not fault.ignore_range and (match := _RANGE.fullmatch(request.range or "")):
      status, body, extra = _part(
        body, int(match[1]) + fault.shift, int(match[2]) + fault.shift if match[2] else None
      )
    if fault.alter is not None:
      body = fault.alter(body)
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **answer.headers, **extra, **fault.headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self._send(body, fault, request)
    return None

  def _send(self, body: bytes, fault: Fault, request: Request) -> None:
    self.wfile.flush()
    time.sleep(fault.stall)
    end = len(body) if fault.cut is None else fault.cut
    size = _DRIP if fault.drip else _BLOCK
    for start in range(0, end, size):
      block = body[start : min(start + size, end)]
      time.sleep(fault.drip)
      # Counted before the client has them, because a test may look as soon as it does.
      request._sent[0] += len(block)
      self.wfile.write(block)
    if fault.cut is not None:
      self._hang_up(fault.reset)

  def _hang_up(self, reset: bool) -> None:
    self.close_connection = True
    if reset:
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    else:
      self.wfile.flush()
      self.connection.shutdown(socket.SHUT_RDWR)

  def log_message(self, format: str, *args: Any) -> None:
    pass


def _part(body: bytes, start: int, last: int | None) -> tuple[int, bytes, dict[str, str]]:
  total = len(body)
  if start >= total:
    return 416, b"", {"Content-Range": f"bytes */{total}"}
  part = body[start : total if last is None else last + 1]
  return 206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{total}"}
