"""Checkpoints in object stores, read in place: what Google Cloud Storage, S3 and similar stores have in common.

The objects below an address are listed once. Every later request carries the ETag of that listing (`If-Match`): if an
object is replaced meanwhile, the request fails, so old and new bytes are never mixed. Ranges go straight into the
reader's memory; a cut or stalled answer is resumed where it ended. Only `retry` decides about further attempts; the
client's own retries are off. `object_target` writes to the same stores.

The module of a provider, `gcs` or `s3`, says how to connect, and what to tell a user who lacks access.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from models_sources.disk import read_errors, write_errors
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
    "object stores need the package obstore", "models-sources[stores]", error.name
  ) from error

T = TypeVar("T")

# A busy store answers 503 for longer than a hub does.
POLICY = Policy(attempts=8)
# Seconds without a byte after which a connection is given up, unless MODELS_SOURCES_TIMEOUT is set.
STALL = 20.0
_CONNECT = 10.0
_ELSEWHERE = "give another download_path, or set MODELS_SOURCES_CACHE"
# Bytes taken from an answer at a time; a cut answer loses at most this many.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Provider:
  """What differs between kinds of object stores.

  Attributes:
    name: of the service, as its users call it.
    scheme: of its addresses, such as "gs".
    endpoint: returns the address of the server that the environment names; empty for the provider's own.
    connect: (bucket, token, client options, retry options) -> a client; with token=False its requests are not signed.
    remedy: tells a user how to get credentials, for messages; `{rights}` in it are those that the account needs.
    misplaced: tells a user what to do if the server says that the bucket is elsewhere, for messages.
  """

  name: str
  scheme: str
  endpoint: Callable[[], str]
  connect: Callable[[str, str | bool | None, Any, Any], Any]
  remedy: str
  misplaced: str


@dataclasses.dataclass(frozen=True)
class Address:
  """A place in a store.

  Attributes:
    scheme: "gs" or "s3".
    bucket: name of the bucket.
    key: of one object, or the common prefix of the keys of a folder's objects; empty for the whole bucket.
  """

  scheme: str
  bucket: str
  key: str

  def __str__(self) -> str:
    return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")


def parse_address(identifier: str, scheme: str) -> Address:
  """Splits `gs://bucket/folder` into its parts.

  Raises:
    InvalidNameError: the identifier is not an address with that scheme.
  """
  match = re.fullmatch(rf"{scheme}://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(.*))?", identifier)
  key = (match[2] or "").strip("/") if match else ""
  if match is None or "\0" in key or any(part in ("", ".", "..") for part in key.split("/") if key):
    raise InvalidNameError(f"{identifier!r} is not an address of the form {scheme}://bucket/folder")
  return Address(scheme, match[1], key)


@dataclasses.dataclass(frozen=True)
class Entry:
  """An object, as the store lists it.

  Attributes:
    key: within the bucket.
    size: in bytes.
    etag: changes whenever the object is replaced.
  """

  key: str
  size: int
  etag: str


@dataclasses.dataclass(frozen=True)
class Use:
  """What the requests to a bucket are made for.

  Attributes:
    done: what is done to the objects, for messages.
    rights: what the account must be allowed to do with the bucket, for messages.
  """

  done: str
  rights: str


READING = Use("read", "list and read")
WRITING = Use("written", "list, read, write and delete in")


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The requests to one bucket; each translates its errors and retries.

  Attributes:
    provider: of the store.
    name: of the bucket.
    client: of the provider's library.
    anonymous: whether requests are not signed.
    use: what the requests are made for.
  """

  provider: Provider
  name: str
  client: Any = dataclasses.field(repr=False)
  anonymous: bool
  use: Use = READING

  def ask(self, action: Callable[[], T], what: str, gone: str) -> T:
    """Calls `action`; translates its errors, and retries if another attempt may succeed.

    Args:
      action: makes one request.
      what: the request is about, for messages.
      gone: message of the error if the object or folder does not exist.

    Raises:
      SourceError: the subclass and the message that `_FAILURES` gives.
    """

    def attempt() -> T:
      with self.errors(what, gone):
        return action()

    return with_retries(attempt, POLICY)

  @contextlib.contextmanager
  def errors(self, what: str, gone: str) -> Iterator[None]:
    """Translates an error of the client. Takes the last two arguments of `ask`."""
    try:
      yield
    except SourceError:
      raise
    # The client raises some errors of an upload as the system's.
    except (obstore.exceptions.BaseError, OSError) as error:
      # The original error quotes addresses and answers.
      raise self._translated(str(error), what, gone) from None

  def _translated(self, message: str, what: str, gone: str) -> SourceError:
    # Names are cut out first: one of an object, or of an option, could look like one of the patterns.
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
        done=self.use.done,
        who="without credentials" if self.anonymous else "with these credentials",
        remedy=self.provider.remedy.format(rights=self.use.rights),
        misplaced=self.provider.misplaced,
      )
    )


