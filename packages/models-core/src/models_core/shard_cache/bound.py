"""The bound of a shard cache: entries that were not used for longest make room for new ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time

from models_core.errors import SaveError
from models_core.saving import recover
from models_core.shard_cache.identity import NotKeptError

_KEY = re.compile(r"[0-9a-f]{32}")
# What a save of an entry that was killed leaves behind.
_LEFT = re.compile(r"\.([0-9a-f]{32})\.(?:saving|complete|replaced)-[0-9a-f]{16}")


def mark_used(entry: str) -> None:
  """Notes that an entry is in use."""
  # The system's own notion of now stands still for milliseconds, so that several uses would seem to be at once.
  now = time.time_ns()
  with contextlib.suppress(OSError):
    os.utime(entry, ns=(now, now))


def remove(entry: str) -> None:
  """Removes an entry. Whoever has mapped its file keeps what is mapped."""
  shutil.rmtree(entry, ignore_errors=True)


def make_room(directory: str, nbytes: int, limit: int) -> None:
  """Removes what killed processes left, and entries until a new one fits. Other files of the directory stay.

  Args:
    directory: of the cache.
    nbytes: of the new entry.
    limit: bytes that all entries may have, if the disk has room for them.

  Raises:
    NotKeptError: if the entry would not fit alone; no entry is removed then.
    OSError: if there is no such directory.
  """
  for name in os.listdir(directory):
    if left := _LEFT.fullmatch(name):
      # Another process may be writing it.
      with contextlib.suppress(SaveError):
        recover(os.path.join(directory, left[1]))
  if nbytes > limit:
    raise NotKeptError(
      f"the shards of this process are {nbytes:,} bytes, and max_cache_size is {limit:,}: raise it"
    )
  entries = _entries(directory)
  held = sum(size for _, size, _ in entries)
  room = held + shutil.disk_usage(directory).free
  if nbytes > room:
    raise NotKeptError(
      f"{nbytes:,} bytes are needed on the disk, and {room:,} are free or held by other entries"
    )
  for _, size, path in sorted(entries):
    if held + nbytes <= min(limit, room):
      return
    remove(path)
    held -= size


def _entries(directory: str) -> list[tuple[int, int, str]]:
  """When each entry was used last, its bytes and its path."""
  found = []
  # Another process may remove an entry meanwhile.
  with contextlib.suppress(OSError):
    for entry in os.scandir(directory):
      with contextlib.suppress(OSError):
        if _KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
          size = sum(file.stat().st_size for file in os.scandir(entry.path))
          found.append((entry.stat().st_mtime_ns, size, entry.path))
  return found
