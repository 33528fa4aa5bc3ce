"""Which files make up a safetensors checkpoint: one file, those of an index, or all of a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
from collections.abc import Collection, Mapping, Sequence

from models_core.errors import CheckpointError, ConfigError
from models_core.formats.files import Files, dead_entries, has_file
from models_core.formats.json_files import read_json
from models_core.formats.kinds import is_safetensors, named
from models_core.formats.left_out import some
from models_core.formats.selection import INDEX_NAME, PART_NAME, checkpoint_folders, listed, split_groups
from models_core.formats.tensors import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUFFIX = ".safetensors"
# In bytes, of an index.
_MAX_INDEX = 16 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Pickles of a training run, which hold no weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# Beginnings of names of files that are never the model, if there are others.
_BESIDE = ("adapter_model", "consolidated")


@dataclasses.dataclass(frozen=True)
class Chosen:
  """The files that make up a checkpoint.

  Attributes:
    names: of the files to read.
    index: name of the index that lists them; None if there is none.
    places: the index: tensor -> file.
    problems: on files that are missing, one sentence for each cause.
    unread: names of these files, with the tensors that they should hold.
    notes: on an index that is not used.
  """

  names: Sequence[str]
  index: str | None = None
  places: Mapping[str, str] = dataclasses.field(default_factory=dict)
  problems: Sequence[str] = ()
  unread: Mapping[str, frozenset[str] | None] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()

  def expected(self, file: str) -> frozenset[str] | None:
    """The tensors that a file should hold; None if nothing tells."""
    return None if self.index is None else frozenset(t for t, f in self.places.items() if f == file)


def choose_files(files: Files) -> Chosen:
  """Chooses the files of the checkpoint.

  Raises:
    CheckpointError: if there is no safetensors file.
  """
  names, dead = set(files.names()), dead_entries(files)
  indexes = _indexes({*names, *dead})
  if SINGLE in names:
    return Chosen([SINGLE], notes=_outvoted(files, indexes[0], names) if indexes else ())
  if len(indexes) > 1:
    choice = f"choose one with file=, such as file={indexes[0]!r}"
    raise CheckpointError(files.path, [f"it holds several indexes ({listed(indexes)}): {choice}"])
  if indexes:
    return _of_index(files, indexes[0], dead)
  found = named(files, SUFFIX, is_safetensors)
  others = [name for name in found if not name.startswith(_BESIDE)]
  if wanted := others or found:
    missing = [name for group in split_groups(wanted) for name in _missing_parts(group)]
    problems = (
      [f"{some(missing)} {are(missing)} missing: the download or copy is incomplete"] if missing else []
    )
    return Chosen(wanted, problems=problems, unread=dict.fromkeys(missing))
  if gone := [name for name in sorted(dead) if is_safetensors_name(name)]:
    return Chosen(
      [], problems=[f"{name} {dead[name]}: download it again" for name in gone], unread=dict.fromkeys(gone)
    )
  raise CheckpointError(files.path, [_nothing_found(files, names)])


def _indexes(names: Collection[str]) -> list[str]:
  """The usual index; without it, all of a model's variants, or else all."""
  found = sorted(name for name in names if INDEX_NAME.fullmatch(name))
  variants = [name for name in found if name.startswith(f"{SINGLE}.")]
  return [INDEX] if INDEX in found else variants or found


def _outvoted(files: Files, index: str, names: set[str]) -> list[str]:
  """A note on an index beside `model.safetensors`, unless it lists that file."""
  places: set[str] = set()
  if index in names:
    with contextlib.suppress(CheckpointError):
      places = set(_read_index(files, index).values())
  if places == {SINGLE}:
    return []
  return [
    f"{SINGLE} is loaded, as in transformers, and {index} is not read; file={index!r} chooses the files that it lists"
  ]


def _of_index(files: Files, index: str, dead: Mapping[str, str]) -> Chosen:
  """The files that an index lists."""
  if index in dead:
    problem = f"{index} {dead[index]}: download it again, or remove it to load all safetensors files"
    return Chosen([], index, problems=[problem], unread={index: None})
  try:
    places = _read_index(files, index)
  except CheckpointError as error:
    return Chosen([], index, problems=error.problems, unread={index: None})
  wanted = sorted(set(places.values()))
  absent = [name for name in wanted if not has_file(files, name)]
  lost = [name for name in absent if name not in dead]
  problems = [f"{name} {dead[name]}: download it again" for name in absent if name in dead]
  if lost:
    remedy = "the download or copy is incomplete"
    if len(absent) == len(wanted) and (here := sorted(filter(is_safetensors_name, files.names()))):
      remedy = f"remove the index to load {some(here)} instead"
    problems.append(f"{some(lost)} {are(lost)} missing, but {index} lists {them(lost)}: {remedy}")
  chosen = Chosen([name for name in wanted if name not in absent], index, places, problems)
  return dataclasses.replace(chosen, unread={name: chosen.expected(name) for name in absent})