class _NoCredentialsError(AccessError):
  """The platform has no credentials at all; public objects can still be read."""


_STATUS = re.compile(r"status code: (\d{3})\b")
_NAMES = re.compile(
  r"https?://\S+|retry_timeout|(for path|at location) .*?(?=: Error| not found: Error)|path: \".*\""
)
# Both providers look for credentials last at the metadata service of a virtual machine.
_METADATA = re.compile(r"^https?://[^/]+/(computeMetadata|latest/(api/token|meta-data))\b")
_NO_ACCOUNT = "<metadata service>"
_REFUSED = frozenset({"400", "401", "403", "404"})
_LATER = frozenset({"408", "425", "429", "500", "502", "503", "504"})
_REPLACED = "{what} was replaced while it was {done}: load it again once nothing writes to it"
_SETTINGS = "check the endpoint and the proxy settings"

# Statuses (None is any, "none" is no answer), a pattern in the client's message, error class, our message. The first
# row that matches decides. The client's message holds no more of an answer: no Retry-After, no region of a bucket.
_FAILURES: tuple[tuple[frozenset[str] | None, str, type[SourceError], str], ...] = (
  (_LATER, "", ConnectionFailedError, "{place} answers {status} about {what}: try later"),
  (None, _NO_ACCOUNT, _NoCredentialsError, "there are no credentials for {what}: {remedy}"),
  (_REFUSED, "token request|AssumeRole", AccessError, "the credentials for {what} do not work: {remedy}"),
  (frozenset({"401", "403"}), "", AccessError, "{what} may not be {done} {who}: {remedy}"),
  (frozenset({"404"}), "", FilesNotFoundError, "{gone}"),
  (frozenset({"412", "416"}), "", CorruptFilesError, _REPLACED),
  (
    frozenset({"none", "301", "307", "308"}),
    "redirect|code: 30",
    SourceError,
    "{place} says that {what} is elsewhere: {misplaced}",
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
    f"the answer of {{place}} about {{what}} is not that of an object store: {_SETTINGS}",
  ),
  (
    frozenset({"none"}),
    "Timeout|TimedOut",
    ConnectionFailedError,
    "the connection to {place} for {what} timed out: try later, or raise MODELS_SOURCES_TIMEOUT",
  ),
  (
    frozenset({"none"}),
    "",
    ConnectionFailedError,
    f"the connection to {{place}} for {{what}} failed or was cut: {_SETTINGS}",
  ),
  (None, "", SourceError, f"{{place}} answers {{status}} about {{what}}: {_SETTINGS}"),
)


