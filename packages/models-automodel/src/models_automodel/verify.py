"""Is a checkpoint whole: its structure, its numbers, its bytes."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from models_automodel.automodel import AutoModel
from models_core.errors import CheckpointError
from models_core.formats import BoxReader, TensorInfo, TensorReader, cells, open_reader, tree_entries
from models_core.loading import LoadPlan

# Elements that are looked at in one go, a multiple of every codec's block.
_CHUNK = 1 << 22


def verify(path: str | os.PathLike, *, values: bool = False) -> LoadPlan:
  """Checks a checkpoint of this machine without keeping any of it.

  Args:
    path: a directory or GGUF file.
    values: read all numbers, too, and refuse NaN and infinity.

  Returns:
    How it would be loaded.

  Raises:
    CheckpointError: with every file that is missing or broken, every tensor that is missing, unexpected, doubled
      or not of the shape that config.json implies, and with `values` every tensor that has no finite numbers.
    ModelsError: as `from_pretrained` does.
  """
  plan = AutoModel.plan(os.fspath(path), model_source="local", progress=False)
  if values:
    checkpoint = plan.checkpoint
    files = sorted({info.file for info in checkpoint.tensors.values()})
    with contextlib.closing(open_reader(checkpoint, files, lambda count: None)) as reader:
      problems = [problem for info in checkpoint.tensors.values() for problem in _not_finite(reader, info)]
    if problems:
      raise CheckpointError(checkpoint.files.path, problems)
  return plan


def _not_finite(reader: TensorReader, info: TensorInfo) -> Iterator[str]:
  if info.codec is None and not jnp.issubdtype(info.dtype, jnp.inexact):
    return
  wrong = sum(numbers.size - int(np.isfinite(numbers).sum()) for numbers in _numbers(reader, info))
  if wrong:
    yield f"{info.name}: {wrong} of {math.prod(info.shape)} numbers are NaN or infinite"


def _numbers(reader: TensorReader, info: TensorInfo) -> Iterator[np.ndarray]:
  """All numbers of a tensor, in parts: its cells, or runs of elements."""
  if isinstance(reader, BoxReader):
    for index in cells(info.shape, info.cell or info.shape):
      yield reader.read_box(info, index)
    return
  count = math.prod(info.shape)
  for element in range(0, count, _CHUNK):
    yield reader.read_elements(info, element, min(_CHUNK, count - element))


def checksums(path: str | os.PathLike) -> dict[str, str]:
  """The SHA-256 of every file of a directory, in hexadecimal, by its name.

  Files in folders below it don't count, but for those of an Orbax tree.
  """
  root = pathlib.Path(path)
  folders = [root / name for name in tree_entries(str(root))]
  entries = {*root.iterdir(), *(entry for folder in folders for entry in folder.rglob("*"))}
  result = {}
  for entry in sorted(entry for entry in entries if entry.is_file()):
    with entry.open("rb") as file:
      result[entry.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
  return result


def check_checksums(path: str | os.PathLike, expected: Mapping[str, str]) -> None:
  """Compares files with what `checksums` gave.

  Raises:
    CheckpointError: naming each file that is missing or has other bytes.
  """
  found = checksums(path)
  problems = [
    f"{name} is missing" if name not in found else f"{name} has SHA-256 {found[name]}, expected {digest}"
    for name, digest in expected.items()
    if found.get(name) != digest
  ]
  if problems:
    raise CheckpointError(os.fspath(path), problems)


def read_checksums(path: str | os.PathLike) -> dict[str, str]:
  """Lines as `sha256sum` writes them: digest, two spaces, name.

  Raises:
    CheckpointError: if there is no such file, or for a line that is something else.
  """
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise CheckpointError(os.fspath(path), [f"the checksums cannot be read: {error}"]) from error
  result = {}
  for line in filter(None, text.splitlines()):
    digest, _, name = line.partition("  ")
    if len(digest) != 64 or not name:
      raise CheckpointError(os.fspath(path), [f"{line!r} is no line of sha256sum: digest, two spaces, name"])
    result[name] = digest.lower()
  return result