def _missing_parts(group: Sequence[str]) -> list[str]:
  """Names of the parts that a split file lacks."""
  part = PART_NAME.fullmatch(group[0])
  count = int(part["count"]) if part else 0
  # A name may claim 99999 parts: only as many as are there, and one more, are looked for.
  numbers = range(1, min(count, len(group) + 1) + 1)
  all_parts = [f"{part['stem']}-{n:05}-of-{count:05}.safetensors" for n in numbers] if part else []
  return [name for name in all_parts if name not in group]


def contradictions(
  chosen: Chosen, tensors: Mapping[str, TensorInfo], unread: Mapping[str, object]
) -> list[str]:
  """Notes on where an index and the headers differ, in which case the headers count."""
  held = {name: file for name, file in chosen.places.items() if file not in unread}
  absent = [name for name in held if name not in tensors]
  moved = [name for name, file in held.items() if name in tensors and tensors[name].file != file]
  unlisted = [name for name in tensors if name not in chosen.places] if chosen.index else []
  notes = []
  if absent:
    notes.append(f"{chosen.index} lists {some(absent)}, which no file holds")
  if moved:
    notes.append(
      f"{chosen.index} puts {some(moved)} into another file than holds {them(moved)}: the headers count"
    )
  if unlisted:
    notes.append(f"{chosen.index} does not list {some(unlisted)}, which the files hold: the headers count")
  return notes


def _nothing_found(files: Files, names: set[str]) -> str:
  if "adapter_config.json" in names:
    return "this is a LoRA adapter, not a model: load its base model, then merge the adapter into it"
  if pickles := sorted(n for n in names if n.endswith(_PICKLES) and n not in _NO_WEIGHTS and "/" not in n):
    return (
      f"the weights are pickled ({some(pickles)}), and pickles are never loaded: convert them to safetensors, for "
      "example with transformers: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
    )
  if folders := checkpoint_folders(files):
    return (
      f"there are no weights at the top level, but in the folders {listed(folders)}: choose one with subfolder="
      if len(folders) > 1
      else f"there are no weights at the top level, but in a folder: choose it with subfolder={folders[0]!r}"
    )
  return "no safetensors file" + (
    f" among {', '.join(sorted(names)[:8])}" if names else ": the directory is empty"
  )


def _read_index(files: Files, index: str) -> Mapping[str, str]:
  """Reads an index: tensor -> file.

  Raises:
    CheckpointError: if it cannot be used.
  """
  try:
    if (size := files.size(index)) > _MAX_INDEX:
      raise ValueError(f"it has {size} bytes, but at most {_MAX_INDEX} are read")
    weight_map = read_json(files, index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
      raise ValueError("it has no weight_map")
    paths: dict[str, str] = {}
    for file in weight_map.values():
      if isinstance(file, str) and file in paths:
        continue
      if not isinstance(file, str) or not is_inside(file):
        raise ValueError(f"it lists {file!r}, which is not a file name within the directory")
      paths[file] = posixpath.normpath(file)
    return {tensor: paths[file] for tensor, file in weight_map.items()}
  except ConfigError as error:
    raise CheckpointError(files.path, [str(error)]) from None
  except (ValueError, OSError) as error:
    raise CheckpointError(files.path, [f"{index} cannot be read: {error}"]) from None


def is_inside(name: str) -> bool:
  """Whether a file name is relative and stays within its directory."""
  plain = posixpath.normpath(name)
  return (
    bool(name)
    and not name.startswith("/")
    and "\\" not in name
    and "\0" not in name
    and not plain.startswith("..")
  )


def is_safetensors_name(name: str) -> bool:
  """Whether a file of this name is a safetensors file."""
  return name.endswith(SUFFIX)


def are(names: Sequence[str]) -> str:
  """The verb for some names."""
  return "is" if len(names) == 1 else "are"


def them(names: Sequence[str]) -> str:
  """The pronoun for some names."""
  return "it" if len(names) == 1 else "them"
