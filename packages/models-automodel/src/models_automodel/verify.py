"""Is a checkpoint whole: its structure, its numbers, its bytes."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from models_automodel.automodel import AutoModel
from models_core.checkpoint import Files, TensorInfo
from models_core.errors import CheckpointError
from models_core.plan import LoadPlan

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
    tensors = plan.checkpoint.tensors.values()
    problems = [problem for info in tensors for problem in _not_finite(plan.checkpoint.files, info)]
    if problems:
      raise CheckpointError(plan.checkpoint.files.path, problems)
  return plan


def _not_finite(files: Files, info: TensorInfo) -> Iterator[str]:
  if info.codec is None and not jnp.issubdtype(info.dtype, jnp.inexact):
    return
  count, wrong = math.prod(info.shape), 0
  for element in range(0, count, _CHUNK):
    start, stop = (_byte(info, min(n, count)) for n in (element, element + _CHUNK))
    data = np.frombuffer(files.read(info.file, info.start + start, info.start + stop), np.uint8)
    numbers = data.view(info.dtype) if info.codec is None else info.codec.decode(data)
    wrong += numbers.size - int(np.isfinite(numbers).sum())
  if wrong:
    yield f"{info.name}: {wrong} of {count} numbers are NaN or infinite"


def _byte(info: TensorInfo, element: int) -> int:
  if info.codec is None:
    return element * info.dtype.itemsize
  return element // info.codec.block_size * info.codec.block_bytes


def checksums(path: str | os.PathLike) -> dict[str, str]:
  """The SHA-256 of every file of a directory, in hexadecimal, by its name. Files in folders below it don't count."""
  result = {}
  for entry in sorted(pathlib.Path(path).iterdir()):
    if entry.is_file():
      with entry.open("rb") as file:
        result[entry.name] = hashlib.file_digest(file, "sha256").hexdigest()
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
