"""Whether bytes are those that the hub promises: by their number, and by the hash that the hub keeps of them."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator

from models_sources.huggingface.cache import Entry

_BLOCK = 1 << 20

# Another hub may put another kind of tag in these fields: only what has the length of a hash is one.
_SHA256_DIGITS, _GIT_DIGITS = 64, 40


def is_intact(entry: Entry, size: int, blocks: Iterable[bytes | memoryview]) -> bool:
  """Whether the blocks, of that many bytes in all, are the file. True for what the hub says nothing about."""
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
  """Whether the file at that path is the one that the hub promises."""
  with path.open("rb") as file:
    return is_intact(entry, os.fstat(file.fileno()).st_size, _blocks(file))


def _blocks(file: io.BufferedReader) -> Iterator[memoryview]:
  buffer = bytearray(_BLOCK)
  while count := file.readinto(buffer):
    yield memoryview(buffer)[:count]
