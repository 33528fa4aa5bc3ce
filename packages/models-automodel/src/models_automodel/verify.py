"""Checks whether a checkpoint is intact: its structure, its numbers, its bytes."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from models_automodel.automodel import AutoModel
from models_automodel.errors import SourceFilesError, source_errors
from models_automodel.where import ModelSource, Where
from models_core.errors import CheckpointError
from models_core.formats import TensorInfo, TensorReader, checkpoint_entries
from models_core.loading import LoadPlan


def verify(
  path: str | os.PathLike,
  *,
  values: bool = False,
  ignore_config_keys: Collection[str] = (),
  file: str | None = None,
  subfolder: str | None = None,
  variant: str | None = None,
) -> LoadPlan:
  """Checks a checkpoint on this machine without loading it as a model.

  Args:
    path: a directory or a GGUF file.
    values: whether all weights are read, too, and NaN and infinity refused.
    ignore_config_keys: keys of config.json to leave out, as `AutoModel.from_pretrained` takes them.
    file: which of several checkpoints, as `AutoModel.from_pretrained` takes it.
    subfolder: that holds the checkpoint.
    variant: of the weights.

  Returns:
    The load plan.

  Raises:
    CheckpointError: lists every file that is missing or broken, every tensor that is missing, unexpected, duplicate or
      of a shape that config.json does not imply, and with `values` every tensor that holds NaN or infinity.
    ModelsError: as `AutoModel.from_pretrained` raises it.
  """
  place = {"file": file, "subfolder": subfolder, "variant": variant}
  where = Where(os.fspath(path), ModelSource.LOCAL.value, progress=False, **place)
  plan = AutoModel.plan(where, ignore_config_keys=ignore_config_keys)
  if values:
    with plan.open() as opened:
      problems = [
        problem for info in plan.checkpoint.tensors.values() for problem in _not_finite(opened.reader, info)
      ]
    if problems:
      raise CheckpointError(plan.checkpoint.files.path, problems)
  return plan


def _not_finite(reader: TensorReader, info: TensorInfo) -> Iterator[str]:
  if info.codec is None and not jnp.issubdtype(info.dtype, jnp.inexact):
    return
  wrong = sum(numbers.size - int(np.isfinite(numbers).sum()) for numbers in reader.parts(info))
  if wrong:
    yield f"{info.name}: {wrong} of {math.prod(info.shape)} numbers are NaN or infinite"


def checksums(path: str | os.PathLike) -> dict[str, str]:
  """The SHA-256 of a file, or of every file of a directory, in hexadecimal, by file name.

  Files in subdirectories are left out, except those of an Orbax tree.
  """
  root = pathlib.Path(path)
  if root.is_file():
    return {root.name: _sha256(root)}
  folders = [root / name for name in checkpoint_entries(str(root))]
  entries = {*root.iterdir(), *(entry for folder in folders for entry in folder.rglob("*"))}
  result = {}
  for entry in sorted(entry for entry in entries if entry.is_file()):
    result[entry.relative_to(root).as_posix()] = _sha256(entry)
  return result


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_checksums(path: str | os.PathLike, expected: Mapping[str, str]) -> None:
  """Compares the files of a directory with checksums that `checksums` returned earlier.

  Raises:
    CheckpointError: lists each file that is missing or whose checksum differs.
  """
  found = checksums(path)
  problems = [
    f"{name} is missing" if name not in found else f"{name} has SHA-256 {found[name]}, expected {digest}"
    for name, digest in expected.items()
    if found.get(name) != digest
  ]
  if problems:
    raise CheckpointError(os.fspath(path), problems)


def check_hub(path: str | os.PathLike, repo_id: str, *, revision: str | None = None) -> str:
  """Compares the files of a directory with the hashes that the hub states for a repository. Nothing is downloaded.

  Args:
    path: a directory; its subdirectories are left out.
    repo_id: the repository.
    revision: branch, tag or commit; None is `main`.

  Returns:
    The commit that the files are of.

  Raises:
    CheckpointError: lists each file whose bytes differ, each that the repository lacks, and each safetensors file of the
      repository that is missing here.
    SourceFilesError: the hub cannot be reached, or has no such repository.
  """
  from models_sources.huggingface import open_files

  root = pathlib.Path(path)
  here = sorted(entry.name for entry in root.iterdir() if entry.is_file() and not entry.name.startswith("."))
  with source_errors():
    files = open_files(repo_id, revision=revision, progress=False)
    if files.listing is None:
      raise SourceFilesError(f"{repo_id}: {files.unreachable}; its hashes are not known here")
    place = f"{repo_id} at commit {files.commit}"
    problems = [
      f"{name} is not in {place}" if name not in files.listing else f"{name} differs from that of {place}"
      for name in here
      if name not in files.listing or not files.is_same(name, root / name)
    ]
  absent = [
    name for name in files.names() if name.endswith(".safetensors") and "/" not in name and name not in here
  ]
  problems += [f"{name} of {place} is missing" for name in absent]
  if problems:
    raise CheckpointError(os.fspath(path), problems)
  return files.commit


def read_checksums(path: str | os.PathLike) -> dict[str, str]:
  """Reads a file of checksums as `sha256sum` writes it: digest, two spaces, name on each line.

  Raises:
    CheckpointError: if the file cannot be read, or a line has another form.
  """
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise CheckpointError(os.fspath(path), [f"the checksums cannot be read: {error}"]) from error
  result = {}
  for line in filter(None, text.splitlines()):
    digest, _, name = line.partition("  ")
    if len(digest) != 64 or not name:
      raise CheckpointError(
        os.fspath(path), [f"{line!r} is not a line of sha256sum: write digest, two spaces, name"]
      )
    result[name] = digest.lower()
  return result
