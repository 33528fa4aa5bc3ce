"""Checkpoints in object stores, read where they lie: what is the same for Google's, Amazon's and their likes.

The objects below an address are listed once. Every later request is bound to the ETag of that listing (`If-Match`), so
that an object which is replaced meanwhile is an error and never a mixture. Ranges go straight into the reader's
memory; a cut or stalled answer goes on where it ended. Only `retry` decides about further attempts: those of the
client are off.

A provider's own module, `gcs` or `s3`, says how to connect, and what to tell a user who lacks access.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from models_sources.errors import (
  AccessError,
  ConnectionFailedError,
  CorruptFilesError,
  FilesNotFoundError,
  InvalidNameError,
  MissingClientError,
  SourceError,
)
from models_sources.names import check_name, missing_files
from models_sources.object_cache import ObjectCache, default_root
from models_sources.retry import Policy, with_retries

try:
  import obstore
except ModuleNotFoundError as error:
  raise MissingClientError(
    'object stores need the package obstore: pip install "models-sources[stores]"', name="obstore"
  ) from error

T = TypeVar("T")

# A store that is asked by many clients says 503 for longer than a hub does.
POLICY = Policy(attempts=8)
# Seconds without a byte after which a connection is given up; MODELS_SOURCES_TIMEOUT is the user's own.
STALL = 20.0
_CONNECT = 10.0
# Bytes that are taken from an answer at a time: what a cut answer loses at most.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Provider:
  """What tells one kind of store from another.

  Attributes:
    name: of the service, as its users call it.
    scheme: of its addresses.
    endpoint: where it is asked now, without credentials; empty for the provider's own place.
    connect: (bucket, token, client options) -> a client; a token of False signs nothing.
    remedy: how a user gets credentials.
    misplaced: what to do where the bucket is said to be elsewhere.
  """

  name: str
  scheme: str
  endpoint: Callable[[], str]
  connect: Callable[[str, str | bool | None, Any], Any]
  remedy: str
  misplaced: str


@dataclasses.dataclass(frozen=True)
class Address:
  """A place in a store.

  Attributes:
    scheme: "gs" or "s3".
    bucket: its name.
    key: of an object, or what the keys of a folder's objects begin with; empty for the whole bucket.
  """

  scheme: str
  bucket: str
  key: str

  def __str__(self) -> str:
    return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")


def parse_address(identifier: str, scheme: str) -> Address:
  """`gs://bucket/folder` in its parts.

  Raises:
    InvalidNameError: it is not that.
  """
  match = re.fullmatch(rf"{scheme}://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(.*))?", identifier)
  key = (match[2] or "").strip("/") if match else ""
  if match is None or any(part in ("", ".", "..") for part in key.split("/") if key):
    raise InvalidNameError(f"{identifier!r} is no address of the form {scheme}://bucket/folder")
  return Address(scheme, match[1], key)


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object as the store listed it.

  Attributes:
    key: within the bucket.
    size: bytes.
    etag: the store's mark of this version.
  """

  key: str
  size: int
  etag: str


@dataclasses.dataclass(frozen=True)
class _Bucket:
  """One bucket as it is asked: each request with its errors translated and its attempts."""

  provider: Provider
  name: str
  client: Any = dataclasses.field(repr=False)
  anonymous: bool

  def ask(self, action: Callable[[], T], what: str, gone: str) -> T:
    """Calls `action`; translates its errors and tries again where that may help.

    Args:
      action: one request.
      what: is asked for, in words.
      gone: the error where it is not there.
    """

    def attempt() -> T:
      try:
        return action()
      except (obstore.exceptions.BaseError, FileNotFoundError) as error:
        # The original quotes addresses and answers.
        raise self._translated(str(error), what, gone) from None

    return with_retries(attempt, POLICY)

  def _translated(self, message: str, what: str, gone: str) -> SourceError:
    # An object may have any name: only the client's own words are looked at.
    said = _NAMES.sub(lambda m: _NO_ACCOUNT if _METADATA.search(m[0]) else "", message)
    status = match[1] if (match := _STATUS.search(said)) else "none"
    kind, template = next(
      (kind, template)
      for statuses, pattern, kind, template in _FAILURES
      if (statuses is None or status in statuses) and re.search(pattern, said, re.I)
    )
    return kind(
      template.format(
        what=what,
        gone=gone,
        status=status,
        place=f"{self.provider.name} ({_public(self.provider.endpoint()) or 'its own endpoint'})",
        who="without credentials" if self.anonymous else "with these credentials",
        remedy=self.provider.remedy,
        misplaced=self.provider.misplaced,
      )
    )


