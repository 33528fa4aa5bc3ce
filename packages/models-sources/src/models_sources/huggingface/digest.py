"""Checks downloaded bytes against the size and the hash that the hub states."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator

from models_sources.huggingface.cache import Entry

_BLOCK = 1 << 20

# Other hubs may put other tags into these fields; only a text of a hash's length is compared.
_SHA256_DIGITS, _GIT_DIGITS = 64, 40


def is_intact(entry: Entry, size: int, blocks: Iterable[bytes | memoryview]) -> bool:
  """Whether the bytes of a file match its entry; True if the entry has neither size nor hash.

  Args:
    entry: size and hash, as the hub states them.
    size: bytes of all blocks together.
    blocks: the bytes of the file, in order.
  """
  if entry.size is not None and entry.size != size:
    return False
  if entry.sha256 and len(entry.sha256) == _SHA256_DIGITS:
    expected, digest = entry.sha256, hashlib.sha256()
  elif entry.blob_id and len(entry.blob_id) == _GIT_DIGITS:
    # Git hashes a header before the bytes.
    expected, digest = entry.blob_id, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
  else:
    return True
  for block in blocks:
    digest.update(block)
  return digest.hexdigest() == expected


def is_intact_file(entry: Entry, path: pathlib.Path) -> bool:
  """Whether the file at that path matches the hub's entry."""
  with path.open("rb") as file:
    return is_intact(entry, os.fstat(file.fileno()).st_size, _blocks(file))


def _blocks(file: io.BufferedReader) -> Iterator[memoryview]:
  buffer = bytearray(_BLOCK)
  while count := file.readinto(buffer):
    yield memoryview(buffer)[:count]
