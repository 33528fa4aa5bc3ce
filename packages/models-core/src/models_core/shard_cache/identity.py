"""Which bytes a load reads: the versions of a checkpoint's files, and the key of what is made of them.

A file of this machine is known by its inode, its size and the times of its last changes. The system sets the time of the
last change (`st_ctime`) itself, whatever a program asks for. It moves in steps, so two changes within a step look like
one: files that changed within the last step are waited for, before they are read. Files in a store are known by the
revision that their source states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence

import jax

from models_core.formats import ORBAX, RangeFiles
from models_core.loading import LoadPlan, PlannedParameter

# In nanoseconds: steps of file times that are whole seconds, as FAT has them, and of all others.
_COARSE, _STEP = 2 * 10**9, 5 * 10**7
_SECOND = 10**9


class NotKeptError(Exception):
  """A load cannot be kept. The message says why."""


# Name and version of each file, in order.
Versions = tuple[tuple[str, tuple[int, ...]] | tuple[str, str], ...]


def versions_of(plan: LoadPlan) -> Versions:
  """The versions of all files that decide what a plan loads. Those of this machine are fetched already.

  Raises:
    NotKeptError: if the source does not state a version.
  """
  files = plan.checkpoint.files
  if isinstance(files, RangeFiles) or "://" in files.path:
    if (revision := getattr(files, "revision", None)) is None:
      raise NotKeptError(f"the source of {files.path} states no version")
    return (("revision", revision),)
  names = plan.files_of_process
  root = files.fetch(names)
  # How weights are quantised may be stated beside them.
  paths = {os.path.join(root, name) for name in (*names, *(n for n in files.names() if n.endswith(".json")))}
  if plan.checkpoint.format is ORBAX:
    # Arrays are folders, or one database of many files.
    tensors = plan.checkpoint.tensors.values()
    folders = {os.path.dirname(os.path.join(root, info.file)) for info in tensors}
    paths |= {path for folder in folders for path in _files_below(folder)}
  found = []
  for path in sorted(paths):
    try:
      stat = os.stat(path)
    except FileNotFoundError:
      continue  # listed by its source, but not fetched, because it is not read
    except OSError as error:
      raise NotKeptError(f"{path} cannot be asked for its version: {error.strerror}") from error
    version = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    found.append((os.path.relpath(path, root), version))
  return tuple(found)


def _files_below(folder: str) -> Iterator[str]:
  for parent, _, names in os.walk(folder):
    yield from (os.path.join(parent, name) for name in names)


def wait_until_settled(versions: Versions) -> None:
  """Waits until a later change of a file must show in its version, for at most two seconds.

  Raises:
    NotKeptError: if a file changed in the future, by this machine's clock.
  """
  newest = max((version[-1] for _, version in versions if isinstance(version, tuple)), default=0)
  step = _STEP if newest % _SECOND else _COARSE
  left = newest + step - time.time_ns()
  if left > step:
    raise NotKeptError("a file of the checkpoint changed in the future, by the clock of this machine")
  if left > 0:
    time.sleep(left / _SECOND)


def key_of(plan: LoadPlan, versions: Versions, also: bytes = b"") -> str:
  """The name of what this process's devices hold once a plan is loaded: a hash of all that decides it.

  Args:
    plan: of the load.
    versions: of the files that it reads.
    also: whatever else decides the numbers, such as an adapter that is merged.
  """
  checkpoint, mesh = plan.checkpoint, plan.mesh
  said = [
    _version(),
    repr((versions, also, dict(plan.model.letters), jax.process_index())),
    repr(None if mesh is None else (dict(mesh.shape), [(d.platform, d.id) for d in mesh.devices.flat])),
  ]
  for info in checkpoint.tensors.values():
    said += [
      f"{t.name} {t.dtype} {t.shape} {t.file} {t.start} {t.stop} {t.encoding}" for t in (info, *info.stored)
    ]
  said += [_said(planned) for planned in plan.parameters]
  return hashlib.blake2b("\n".join(said).encode(), digest_size=16).hexdigest()


def _version() -> str:
  """The version of this package: another one may load other numbers."""
  try:
    return importlib.metadata.version("models-core")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"  # sources on the path, which nothing has installed


def _said(planned: PlannedParameter) -> str:
  parameter = planned.parameter
  spec = getattr(parameter.sharding, "spec", None)
  # A conversion is a function, whose text differs from process to process; the sizes that it depends on are letters.
  pieces: Sequence = [
    (dataclasses.replace(piece, conversion=None), piece.conversion is not None) for piece in planned.pieces
  ]
  return repr((parameter.name, parameter.shape, planned.dtype.name, spec, pieces))
