"""A part of some files: a folder of them, or one of several checkpoints. It works on the files of every source."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from models_core.errors import CheckpointError, ConfigError
from models_core.formats.files import Files, LocalFiles, RangeFiles
from models_core.formats.json_files import read_json

INDEX_NAME = re.compile(r"[^/]*\.safetensors\.index(\.[\w-]+)?\.json")
PART_NAME = re.compile(
  r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>gguf|safetensors)", re.DOTALL
)
# Most names that a message lists.
_MOST = 30


@dataclasses.dataclass(frozen=True)
class SelectedFiles:
  """Some of the files of a source, as a checkpoint of their own.

  Attributes:
    inner: the files of the source.
    shown: names of the files that are shown, sorted, without the folder.
    folder: that holds them, with a slash at the end; "" for the top level.
    file: name of the file that `path` should name, if it is one file.
  """

  inner: Files
  shown: tuple[str, ...]
  folder: str = ""
  file: str = ""

  @property
  def path(self) -> str:
    """Where the folder or the file is."""
    return f"{self.inner.path.rstrip('/')}/{self.folder}{self.file}".rstrip("/")

  @property
  def revision(self) -> str | None:
    """The version of the source's files."""
    return getattr(self.inner, "revision", None)

  def names(self) -> Sequence[str]:
    """Names of the files that are shown."""
    return self.shown

  def locate(self, name: str) -> str | None:
    """The path of a file; None if it is not on this machine."""
    locate = getattr(self.inner, "locate", None)
    return None if locate is None else locate(self.folder + name)

  def size(self, name: str) -> int:
    """Bytes of a file."""
    return self.inner.size(self.folder + name)

  def read(self, name: str, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before `stop`."""
    return self.inner.read(self.folder + name, start, stop)

  def fetch(self, names: Sequence[str]) -> str:
    """Makes the named files local. Returns the directory that holds them."""
    directory = self.inner.fetch([self.folder + name for name in names])
    return os.path.join(directory, self.folder.rstrip("/")) if self.folder else directory


class SelectedRanges(SelectedFiles):
  """Some of the files of a source that reads ranges in place."""

  def read_into(self, name: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with a file's bytes from `start` on."""
    assert isinstance(self.inner, RangeFiles)
    self.inner.read_into(self.folder + name, start, buffer)


def show(files: Files, names: Iterable[str], folder: str = "", file: str = "") -> SelectedFiles:
  """The files of these names alone, as `SelectedFiles`."""
  kind = SelectedRanges if isinstance(files, RangeFiles) else SelectedFiles
  return kind(files, tuple(sorted(names)), folder, file)


def open_folder(files: Files, folder: str) -> Files:
  """The files of a folder.

  Args:
    files: of a source, or a directory on this machine.
    folder: path of the folder, relative to the files.

  Raises:
    CheckpointError: if there is no such folder; the message lists those that hold checkpoints.
  """
  plain = posixpath.normpath(folder.strip("/"))
  if plain == ".":
    return files
  prefix = f"{plain}/"
  if below := [name.removeprefix(prefix) for name in files.names() if name.startswith(prefix)]:
    return show(files, below, prefix)
  # A directory may list the files of its top level alone.
  directory = os.path.join(files.path, plain)
  if not plain.startswith("..") and os.path.isdir(files.path) and os.path.isdir(directory):
    return LocalFiles(directory)
  found = checkpoint_folders(files)
  here = f"the folders with a checkpoint are {listed(found)}" if found else "no folder holds a checkpoint"
  raise CheckpointError(files.path, [f"there is no folder {plain}: {here}"])


def checkpoint_folders(files: Files) -> list[str]:
  """Sorted names of the folders, up to two levels deep, that hold a config.json or weights."""
  names = set(files.names())
  if os.path.isdir(files.path):
    for first in _folders(files.path):
      names.update(_joined(files.path, first))
      for second in _folders(os.path.join(files.path, first)):
        names.update(_joined(files.path, f"{first}/{second}"))
  marked = {name.rpartition("/")[0] for name in names if _is_mark(name.rpartition("/")[2])}
  return sorted(marked - {""})


def _is_mark(name: str) -> bool:
  return name == "config.json" or name.endswith((".safetensors", ".gguf"))


def _folders(directory: str) -> list[str]:
  try:
    return [entry.name for entry in os.scandir(directory) if os.path.isdir(entry.path)]
  except OSError:
    return []


def _joined(root: str, folder: str) -> list[str]:
  try:
    return [f"{folder}/{name}" for name in os.listdir(os.path.join(root, folder))]
  except OSError:
    return []


def select(
  files: Files, *, file: str | None = None, variant: str | None = None, quantisation: str | None = None
) -> Files:
  """One of the checkpoints among some files, with the files that belong to all of them, such as the tokenizer's.

  Args:
    files: of a source, or a directory on this machine.
    file: name of a file, or a pattern of names such as "*Q8_0*": a GGUF file, a safetensors file, an index, or any part
      of a split checkpoint. A whole name may be that of any file.
    variant: as in `model.fp16.safetensors` and `model.safetensors.index.fp16.json`.
    quantisation: of a GGUF file, as a part of its name, such as "Q8_0".

  Raises:
    CheckpointError: if none or several of the checkpoints are meant; the message lists them.
    ConfigError: if there are several arguments.
  """
  given = {"file": file, "variant": variant, "quantisation": quantisation}
  asked = {what: text for what, text in given.items() if text is not None}
  if not asked:
    return files
  if len(asked) > 1:
    said = " and ".join(f"{what} {text!r}" for what, text in asked.items())
    raise ConfigError(f"{said} both choose the weights: give one of them")
  units = _units(files)
  if variant is not None:
    found = _of_variant(units, variant)
  elif quantisation is not None:
    found = _of_quantisation(units, quantisation)
  else:
    assert file is not None
    name = posixpath.normpath(file)
    found = _of_file(units, name)
    if not found and name in files.names():
      return show(files, [name], file=name)
  if len(found) > 1:
    found = [unit for unit in found if not is_projector(unit)] or found
  if len(found) != 1:
    ((what, text),) = asked.items()
    which = f"names several: choose one of {listed(found)}"
    which = which if found else f"names none: there are {listed(units)}" if units else "names none"
    raise CheckpointError(files.path, [f"of its checkpoints, {what} {text!r} {which}"])
  (unit,) = found
  own = {unit, *units[unit]} & set(files.names())
  others = {name for members in units.values() for name in members}.union(units)
  shown = own.union(name for name in files.names() if name not in others)
  return show(files, shown, file=unit if unit.endswith(".gguf") else "")


def _of_variant(units: Mapping[str, Collection[str]], variant: str) -> list[str]:
  """The whole file of a variant, else its index: the order of transformers."""
  names = (f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json")
  return [name for name in names if name in units][:1]


def _of_quantisation(units: Mapping[str, Collection[str]], quantisation: str) -> list[str]:
  whole = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quantisation)}(?![A-Za-z0-9_])", re.IGNORECASE)
  return [unit for unit in units if unit.endswith(".gguf") and whole.search(unit.removesuffix(".gguf"))]