@dataclasses.dataclass(frozen=True)
class StoreFiles:
  """The objects of one folder, each pinned to one version, read in place.

  Attributes:
    bucket: makes the requests.
    address: of the folder, or of one object.
    listing: the objects by name.
  """

  bucket: Bucket
  address: Address
  listing: Mapping[str, Entry] = dataclasses.field(repr=False)

  @property
  def path(self) -> str:
    """The address of the folder or the object."""
    return str(self.address)

  @property
  def revision(self) -> str:
    """A hash over the versions of all objects. Passed to `open_files`, it gives these very files, or an error."""
    versions = sorted((name, entry.size, entry.etag) for name, entry in self.listing.items())
    return hashlib.sha256(repr(versions).encode()).hexdigest()

  def names(self) -> Sequence[str]:
    """Sorted names of the objects."""
    return sorted(self.listing)

  def size(self, name: str) -> int:
    """Bytes of an object."""
    return self.entry(name).size

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of an object, fewer where it ends before `stop`. Raises as `read_into`."""
    buffer = bytearray(max(0, min(stop, self.size(name)) - start))
    if buffer:
      self.read_into(name, start, memoryview(buffer))
    return bytes(buffer)

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes of an object that begin at `start`: one request, or more if answers are cut.

    Raises:
      FilesNotFoundError: there is no such object, or it was removed after it was listed.
      CorruptFilesError: it was replaced after it was listed, or ends before the buffer is full.
      ConnectionFailedError: the bytes could not be read, after all retries.
    """
    entry, done = self.entry(name), 0
    what = f"{self.address.scheme}://{self.bucket.name}/{entry.key}"
    if start + len(buffer) > entry.size:
      raise CorruptFilesError(
        f"{what} has {entry.size} bytes, but {start + len(buffer)} are needed: check that its upload is complete"
      )

    def get() -> None:
      nonlocal done
      options = {"range": (start + done, start + len(buffer)), "if_match": entry.etag}
      answer = obstore.get(self.bucket.client, entry.key, options=options)  # type: ignore[arg-type]
      # A store that ignores If-Match still states the version that it sends.
      if _bare(answer.meta["e_tag"]) != _bare(entry.etag) or answer.meta["size"] != entry.size:
        raise CorruptFilesError(_REPLACED.format(what=what, done=READING.done))
      for block in answer.stream(_BLOCK):
        if done + len(block) > len(buffer):
          raise SourceError(
            f"{what}: the answer has more bytes than were requested; check the proxy settings"
          )
        buffer[done : done + len(block)] = block
        done += len(block)
      if done < len(buffer):
        raise ConnectionFailedError(f"{what}: the answer ended after {done} of {len(buffer)} bytes")

    if len(buffer):
      self.bucket.ask(
        get,
        what,
        f"{what} was removed after it was listed: restore it, or load the checkpoint from its new place",
      )

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads objects into the user's cache and returns the directory that holds them. As `CachedFiles.fetch`."""
    return cached(self, default_root()).fetch(names)

  def entry(self, name: str) -> Entry:
    """The listing's entry of an object.

    Raises:
      FilesNotFoundError: there is no such object.
    """
    if check_name(name) not in self.listing:
      raise missing_files(self.path, [name], self.listing)
    return self.listing[name]