class _NoCredentialsError(AccessError):
  """The platform has no credentials at all: whatever is public can still be read."""


_STATUS = re.compile(r"status code: (\d{3})\b")
_NAMES = re.compile(r"https?://\S+|(for path|at location) .*?(?=: Error| not found: Error)|path: \".*\"")
# The last link of both chains of credentials is the metadata service of a virtual machine.
_METADATA = re.compile(r"^https?://[^/]+/(computeMetadata|latest/(api/token|meta-data))\b")
_NO_ACCOUNT = "<metadata service>"
_REFUSED = frozenset({"400", "401", "403", "404"})
_LATER = frozenset({"408", "425", "429", "500", "502", "503", "504"})
_REPLACED = "{what} was replaced while it was read: load it again when it stays as it is"
_SETTINGS = "check the endpoint and the proxy settings"

# Statuses (None is any, "none" is no answer), a pattern of the client's message, and what it means. The first row that
# fits decides. The client tells no more of an answer than this: neither Retry-After nor the region of a bucket.
_FAILURES: tuple[tuple[frozenset[str] | None, str, type[SourceError], str], ...] = (
  (_LATER, "", ConnectionFailedError, "{place} answers {status} about {what}: try later"),
  (None, _NO_ACCOUNT, _NoCredentialsError, "no credentials for {what}: {remedy}"),
  (_REFUSED, "token request|AssumeRole", AccessError, "the credentials for {what} do not work: {remedy}"),
  (frozenset({"401", "403"}), "", AccessError, "{what} may not be read {who}: {remedy}"),
  (frozenset({"404"}), "", FilesNotFoundError, "{gone}"),
  (frozenset({"412", "416"}), "", CorruptFilesError, _REPLACED),
  (
    frozenset({"none", "301", "307", "308"}),
    "redirect|code: 30",
    SourceError,
    "{place} has {what} elsewhere: {misplaced}",
  ),
  (
    frozenset({"none"}),
    "certificate",
    SourceError,
    f"the certificate of {{place}} is not trusted: {_SETTINGS}",
  ),
  (
    frozenset({"none"}),
    r"non-partial|Requested \d+\.\.|CONTENT.RANGE|CONTENT.LENGTH|ETag|LAST.MODIFIED|invalid list",
    SourceError,
    f"{{place}} does not answer what was asked about {{what}}: {_SETTINGS}",
  ),
  (
    frozenset({"none"}),
    "Timeout|TimedOut",
    ConnectionFailedError,
    "the connection to {place} for {what} timed out",
  ),
  (frozenset({"none"}), "", ConnectionFailedError, "the connection to {place} for {what} failed or was cut"),
  (None, "", SourceError, f"{{place}} answers {{status}} about {{what}}: {_SETTINGS}"),
)


