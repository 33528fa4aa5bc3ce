"""Checkpoints written to object stores: data goes up as streams of parts, and one object that is put last completes it.

    <folder>/.saving-<token>.<last>        says that a save is under way, or was interrupted
             model-<token>-...             data: a name that no other save uses, so nothing is replaced
             config.json, ...              small objects, which take their places when all data is there

No step makes a listing show half a checkpoint as a whole one:

1. The mark `.saving-...` is put, then the data. An old checkpoint in the folder stays as it is.
2. If only one small object changes, putting it is the commit. Otherwise the old `<last>` is removed, so that no reader
   takes the folder for a checkpoint; the other small objects are put; and putting `<last>` is the commit.
3. What the new checkpoint does not need is removed, the mark last.

Readers refuse a folder that has a mark and lacks `<last>` (`object_store`). After an error the data and the mark are
removed, and unfinished uploads are aborted. A writer that is killed leaves them: the next save with `overwrite` removes
the objects; a rule of the bucket's life cycle must remove the parts of uploads, which no listing shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping

from models_sources.errors import AccessError, FilesNotFoundError, InvalidNameError, SourceError
from models_sources.object_store import (
  WRITING,
  Address,
  Bucket,
  Entry,
  Provider,
  StoreFiles,
  connected,
  connected_for_uploads,
  entries,
  mark_of,
  parse_address,
  stall,
  unfinished,
)

# Imported after object_store, whose error says how to install a missing obstore.
import obstore  # isort: skip

# Bytes of a part of an upload, and parts that are sent at a time. All stores take 10,000 parts of at least 5 MiB.
_PART = 8 << 20
_AT_ONCE = 4
_MOST_PARTS = 9_000
# A part may take so many times as long as MODELS_SOURCES_TIMEOUT until it is acknowledged.
_PATIENCE = 3
# Seconds after which a part is not sent again: the signature of a request is valid for 15 minutes.
_LONGEST = 300.0
# Bytes of the longest name of an object that all stores take.
_LONGEST_KEY = 1024

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StoreTarget:
  """A folder of an object store that a checkpoint is written to.

  Attributes:
    address: of the folder.
    bucket: makes the requests, except those of uploads.
    uploads: makes the requests of uploads.
  """

  address: Address
  bucket: Bucket
  uploads: Bucket

  @property
  def path(self) -> str:
    """The address of the folder."""
    return str(self.address)

  def begin(self, *, overwrite: bool, last: str) -> StoreDraft:
    """Begins a save: checks the folder and marks it.

    Args:
      overwrite: whether the folder may hold objects.
      last: name of the object that is written last; without it the folder holds no checkpoint.

    Raises:
      SourceError: the folder holds objects and `overwrite` is false, is written by another process, or is an object; or
        the store refuses. Nothing has changed.
    """
    before = self.entries()
    self._check(before, overwrite)
    token = secrets.token_hex(8)
    draft = StoreDraft(self, token, last, overwrite, before)
    self.put(draft.mark, b"")
    if not overwrite and (others := unfinished(self.entries()).keys() - {draft.mark}):
      self.remove([draft.mark])
      raise self._busy(others)
    return draft

  def join(self, token: str, last: str) -> StoreDraft:
    """Takes part in a save that another process has begun, to create some of its data.

    Args:
      token: of the draft that `begin` returned to the other process.
      last: as it was given to `begin`.
    """
    return StoreDraft(self, token, last, False, {})

  def _check(self, before: Mapping[str, Entry], overwrite: bool) -> None:
    if not before and self.address.key and self._is_object():
      raise InvalidNameError(f"{self.address} is an object, not a folder: give another address")
    if overwrite or not before:
      return
    if saves := unfinished(before):
      raise self._busy(saves)
    raise SourceError(
      f"{self.address} exists and is not empty: give another address, or overwrite=True to replace it"
    )

  def _busy(self, marks: Collection[str]) -> SourceError:
    return SourceError(
      f"another process is writing {self.address}, or a save was interrupted ({min(marks)}): wait for it, give another "
      "address, or overwrite=True to replace what it left"
    )

  def _is_object(self) -> bool:
    try:
      found = self.bucket.ask(
        lambda: obstore.head(self.bucket.client, self.address.key), str(self.address), "there is no object"
      )
    except FilesNotFoundError:
      return False
    # An empty object with the folder's name stands for the folder.
    return bool(found["size"])

  def entries(self) -> dict[str, Entry]:
    """The objects in the folder, by name."""
    return entries(self.bucket, self.address, self.gone)

  @property
  def gone(self) -> str:
    """Message of the error if the bucket does not exist."""
    return f"there is no bucket {self.bucket.name}, which {self.address} needs: create it"

  def key(self, name: str) -> str:
    """The key of an object of the folder."""
    return f"{self.address.key}/{name}" if self.address.key else name

  def named(self, name: str) -> str:
    """The address of an object of the folder, for messages."""
    return f"{self.address.scheme}://{self.bucket.name}/{self.key(name)}"

  def put(self, name: str, data: bytes, *, new: bool = False) -> None:
    """Puts a small object in one step.

    Args:
      name: of the object.
      data: its content.
      new: whether it must not exist yet, unless it has this very content.

    Raises:
      SourceError: it exists, or the store refuses.
    """

    def attempt() -> None:
      try:
        obstore.put(
          self.bucket.client,
          self.key(name),
          data,
          mode="create" if new else "overwrite",
          use_multipart=False,
        )
      except obstore.exceptions.AlreadyExistsError:
        # The answer to an earlier attempt may have been lost.
        if bytes(obstore.get(self.bucket.client, self.key(name)).bytes()) != data:
          raise SourceError(
            f"{self.named(name)} was written by another process meanwhile: give another address, or overwrite=True to "
            "replace it"
          ) from None

    self.bucket.ask(attempt, self.named(name), self.gone)

  def read(self, entry: Entry) -> bytes:
    """The content of a small object."""
    return self.bucket.ask(
      lambda: bytes(obstore.get(self.bucket.client, entry.key).bytes()), self.path, self.gone
    )

  def remove(self, names: Collection[str]) -> None:
    """Removes objects, one after the other; those that do not exist are left out."""
    for name in sorted(names):
      with contextlib.suppress(FilesNotFoundError):
        self.bucket.ask(
          functools.partial(obstore.delete, self.bucket.client, self.key(name)), self.named(name), self.gone
        )


@dataclasses.dataclass(eq=False)
class StoreDraft:
  """A save that is under way.

  Attributes:
    target: the folder.
    token: 16 hexadecimal digits that name the save.
    last: name of the object that is written last.
    overwrite: whether the folder may hold objects.
    before: the objects that were in the folder when the save began.
  """

  target: StoreTarget
  token: str
  last: str
  overwrite: bool
  before: Mapping[str, Entry] = dataclasses.field(repr=False)
  _small: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
  _placed: set[str] = dataclasses.field(default_factory=set, repr=False)
  _begun: bool = False

  @property
  def mark(self) -> str:
    """Name of the object that says that the save is under way."""
    return mark_of(self.token, self.last)

  @property
  def files(self) -> StoreFiles:
    """The objects that were in the folder when the save began."""
    marks = unfinished(self.before)
    listing = {name: entry for name, entry in self.before.items() if name not in marks}
    return StoreFiles(self.target.bucket, self.target.address, listing)

  @contextlib.contextmanager
  def create(self, name: str, nbytes: int) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Uploads an object while it is made, in parts.

    Args:
      name: of the object; it holds the token.
      nbytes: its size.

    Yields:
      A function that takes the bytes, piece by piece in their order. They must not change before the block ends.

    Raises:
      SourceError: the store refuses. The upload is aborted, as it is if the block raises an error.
    """
    if self.token not in name:
      raise InvalidNameError(f"{name} would replace an object: its name must hold {self.token}")
    target, what = self.target, self.target.named(name)
    part = max(_PART, nbytes // _MOST_PARTS + 1)
    writer = obstore.open_writer(
      target.uploads.client, target.key(name), buffer_size=part, max_concurrency=_AT_ONCE
    )

    gone = f"{what}: there is no bucket {target.bucket.name}, or somebody else ended the upload: save the checkpoint again"

    def write(data: bytes | memoryview) -> None:
      with target.uploads.errors(what, gone):
        if len(data):
          writer.write(data)

    try:
      yield write
    except BaseException as error:
      # Leaving its context with an error aborts the upload.
      with contextlib.suppress(Exception):
        writer.__exit__(type(error), error, error.__traceback__)
      raise
    with target.uploads.errors(what, gone):
      writer.close()

  def put(self, name: str, data: bytes) -> None:
    """Keeps a small object until `commit`."""
    self._small[name] = data

  def commit(
    self, sizes: Mapping[str, int], outdated: Collection[str], conflicting: Collection[str] = ()
  ) -> None:
    """Makes the checkpoint whole, and removes what it does not need.

    Args:
      sizes: bytes of all objects that `create` made, in whatever process, by name.
      outdated: names of old objects that are not kept.
      conflicting: those of them that would be read instead of the new ones.

    Raises:
      SourceError: an object is missing, another process has written the folder meanwhile, or the store refuses.
    """
    now = self.target.entries()
    if self.mark not in now:
      raise SourceError(
        f"another process has begun to write {self.target.path} meanwhile: save the checkpoint again once it is ready"
      )
    if absent := [name for name, size in sizes.items() if name not in now or now[name].size != size]:
      raise SourceError(f"{self.target.named(absent[0])} did not arrive whole: save the checkpoint again")
    changed = {name: data for name, data in self._small.items() if not self._is_same(now.get(name), data)}
    first = sorted(set(conflicting) & now.keys())
    if first or len(changed) > 1:
      if self.last in now:
        self._remove_last()
      self._step(lambda: self.target.remove(first))
      for name in sorted(changed.keys() - {self.last}):
        self._step(functools.partial(self._place, name))
      changed = {self.last: self._small[self.last]}
    for name in changed:
      self._step(functools.partial(self._place, name))
    self._begun = False
    self._tidy(set(outdated), now)

  def _remove_last(self) -> None:
    """Removes what makes the old files a checkpoint. After an error it may be gone all the same."""
    try:
      self.target.remove([self.last])
    except SourceError:
      with contextlib.suppress(SourceError):
        self._begun = self.last not in self.target.entries()
      raise
    self._begun = True

  def _place(self, name: str) -> None:
    self.target.put(name, self._small[name], new=not self.overwrite)
    self._placed.add(name)

  def _is_same(self, entry: Entry | None, data: bytes) -> bool:
    return entry is not None and entry.size == len(data) and self.target.read(entry) == data

  def _step(self, action: Callable[[], None]) -> None:
    """A step of the commit. If it fails after the first one, the message says what is left."""
    try:
      action()
    except SourceError as error:
      if not self._begun:
        raise
      raise SourceError(
        f"{error}. {self.target.path} holds no whole checkpoint now, because {self.last} was removed already: save the "
        "checkpoint again with overwrite=True"
      ) from error

  def _tidy(self, outdated: set[str], now: Mapping[str, Entry]) -> None:
    """Removes what the new checkpoint does not need. It is whole already, so an error is a warning."""
    others = unfinished(now).keys() - {self.mark}
    tokens = {mark[len(".saving-") :][:16] for mark in others} if self.overwrite else set()
    left = {name for name in now if any(token in name for token in tokens)} | (outdated & now.keys())
    try:
      self.target.remove(left - self._small.keys() - others)
      self.target.remove(others if self.overwrite else ())
      self.target.remove([self.mark])
    except SourceError as error:
      _log.warning(
        "%s is saved, but holds objects that it does not need, because they could not be removed: %s",
        self.target.path,
        error,
      )

  def discard(self) -> None:
    """Removes what the save has made so far. Errors are logged only: this is called after another one."""
    if self._begun:
      return  # The folder holds neither the old nor the new checkpoint, and the mark tells readers so.
    try:
      now = self.target.entries()
      own = {name for name in now if self.token in name and name != self.mark}
      self.target.remove(own | (self._placed - self.before.keys()))
      self.target.remove([self.mark])
    except SourceError as error:
      _log.warning("%s still holds parts of a save that failed: %s", self.target.path, error)


def open_target(provider: Provider, place: str, *, token: str | bool | None = None) -> StoreTarget:
  """Opens a folder of an object store for writing. No request is made.

  Args:
    provider: of the store.
    place: the address.
    token: as the provider's own `open_files` documents it.

  Raises:
    AccessError: the credentials or the endpoint cannot be used.
    InvalidNameError: the place is not an address, or too long for the name of an object.
  """
  address = parse_address(place, provider.scheme)
  if len(address.key.encode()) > _LONGEST_KEY - 128:
    raise InvalidNameError(
      f"{str(address)[:80]}... is too long: the names of objects have at most {_LONGEST_KEY} bytes; give a shorter "
      "address"
    )
  if token is False:
    raise AccessError(f"{address} cannot be written without credentials: leave token=False out")
  uploads = connected_for_uploads(provider, address, token, _PATIENCE * stall(), _LONGEST)
  return StoreTarget(address, connected(provider, address, token, WRITING), uploads)
