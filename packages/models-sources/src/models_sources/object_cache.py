"""A cache of objects on the disk: each version once, under a hash of everything that identifies it.

    <root>/gs--bucket/blobs/<hash>           an object's bytes; the hash is of endpoint, bucket, key, ETag and size
                      snapshots/<hash>/      the objects of a folder at their versions: links to the blobs
                      locks/<hash>           held by the process that downloads the blob

A blob is written under a temporary name, flushed to the disk and renamed, so a file with a blob's name is complete.
Nothing goes stale, because another version of an object has another name.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping

from filelock import FileLock

from models_sources.disk import local_directory

# Bytes per request, and number of simultaneous requests.
_RANGE = 8 << 20
_REQUESTS = 16

ReadInto = Callable[[str, int, memoryview], None]


def default_root() -> str:
  """The user's cache: MODELS_SOURCES_CACHE, else `models-sources` in XDG_CACHE_HOME or ~/.cache."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.environ.get("MODELS_SOURCES_CACHE") or os.path.join(base, "models-sources")


@dataclasses.dataclass(frozen=True)
class ObjectCache:
  """The cached objects of one folder, each at one version.

  Attributes:
    folder: of the bucket, within the cache.
    blobs: name of an object -> name of its blob.
  """

  folder: pathlib.Path
  blobs: Mapping[str, str] = dataclasses.field(repr=False)

  @classmethod
  def of(cls, root: str, bucket: str, versions: Mapping[str, object]) -> ObjectCache:
    """The cache below `root` of a bucket's objects.

    Args:
      root: directory of the cache.
      bucket: name of its folder.
      versions: name of an object -> what identifies its content; the blob is named by a hash of its `repr`.
    """
    return cls(
      pathlib.Path(local_directory(root, "directory of the cache")).absolute() / bucket,
      {name: _hash(version) for name, version in versions.items()},
    )

  @property
  def snapshot(self) -> pathlib.Path:
    """The directory that holds the objects under their own names."""
    return self.folder / "snapshots" / _hash(sorted(self.blobs.items()))

  def file(self, name: str) -> pathlib.Path | None:
    """The path of an object; None if it is not cached."""
    path = self.snapshot / name
    return path if path.is_file() else None

  def add(self, name: str, size: int, read_into: ReadInto) -> None:
    """Downloads an object unless it is cached, with many requests at a time. Other processes wait meanwhile.

    Args:
      name: of the object.
      size: of the object in bytes.
      read_into: (name, start, buffer): fills the buffer with the object's bytes that begin at `start`.

    Raises:
      OSError: the disk refuses; the partial file is removed.
      SourceError: as `read_into` raises it.
    """
    blob, link = self.folder / "blobs" / self.blobs[name], self.snapshot / name
    for directory in (blob.parent, link.parent, self.folder / "locks"):
      directory.mkdir(parents=True, exist_ok=True)
    if not blob.is_file():
      with FileLock(self.folder / "locks" / blob.name):
        if not blob.is_file():
          self._download(blob, name, size, read_into)
    if not link.is_file():
      with contextlib.suppress(FileExistsError):
        link.symlink_to(os.path.relpath(blob, link.parent))

  def _download(self, blob: pathlib.Path, name: str, size: int, read_into: ReadInto) -> None:
    # This process holds the lock, so partial files are leftovers of processes that were killed.
    for leftover in blob.parent.glob(f"{blob.name}.*.part"):
      leftover.unlink(missing_ok=True)
    with _draft(blob) as descriptor:

      def part(start: int) -> None:
        buffer = memoryview(bytearray(min(_RANGE, size - start)))
        read_into(name, start, buffer)
        done = 0
        while done < len(buffer):
          done += os.pwrite(descriptor, buffer[done:], start + done)

      with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        parts = [pool.submit(part, start) for start in range(0, size, _RANGE)]
        try:
          for finished in concurrent.futures.as_completed(parts):
            finished.result()
        except BaseException:
          pool.shutdown(wait=False, cancel_futures=True)
          raise


@contextlib.contextmanager
def _draft(path: pathlib.Path) -> Iterator[int]:
  """Opens a new file beside `path`; renames it to `path` once it is written and flushed, removes it after an error."""
  draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
  descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
  try:
    try:
      yield descriptor
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
    os.replace(draft, path)
    _flush_directory(path.parent)
  except BaseException:
    draft.unlink(missing_ok=True)
    raise


def _flush_directory(directory: pathlib.Path) -> None:
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _hash(value: object) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()