@dataclasses.dataclass(frozen=True)
class StoreFiles:
  """The objects of one folder, of one version each, read where they lie.

  Attributes:
    bucket: how the store is asked.
    address: of the folder, or of one object.
    listing: the objects by name.
  """

  bucket: _Bucket
  address: Address
  listing: Mapping[str, Entry] = dataclasses.field(repr=False)

  @property
  def path(self) -> str:
    """The address in the store."""
    return str(self.address)

  @property
  def revision(self) -> str:
    """A hash over the versions of all objects: as `open_files`' argument, these very files or an error."""
    versions = sorted((name, entry.size, entry.etag) for name, entry in self.listing.items())
    return hashlib.sha256(repr(versions).encode()).hexdigest()

  def names(self) -> Sequence[str]:
    """Names of the objects, sorted."""
    return sorted(self.listing)

  def size(self, name: str) -> int:
    """Bytes of an object."""
    return self.entry(name).size

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of an object, fewer where it ends before `stop`."""
    buffer = bytearray(max(0, min(stop, self.size(name)) - start))
    if buffer:
      self.read_into(name, start, memoryview(buffer))
    return bytes(buffer)

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with an object's bytes from `start` on. One request, or more where answers are cut.

    Raises:
      FilesNotFoundError: there is no such object, or no longer.
      CorruptFilesError: it was replaced since it was listed, or ends before the buffer does.
      ConnectionFailedError: the bytes did not come, after all retries.
    """
    entry, done = self.entry(name), 0
    what = f"{self.address.scheme}://{self.bucket.name}/{entry.key}"
    if start + len(buffer) > entry.size:
      raise CorruptFilesError(f"{what} has {entry.size} bytes, but {start + len(buffer)} are asked for")

    def get() -> None:
      nonlocal done
      options = {"range": (start + done, start + len(buffer)), "if_match": entry.etag}
      answer = obstore.get(self.bucket.client, entry.key, options=options)  # type: ignore[arg-type]
      # A store that does not know the condition still tells what it sends.
      if _bare(answer.meta["e_tag"]) != _bare(entry.etag) or answer.meta["size"] != entry.size:
        raise CorruptFilesError(_REPLACED.format(what=what))
      for block in answer.stream(_BLOCK):
        if done + len(block) > len(buffer):
          raise SourceError(f"{what}: more bytes came than were asked for; check the proxy settings")
        buffer[done : done + len(block)] = block
        done += len(block)
      if done < len(buffer):
        raise ConnectionFailedError(f"{what}: {done} of {len(buffer)} bytes came before the answer ended")

    if len(buffer):
      self.bucket.ask(get, what, f"{what} was removed since it was listed: load it again from where it is")

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads objects into the cache of this user. Returns the directory that holds them."""
    return cached(self, default_root()).fetch(names)

  def entry(self, name: str) -> Entry:
    """What the listing says about an object.

    Raises:
      FilesNotFoundError: there is no such object.
    """
    if check_name(name) not in self.listing:
      raise missing_files(self.path, [name], self.listing)
    return self.listing[name]


@dataclasses.dataclass(frozen=True)
class CachedFiles:
  """The objects of one folder, kept whole on the disk once they are fetched.

  Attributes:
    store: where they come from.
    cache: where they are kept.
  """

  store: StoreFiles
  cache: ObjectCache

  @property
  def path(self) -> str:
    """The directory that `fetch` puts the objects in."""
    return str(self.cache.snapshot)

  @property
  def revision(self) -> str:
    """As the store's."""
    return self.store.revision

  def names(self) -> Sequence[str]:
    """Names of the objects, sorted."""
    return self.store.names()

  def size(self, name: str) -> int:
    """Bytes of an object."""
    return self.store.size(name)

  def locate(self, name: str) -> str | None:
    """The path of an object on the disk; None where it lies in the store alone."""
    path = self.cache.file(name)
    return None if path is None else str(path)

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of an object, from the disk if it is there, fewer where it ends before `stop`."""
    self.store.entry(name)
    if (path := self.cache.file(name)) is None:
      return self.store.read(name, start, stop)
    with path.open("rb") as file:
      file.seek(start)
      return file.read(max(0, stop - start))

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads what the cache lacks, complete or not at all. Returns the directory that holds the objects.

    Raises:
      FilesNotFoundError: naming every object that there isn't.
      CorruptFilesError: an object was replaced since it was listed.
      ConnectionFailedError: an object did not come, after all retries.
      OSError: of the disk, such as that it is full.
    """
    if absent := [name for name in names if check_name(name) not in self.store.listing]:
      raise missing_files(self.store.path, absent, self.store.listing)
    for name in names:
      self.cache.add(name, self.store.size(name), self.store.read_into)
    return self.path


def cached(store: StoreFiles, root: str) -> CachedFiles:
  """The same files with a cache below a directory."""
  place = (store.bucket.provider.endpoint(), store.address.scheme, store.bucket.name)
  versions = {name: (*place, entry.key, entry.etag, entry.size) for name, entry in store.listing.items()}
  return CachedFiles(store, ObjectCache.of(root, f"{store.address.scheme}--{store.bucket.name}", versions))


