"""Which Orbax tree counts among some files: the files themselves, a folder, or the newest step of a training run.

A trainer's checkpoint manager makes a folder for each step, and in it one for each item, such as
`10/model_params` and `10/optimizer_state`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

from models_core.errors import CheckpointError
from models_core.formats.files import Files

DATABASE, METADATA, AGGREGATE = "manifest.ocdbt", "_METADATA", "checkpoint"

# Items of a step that hold no parameters of the model.
_TRAINING = frozenset({"optimizer_state", "opt_state", "optimizer"})
# A folder whose name has this part was never renamed: saving it was not finished.
UNFINISHED = ".orbax-checkpoint-tmp"
# Where folders cannot be renamed, as in an object store, Orbax puts this file into each finished step.
_FINISHED = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Tree:
  """Where an Orbax tree lies.

  Attributes:
    folder: that holds the tree, with a slash at the end, such as "2b/" or "10/model_params/"; "" for the files
      themselves.
    notes: on what is left out beside it, one sentence each.
  """

  folder: str
  notes: tuple[str, ...] = ()


def find_tree(files: Files) -> Tree | None:
  """Finds the Orbax tree among some files: at the top, in a folder, or in the newest step; None if there is none.

  Raises:
    CheckpointError: if several folders hold trees of parameters.
  """
  names = _names(files)
  folders = {
    name.removesuffix(mark)
    for name in names
    for mark in (DATABASE, METADATA, AGGREGATE)
    if _is_mark(name, mark) and (mark != AGGREGATE or is_map(files, name))
  }
  if "" in folders:
    return Tree("")
  # An unfinished save counts only if there is nothing else, and is an error then.
  folders = {folder for folder in folders if UNFINISHED not in folder} or folders
  training = {folder for folder in folders if _last(folder) in _TRAINING}
  found, notes = folders - training, []
  if training and not found:
    held = ", ".join(sorted(map(_last, training)))
    raise CheckpointError(
      files.path,
      [f"it holds the state of a training run alone ({held}): pass the path of the model's parameters"],
    )
  steps = {_top(folder) for folder in found}
  if len(steps) > 1 and all(map(_is_step, steps)):
    finished = {step for step in steps if f"{step}/{_FINISHED}" in names} or steps
    newest = max(finished, key=int)
    found = {folder for folder in found if _top(folder) == newest}
    training = {folder for folder in training if _top(folder) == newest}
    others = ", ".join(sorted(steps - {newest}, key=int))
    notes.append(f"step {newest} is loaded, not {others}: for another step, give the path of its folder")
  if not found:
    return None
  if len(found) > 1:
    listed = ", ".join(sorted(folder.rstrip("/") for folder in found))
    raise CheckpointError(
      files.path, [f"the directory holds several checkpoints ({listed}): pass the path of one"]
    )
  notes += [f"{_last(folder)} is not loaded: the state of a training run" for folder in sorted(training)]
  return Tree(found.pop(), tuple(notes))


def is_map(files: Files, name: str) -> bool:
  """Whether a file is a msgpack map, by its first byte. TensorFlow also writes a file named `checkpoint`."""
  first = files.read(name, 0, 1)
  return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def _names(files: Files) -> set[str]:
  """Names of all files that tell where a tree is. For a directory, `files.names()` may list the top level alone."""
  names = set(files.names())
  if os.path.isdir(files.path):
    tops = _folders(files.path)
    below = [f"{top}/{item}" for top in tops if _is_step(top) for item in _folders(f"{files.path}/{top}")]
    marks = _joined([*tops, *below], (DATABASE, METADATA, AGGREGATE, _FINISHED))
    names.update(mark for mark in marks if os.path.isfile(os.path.join(files.path, mark)))
  return names


def _folders(directory: str) -> list[str]:
  return [entry.name for entry in os.scandir(directory) if os.path.isdir(entry.path)]


def _joined(folders: Iterable[str], names: Iterable[str]) -> Iterator[str]:
  return (f"{folder}/{name}" for folder in folders for name in names)


def _is_mark(name: str, mark: str) -> bool:
  """Whether a file marks a tree: at the top, in a folder, or in a folder of a step."""
  *folders, last = name.split("/")
  # A folder `ocdbt.process_*` holds one process's part of a tree, not a tree.
  own = not any(folder.startswith("ocdbt.process_") for folder in folders)
  return last == mark and own and (len(folders) < 2 or (len(folders) == 2 and _is_step(folders[0])))


def _is_step(folder: str) -> bool:
  return folder.isascii() and folder.isdigit()


def _top(folder: str) -> str:
  return folder.partition("/")[0]


def _last(folder: str) -> str:
  return folder.rstrip("/").rpartition("/")[2]