@dataclasses.dataclass(frozen=True)
class CachedFiles:
  """The objects of one folder, with a cache on the disk for those that are fetched.

  Attributes:
    store: reads objects that are not cached.
    cache: holds whole objects.
  """

  store: StoreFiles
  cache: ObjectCache

  @property
  def path(self) -> str:
    """The directory that `fetch` puts the objects in."""
    return str(self.cache.snapshot)

  @property
  def revision(self) -> str:
    """The revision of the store's files."""
    return self.store.revision

  def names(self) -> Sequence[str]:
    """Sorted names of the objects."""
    return self.store.names()

  def size(self, name: str) -> int:
    """Bytes of an object."""
    return self.store.size(name)

  def locate(self, name: str) -> str | None:
    """The path of a cached object; None if it is not cached."""
    path = self.cache.file(name)
    return None if path is None else str(path)

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of an object, fewer where it ends before `stop`; from the cache if it is cached."""
    self.store.entry(name)
    if (path := self.cache.file(name)) is None:
      return self.store.read(name, start, stop)
    with read_errors(path), path.open("rb") as file:
      file.seek(start)
      return file.read(max(0, stop - start))

  def fetch(self, names: Sequence[str]) -> str:
    """Downloads the named objects that are not cached, each complete or not at all; returns their directory.

    Raises:
      FilesNotFoundError: some objects do not exist; the message names all of them.
      CorruptFilesError: an object was replaced after it was listed.
      ConnectionFailedError: an object could not be downloaded, after all retries.
      DiskError: the disk refuses, for example because it is full.
    """
    if absent := [name for name in names if check_name(name) not in self.store.listing]:
      raise missing_files(self.store.path, absent, self.store.listing)
    nbytes = sum(self.store.size(name) for name in names if self.cache.file(name) is None)
    with write_errors(self.cache.folder, self.store.path, nbytes, _ELSEWHERE):
      for name in names:
        self.cache.add(name, self.store.size(name), self.store.read_into)
    return self.path


def cached(store: StoreFiles, root: str) -> CachedFiles:
  """The same files with a cache below the directory `root`."""
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
  """Lists the objects directly below an address, or the one object that it names, and pins their versions.

  If the platform has no credentials, public objects are still read, unless `token` is True.

  Args:
    provider: of the store.
    identifier: the address.
    revision: None, or the `revision` of files that were opened before: the folder must be unchanged since then.
    token: as the provider's own `open_files` documents it; with False requests are not signed.
    download_path: directory that fetched objects are cached in; None reads the objects in place.

  Raises:
    InvalidNameError: the identifier is not an address, or the revision is not a folder's.
    CorruptFilesError: the folder has changed since that revision.
    FilesNotFoundError: there is nothing at the address.
    AccessError: the credentials do not work, or may not read the address.
    ConnectionFailedError: the store did not answer, after all retries.
    SourceError: the store gives an object no ETag, the answer is not an object store's, or MODELS_SOURCES_TIMEOUT is
      not a positive number.
  """
  address = parse_address(identifier, provider.scheme)
  if revision is not None and re.fullmatch("[0-9a-f]{64}", revision) is None:
    raise InvalidNameError(
      f"{address} has no revision {revision!r}: folders of object stores have no branches, tags or commits"
    )
  try:
    bucket = connected(provider, address, token)
    listing = _listed(bucket, address)
  except _NoCredentialsError:
    if token is True:
      raise
    bucket = connected(provider, address, False)
    listing = _listed(bucket, address)
  files = StoreFiles(bucket, address, listing)
  if revision not in (None, files.revision):
    raise CorruptFilesError(
      f"{address} has changed since revision {revision}: load it again, without a revision, once nothing writes to "
      "it"
    )
  return files if download_path is None else cached(files, download_path)


def connected(provider: Provider, address: Address, token: str | bool | None, use: Use = READING) -> Bucket:
  """The bucket of an address. No request is made.

  Raises:
    AccessError: the credentials or the endpoint cannot be used.
    SourceError: MODELS_SOURCES_TIMEOUT is not a positive number.
  """
  return _connected(provider, address, token, use, stall(), {"max_retries": 0})


def connected_for_uploads(
  provider: Provider, address: Address, token: str | bool | None, silence: float, longest: float
) -> Bucket:
  """The bucket of an address, whose client itself tries single parts of an upload again, as often as `POLICY` says.

  Args:
    provider: of the store.
    address: within the bucket.
    token: as for `connected`.
    silence: seconds without an answer after which a part is sent again.
    longest: seconds after which no part is sent again.
  """
  retries = {
    "max_retries": POLICY.attempts - 1,
    "backoff": {
      "init_backoff": datetime.timedelta(seconds=POLICY.first_wait),
      "max_backoff": datetime.timedelta(seconds=POLICY.longest_wait),
      "base": 2,
    },
    "retry_timeout": datetime.timedelta(seconds=longest),
  }
  return _connected(provider, address, token, WRITING, silence, retries)


def _connected(
  provider: Provider, address: Address, token: str | bool | None, use: Use, silence: float, retries: Any
) -> Bucket:
  options = {
    "allow_http": provider.endpoint().startswith("http://"),
    "connect_timeout": datetime.timedelta(seconds=min(_CONNECT, silence)),
    # Limits the silence between two bytes; a limit for the whole answer would end slow but steady ones.
    "read_timeout": datetime.timedelta(seconds=silence),
    "timeout": datetime.timedelta(days=1),
  }
  try:
    client = provider.connect(address.bucket, token, options, retries)
  except (obstore.exceptions.BaseError, ValueError):
    raise AccessError(
      f"the credentials or the endpoint for {address} cannot be used: "
      f"{provider.remedy.format(rights=use.rights)}"
    ) from None
  return Bucket(provider, address.bucket, client, token is False, use)


def stall() -> float:
  """Seconds without a byte after which a connection is given up.

  Raises:
    SourceError: MODELS_SOURCES_TIMEOUT is not a positive number.
  """
  text = os.environ.get("MODELS_SOURCES_TIMEOUT") or str(STALL)
  if re.fullmatch(r"\d+(\.\d+)?", text) is None or not float(text):
    raise SourceError(f"MODELS_SOURCES_TIMEOUT is {text!r}: set it to a positive number of seconds")
  return float(text)


def _listed(bucket: Bucket, address: Address) -> dict[str, Entry]:
  """The objects of a folder by name; if there are none, the object whose key is the address itself.

  Raises:
    FilesNotFoundError: there is neither, or the checkpoint in the folder is not whole.
    SourceError: the store gives an object no ETag.
  """
  nothing = f"there is nothing at {address}: check the spelling of bucket and folder"
  objects = entries(bucket, address, nothing)
  if not objects:
    if not address.key:
      raise FilesNotFoundError(nothing)
    meta = bucket.ask(lambda: obstore.head(bucket.client, address.key), str(address), nothing)
    objects = entries_of({address.key.rpartition("/")[2]: meta}, address)
  saves = unfinished(objects)
  if lacking := [last for last in saves.values() if last not in objects]:
    raise FilesNotFoundError(
      f"{address} holds no whole checkpoint: {lacking[0]} is written last, and is not there yet. Wait for the save that "
      "is under way; if it was interrupted, save the checkpoint again with overwrite=True"
    )
  return {name: entry for name, entry in objects.items() if name not in saves}


def entries(bucket: Bucket, address: Address, gone: str) -> dict[str, Entry]:
  """The objects directly below an address, by name.

  Args:
    bucket: makes the requests.
    address: of the folder.
    gone: message of the error if there is no such bucket.
  """
  found = bucket.ask(
    lambda: obstore.list_with_delimiter(bucket.client, address.key or None)["objects"], str(address), gone
  )
  folder = f"{address.key}/" if address.key else ""
  # Some tools mark an empty folder by an object with the folder's own name.
  return entries_of({m["path"].removeprefix(folder): m for m in found if m["path"] != address.key}, address)


def entries_of(objects: Mapping[str, Any], address: Address) -> dict[str, Entry]:
  """The client's descriptions of objects as entries.

  Raises:
    SourceError: the store gives an object no ETag.
  """
  if unmarked := [name for name, meta in objects.items() if not meta["e_tag"]]:
    raise SourceError(
      f"{address}: the store gives no ETag for {unmarked[0]}, so a replaced object would go unnoticed: copy the files "
      "to a local directory and load that"
    )
  return {name: Entry(meta["path"], meta["size"], str(meta["e_tag"])) for name, meta in objects.items()}


def mark_of(token: str, last: str) -> str:
  """The name of the object that says that a save is under way.

  Args:
    token: names the save: 16 hexadecimal digits.
    last: name of the object that the save writes last.
  """
  return f".saving-{token}.{last}"


def unfinished(names: Iterable[str]) -> dict[str, str]:
  """The saves that are under way, or were interrupted: the name that `mark_of` gives -> the object written last."""
  return {match[0]: match[1] for name in names if (match := _MARK.fullmatch(name))}


_MARK = re.compile(r"\.saving-[0-9a-f]{16}\.(.+)")


def _public(endpoint: str) -> str:
  """An endpoint without its user and password."""
  return re.sub(r"//[^/@]*@", "//", endpoint)


def _bare(etag: str | None) -> str:
  return (etag or "").removeprefix("W/").strip('"')