def open_files(
  provider: Provider,
  identifier: str,
  *,
  revision: str | None,
  token: str | bool | None,
  download_path: str | None,
) -> StoreFiles | CachedFiles:
  """The objects directly below an address, or the one object that it names, at their versions of this moment.

  Without credentials of the platform, what is public is still read; `token=True` forbids that.

  Args:
    provider: of the store.
    identifier: the address.
    revision: None, or the `revision` of files that were opened before: the folder must still hold the same.
    token: as the provider understands it; False signs nothing.
    download_path: directory below which fetched objects are kept whole; None streams them.

  Raises:
    InvalidNameError: the identifier is no address, or the revision is none of a folder.
    CorruptFilesError: the folder has changed since it had that revision.
    FilesNotFoundError: there is nothing at the address.
    AccessError: it may not be read.
    ConnectionFailedError: the store did not answer, after all retries.
  """
  address = parse_address(identifier, provider.scheme)
  if revision is not None and re.fullmatch("[0-9a-f]{64}", revision) is None:
    raise InvalidNameError(f"{address} has no revision {revision!r}: a folder of a store is as it is")
  try:
    bucket = _connected(provider, address, token)
    listing = _listed(bucket, address)
  except _NoCredentialsError:
    if token is True:
      raise
    bucket = _connected(provider, address, False)
    listing = _listed(bucket, address)
  files = StoreFiles(bucket, address, listing)
  if revision not in (None, files.revision):
    raise CorruptFilesError(f"{address} changed while it was opened: load it again when it stays as it is")
  return files if download_path is None else cached(files, os.path.expanduser(download_path))


def _connected(provider: Provider, address: Address, token: str | bool | None) -> _Bucket:
  stall = _stall()
  options = {
    "allow_http": provider.endpoint().startswith("http://"),
    "connect_timeout": datetime.timedelta(seconds=min(_CONNECT, stall)),
    # Between two bytes. The limit for a whole answer would end slow ones that come all the same.
    "read_timeout": datetime.timedelta(seconds=stall),
    "timeout": datetime.timedelta(days=1),
  }
  try:
    client = provider.connect(address.bucket, token, options)
  except (obstore.exceptions.BaseError, ValueError):
    raise AccessError(
      f"the credentials or the endpoint for {address} cannot be used: {provider.remedy}"
    ) from None
  return _Bucket(provider, address.bucket, client, token is False)


def _stall() -> float:
  text = os.environ.get("MODELS_SOURCES_TIMEOUT") or str(STALL)
  if re.fullmatch(r"\d+(\.\d+)?", text) is None or not float(text):
    raise SourceError(f"MODELS_SOURCES_TIMEOUT is {text!r}: set it to a number of seconds")
  return float(text)


def _listed(bucket: _Bucket, address: Address) -> dict[str, Entry]:
  """The objects of a folder by name, else the object of that very key."""
  nothing = f"there is nothing at {address}: check the spelling of bucket and folder"
  found = bucket.ask(
    lambda: obstore.list_with_delimiter(bucket.client, address.key or None)["objects"], str(address), nothing
  )
  folder = f"{address.key}/" if address.key else ""
  # The mark of an empty folder is an object of the folder's own name.
  objects = {meta["path"].removeprefix(folder): meta for meta in found if meta["path"] != address.key}
  if not objects:
    if not address.key:
      raise FilesNotFoundError(nothing)
    meta = bucket.ask(lambda: obstore.head(bucket.client, address.key), str(address), nothing)
    objects = {address.key.rpartition("/")[2]: meta}
  if unmarked := [name for name, meta in objects.items() if not meta["e_tag"]]:
    raise SourceError(
      f"{address}: the store gives {unmarked[0]} no ETag, so that its versions cannot be told apart"
    )
  return {name: Entry(meta["path"], meta["size"], str(meta["e_tag"])) for name, meta in objects.items()}


def _public(endpoint: str) -> str:
  """An endpoint without user and password."""
  return re.sub(r"//[^/@]*@", "//", endpoint)


def _bare(etag: str | None) -> str:
  return (etag or "").removeprefix("W/").strip('"')