def _of_file(units: Mapping[str, Collection[str]], name: str) -> list[str]:
  """The checkpoints of a name: the one that has it, else the one with a file of it, else all with a file it fits."""
  if name in units:
    return [name]
  if holding := [unit for unit, members in units.items() if name in members]:
    return holding
  low = name.lower()

  def fits(candidate: str) -> bool:
    return any(fnmatch.fnmatchcase(n.lower(), low) for n in (candidate, candidate.rpartition("/")[2]))

  return [unit for unit, members in units.items() if any(map(fits, [unit, *members]))]


def is_part(name: str) -> bool:
  """Whether a file's name is that of a part of a checkpoint, whose other files lie beside it.

  A GGUF file that is not split is a checkpoint of its own.
  """
  is_split = PART_NAME.fullmatch(name) is not None
  return is_split or name.endswith(".safetensors") or INDEX_NAME.fullmatch(name) is not None


def is_projector(name: str) -> bool:
  """Whether a GGUF file's name is that of the projector of a vision tower, which lies beside the language model."""
  return "mmproj" in name.rpartition("/")[2].lower()


def _units(files: Files) -> dict[str, set[str]]:
  """The checkpoints among some files: the name of each, and those of its files.

  A checkpoint is an index with the files that it lists, a split file with all parts, or a single file.
  """
  names = files.names()
  units = {name: indexed(files, name) for name in names if INDEX_NAME.fullmatch(name)}
  taken = {name for members in units.values() for name in members}
  left = [name for name in names if name.endswith((".gguf", ".safetensors")) and name not in taken]
  for group in split_groups(left):
    units[group[0]] = set(group)
  return units


def indexed(files: Files, index: str) -> set[str]:
  """Names of the files that an index lists and that are there; all safetensors files if it cannot be read."""
  names = set(files.names())
  try:
    listed = read_json(files, index)["weight_map"].values()
    return {posixpath.normpath(name) for name in listed if isinstance(name, str)} & names
  except (ConfigError, KeyError, AttributeError, OSError):
    return {name for name in names if name.endswith(".safetensors") and "/" not in name}


def split_groups(names: Iterable[str]) -> list[list[str]]:
  """Groups of names: the parts of each split file, in their order, and each other name alone."""
  groups: dict[object, list[str]] = {}
  for name in sorted(names):
    part = PART_NAME.fullmatch(name)
    groups.setdefault((part["stem"], part["count"], part["suffix"]) if part else name, []).append(name)
  return list(groups.values())


def listed(names: Iterable[str]) -> str:
  """Names in a message: the first ones, sorted, and the number of the others."""
  shown = sorted(names)
  return ", ".join(shown[:_MOST]) + (f" and {len(shown) - _MOST} more" if len(shown) > _MOST else "")
