"""Orbax trees, read where they lie: names, shapes and cells from their metadata, numbers box by box.

A tree is a store of zarr arrays: one database (OCDBT, `manifest.ocdbt`), or, as older versions wrote it, a directory
for each array. Its structure is in `_METADATA`, or in the older msgpack file `checkpoint`. The arrays are read by
TensorStore, not by Orbax, which would restore them whole; cells that are plain or compressed by zstd are decoded
straight into the shards (`models_core.formats.orbax_cells`).

Names are those of Google's Gemma trees, `transformer/layer_0/attn/q_einsum.w`: keys joined by dots, a slash being part
of a key. A tree that wraps them (`{"params": ..., "step": ...}`) is read as if it did not, and so is one that stacks
its layers (`transformer/stacked_layers/attention_type_1/...`: in a cycle of attention types, each has an array).
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import fnmatch
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from models_core.errors import CheckpointError
from models_core.extras import require
from models_core.formats.checkpoint import Checkpoint, Format
from models_core.formats.files import Files, LocalFiles
from models_core.formats.json_files import read_json
from models_core.formats.orbax_cells import CellStream, KeyValues, cell_key, is_stream
from models_core.formats.reader import OnBytes
from models_core.formats.tensors import Index, TensorInfo, cells_of
from models_core.threads import THREADS

DATABASE, METADATA, AGGREGATE = "manifest.ocdbt", "_METADATA", "checkpoint"

# Bytes of a read: much more than a request costs, and little enough for a core's cache.
_CHUNK = 4 << 20
# Bytes of a cell that are decoded at a time: they and their copy stay in a core's own cache.
_RUN = 512 << 10
# Cells of more bytes are decoded where they shall lie; smaller ones faster by TensorStore, into memory of their own.
_LARGE = 16 << 20
# Cells that several reads share wait for the next one: so many bytes, and one of the largest besides.
_CACHE = 48 << 20

# What Orbax writes beside the arrays, and what makes up a database.
_ACCOUNTS = ("_sharding", "_CHECKPOINT_METADATA", "array_metadatas", "commit_success.txt")
_DATABASE_PARTS = ("d", "ocdbt.process_*")

# What describes an array, and TensorStore's driver for it.
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
# How `checkpoint` marks an array that lies beside it.
_BESIDE = ("PLACEHOLDER://", "AGGREGATED://")
# How `_METADATA` marks leaves that are no arrays.
_EMPTY = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
_STACKED = re.compile(r"(?P<head>.*?)stacked_layers/attention_type_(?P<position>\d+)(?P<tail>/.*)")
_WRAPPING = "params."


def find_orbax(files: Files) -> str | None:
  """Where an Orbax tree lies among some files: "", or a folder's name and a slash; None where there is none.

  Raises:
    CheckpointError: for several trees.
  """
  names = set(files.names())
  if os.path.isdir(files.path):
    # Files of a directory may list its top level alone.
    folders = sorted(entry.name for entry in os.scandir(files.path) if entry.is_dir())
    marks = [f"{folder}/{mark}" for folder in folders for mark in (DATABASE, METADATA, AGGREGATE)]
    names.update(mark for mark in marks if os.path.isfile(os.path.join(files.path, mark)))
  found = {
    name.removesuffix(mark)
    for name in names
    for mark in (DATABASE, METADATA, AGGREGATE)
    if _is_mark(name, mark) and (mark != AGGREGATE or _is_map(files, name))
  }
  if not found or "" in found:
    return "" if found else None
  if len(found) > 1:
    listed = ", ".join(sorted(folder.rstrip("/") for folder in found))
    raise CheckpointError(files.path, [f"several checkpoints lie here ({listed}): pass the path of one"])
  return found.pop()


def _is_mark(name: str, mark: str) -> bool:
  folder, _, last = name.rpartition("/")
  # A process's own database is a part of a tree.
  return last == mark and "/" not in folder and not folder.startswith("ocdbt.process_")


def _is_map(files: Files, name: str) -> bool:
  """Whether a file is a msgpack map: TensorFlow, too, calls a file `checkpoint`."""
  first = files.read(name, 0, 1)
  return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def tree_entries(directory: str) -> set[str]:
  """Names of the files and folders of a directory that belong to a tree that lies in it; none where there is no tree."""
  names = set(os.listdir(directory))
  own = names & {DATABASE, METADATA}
  if AGGREGATE in names and _is_map(LocalFiles(directory), AGGREGATE):
    own.add(AGGREGATE)
  if own:
    patterns = _ACCOUNTS + (_DATABASE_PARTS if DATABASE in own else ())
    own |= {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    own |= {name for name in names if any(os.path.isfile(os.path.join(directory, name, m)) for m in _DRIVERS)}
  return own


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrbaxCheckpoint(Checkpoint):
  """The arrays of an Orbax tree.

  Attributes:
    store: that holds the arrays.
    places: of the tensors in it, by name.
    drivers: TensorStore's, by the array's name.
    keys: of the store's values.
  """

  store: _Store = dataclasses.field(repr=False)
  places: Mapping[str, _Place] = dataclasses.field(repr=False)
  drivers: Mapping[str, str] = dataclasses.field(repr=False)
  keys: frozenset[str] = dataclasses.field(repr=False)

  @property
  def format(self) -> Format:
    """ORBAX."""
    return ORBAX

  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> OrbaxReader:
    """A reader of all arrays, whatever files are named: the store finds its own."""
    largest = max(map(_cell_bytes, self.tensors.values()), default=0)
    arrays = self.store.open(self.drivers, _CACHE + largest)
    return OrbaxReader(self, arrays, on_bytes)


def read_orbax(files: Files) -> OrbaxCheckpoint:
  """The tensors of an Orbax tree, which lies in a directory, or in a folder of it.

  Files whose `path` is an address, such as `gs://bucket/tree`, are read where they lie, all others are fetched first.

  Raises:
    CheckpointError: if there is no tree, or none that can be read.
    MissingExtraError: if TensorStore is not installed.
  """
  folder = find_orbax(files)
  if folder is None:
    raise CheckpointError(files.path, [f"no Orbax checkpoint: neither {DATABASE} nor {METADATA} is here"])
  own = tuple(name for name in files.names() if name.startswith(folder))
  stays = "://" in files.path
  root = files.path if stays else files.fetch(own)
  where = f"{root.rstrip('/')}/{folder}".rstrip("/")
  if ".orbax-checkpoint-tmp" in where:
    raise CheckpointError(where, ["its save was never finished: use another checkpoint"])
  structure = _Structure.read(files, folder)
  store = _Store(where, is_database=_has(files, folder + DATABASE))
  keys = store.keys()
  drivers = _drivers(keys)
  arrays = store.open(drivers, _CACHE)
  problems = structure.problems(arrays)
  if not store.is_database:
    problems += _missing_cells(arrays, keys)
  tensors: dict[str, TensorInfo] = {}
  places: dict[str, _Place] = {}
  for name, place in _places(arrays):
    if name in places:
      problems.append(f"{name} is doubled: the tree holds it as {places[name].array} and as {place.array}")
    array, stacked = arrays[place.array], place.layer is not None
    shape, cell = tuple(array.shape)[stacked:], _cell(array)[stacked:]
    dtype = np.dtype(array.dtype.numpy_dtype)
    tensors[name] = TensorInfo(
      name, dtype, shape, f"{folder}{DATABASE if store.is_database else place.array}", 0,
      math.prod(shape) * dtype.itemsize, cell=cell,
    )  # fmt: skip
    places[name] = place
  return OrbaxCheckpoint(
    files,
    tensors,
    problems=tuple(problems),
    shared_files=() if stays else own,
    store=store,
    places=places,
    drivers=drivers,
    keys=frozenset(keys),
  )


def _has(files: Files, name: str) -> bool:
  return name in files.names() or os.path.isfile(os.path.join(files.path, name))


@dataclasses.dataclass(frozen=True)
class _Structure:
  """What a tree's own account of it says.

  Attributes:
    file: that holds the account.
    arrays: names of all arrays.
    inline: names of those that lie within the file itself.
  """

  file: str
  arrays: frozenset[str]
  inline: frozenset[str] = frozenset()

  @classmethod
  def read(cls, files: Files, folder: str) -> _Structure:
    """The account of the tree in that folder, an empty one where the tree has none."""
    if _has(files, name := folder + METADATA):
      return cls(METADATA, _listed(files, name))
    if _has(files, name := folder + AGGREGATE):
      return cls(AGGREGATE, *_aggregated(files, name))
    return cls("", frozenset())

  def problems(self, arrays: Mapping[str, Any]) -> list[str]:
    """Where the account differs from what is there."""
    missing = sorted(self.arrays - arrays.keys())
    return [f"{name} is missing: {self.file} lists it" for name in missing] + [
      f"{name} is a part of the file {self.file} instead of lying beside it: save the tree with a newer Orbax"
      for name in sorted(self.inline)
    ]


def _listed(files: Files, name: str) -> frozenset[str]:
  """Names of the arrays that a `_METADATA` lists."""
  where = f"{files.path}/{name}"
  try:
    tree = read_json(files, name)["tree_metadata"]
    return frozenset(
      ".".join(map(str, ast.literal_eval(key)))
      for key, entry in tree.items()
      if entry["value_metadata"]["value_type"] not in _EMPTY
    )
  except (ValueError, SyntaxError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise CheckpointError(where, [f"it is no list of a tree's arrays: {error!r}"]) from None


def _aggregated(files: Files, name: str) -> tuple[frozenset[str], frozenset[str]]:
  """Names of the arrays beside a `checkpoint` file, and of those within."""
  where = f"{files.path}/{name}"
  msgpack = require("msgpack", "models-core[orbax]", "Reading an Orbax checkpoint")
  try:
    tree = msgpack.unpackb(files.read(name, 0, files.size(name)), raw=False, strict_map_key=False)
    leaves = dict(_leaves(tree))
  except (ValueError, AttributeError, RecursionError) as error:
    raise CheckpointError(where, [f"it is no msgpack file of a tree: {error!r}"]) from None
  beside = {name for name, leaf in leaves.items() if isinstance(leaf, str) and leaf.startswith(_BESIDE)}
  inline = {name for name, leaf in leaves.items() if isinstance(leaf, msgpack.ExtType)}
  return frozenset(beside), frozenset(inline)


def _leaves(tree: Any, *path: str) -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, *path, str(key))
  else:
    yield ".".join(path), tree


@dataclasses.dataclass(frozen=True)
class _Store:
  """A tree's keys and values.

  Attributes:
    where: a directory, or the address of one.
    is_database: its arrays lie in an OCDBT database, not in directories.
  """

  where: str
  is_database: bool

  def _at(self, path: str) -> Any:
    """TensorStore's specification of what lies below a path."""
    outer = "" if self.is_database else path
    base: Any = f"{self.where}/{outer}"
    if "://" not in self.where:
      base = {"driver": "file", "path": base}
    return {"driver": "ocdbt", "base": base, "path": path} if self.is_database else base

  def keys(self) -> list[str]:
    """All keys, such as `final_norm.scale/.zarray`."""
    with self.errors():
      return [key.decode() for key in _tensorstore().KvStore.open(self._at("")).result().list().result()]

  def open(self, drivers: Mapping[str, str], cache: int) -> dict[str, Any]:
    """TensorStore's arrays by name.

    Args:
      drivers: by the array's name.
      cache: bytes of cells that all of them keep together.
    """
    ts = _tensorstore()
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache}})
    with self.errors():
      opened = {
        name: ts.open(
          {"driver": driver, "kvstore": self._at(f"{name}/")}, context=context, open=True, read=True
        )
        for name, driver in drivers.items()
      }
      return {name: array.result() for name, array in opened.items()}

  def values(self) -> KeyValues:
    """All values, by key."""
    ts = _tensorstore()
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    with self.errors():
      kvstore = ts.KvStore.open(self._at(""), context=context).result()
    return KeyValues(kvstore, is_local="://" not in self.where)

  @contextlib.contextmanager
  def errors(self, what: str = "") -> Iterator[None]:
    """Turns TensorStore's errors into a CheckpointError."""
    try:
      yield
    except (ValueError, OSError, RuntimeError) as error:
      # The rest is TensorStore's specification.
      problem = str(error).partition(" [tensorstore_spec=")[0]
      raise CheckpointError(self.where, [f"{what}cannot be read: {problem}"]) from None


def _tensorstore() -> Any:
  return require("tensorstore", "models-core[orbax]", "Reading an Orbax checkpoint")


def _drivers(keys: Sequence[str]) -> dict[str, str]:
  """TensorStore's driver for each array."""
  split = (key.rpartition("/") for key in keys)
  return {name: _DRIVERS[last] for name, _, last in sorted(split) if name and last in _DRIVERS}


def _missing_cells(arrays: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
  """Arrays that lack files. TensorStore takes what is not there for zeros."""
  held = collections.Counter()  # type: ignore[var-annotated]
  for key in keys:
    for name in _prefixes(key):
      held[name] += 1
  problems = []
  for name, array in arrays.items():
    cells = math.prod(-(-size // cell) for size, cell in zip(array.shape, _cell(array), strict=True))
    if missing := cells + 1 - held[name]:
      problems.append(
        f"{name} is incomplete: {missing} of its {cells} files are missing; copy or download it anew"
      )
  return problems


def _prefixes(key: str) -> Iterator[str]:
  """Of `a/b/c`: `a` and `a/b`."""
  for place, letter in enumerate(key):
    if letter == "/":
      yield key[:place]


def _cell_bytes(info: TensorInfo) -> int:
  return math.prod(info.cell or ()) * info.dtype.itemsize


def _cell(array: Any) -> tuple[int, ...]:
  return tuple(array.chunk_layout.read_chunk.shape or ())


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tensor lies: in an array of its own, or at a position along the first axis of one that stacks layers."""

  array: str
  layer: int | None = None


def _places(arrays: Mapping[str, Any]) -> Iterator[tuple[str, _Place]]:
  """The tensors that arrays hold."""
  wrapped = any(name.startswith(_WRAPPING) for name in arrays)
  found = {name: _STACKED.fullmatch(name) for name in arrays}
  cycle = max((int(match["position"]) + 1 for match in found.values() if match), default=0)
  for name, match in found.items():
    if match is None:
      yield name.removeprefix(_WRAPPING) if wrapped else name, _Place(name)
      continue
    for layer in range(arrays[name].shape[0]):
      tensor = f"{match['head']}layer_{layer * cycle + int(match['position'])}{match['tail']}"
      yield tensor.removeprefix(_WRAPPING) if wrapped else tensor, _Place(name, layer)


@final
class OrbaxReader:
  """The tensors of an Orbax tree, for many threads at once.

  Args:
    checkpoint: as its metadata described it.
    arrays: of its store, by name.
    on_bytes: called with the number of bytes that were read.

  Raises:
    CheckpointError: if an array is not what its metadata described.
  """

  chunk = _CHUNK
  run = _RUN
  threads = THREADS
  # The elements of an array lie in cells.
  runs = None

  def __init__(self, checkpoint: OrbaxCheckpoint, arrays: Mapping[str, Any], on_bytes: OnBytes):
    self.tensors = checkpoint.tensors
    self._store = checkpoint.store
    self._places = checkpoint.places
    self._arrays = dict(arrays)
    self._values = self._store.values()
    self._keys = checkpoint.keys
    self._on_bytes = on_bytes
    specs = {name: array.spec().to_json() for name, array in arrays.items()}
    self._metadata = {
      name: spec["metadata"] for name, spec in specs.items() if is_stream(spec["driver"], spec["metadata"])
    }
    for info in self.tensors.values():
      place = self._places[info.name]
      array = self._arrays[place.array]
      shape = tuple(array.shape)[place.layer is not None :]
      if (shape, np.dtype(array.dtype.numpy_dtype)) != (info.shape, info.dtype):
        raise CheckpointError(
          self._store.where, [f"{info.name} is not what it was described as: it changed meanwhile"]
        )

  @property
  def cells(self) -> OrbaxReader:
    """Itself: arrays are stored in cells."""
    return self

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """The elements of a tensor within an index of one slice an axis."""
    place = self._places[info.name]
    whole = index if place.layer is None else (place.layer, *index)
    with self._store.errors(f"{info.name} "):
      data = self._arrays[place.array][whole].read().result()
    self._on_bytes(data.nbytes)
    return data

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """All elements of a tensor, cell by cell."""
    for index in cells_of(info.shape, info.cell or info.shape):
      yield self.read_box(info, index)

  def has_streams(self, info: TensorInfo) -> bool:
    """Whether each cell is large, of this tensor alone, and stored so that it can be decoded front to back."""
    place = self._places[info.name]
    alone = place.layer is None or _cell(self._arrays[place.array])[0] == 1
    return _cell_bytes(info) > _LARGE and alone and place.array in self._metadata

  def open_cell(self, info: TensorInfo, position: tuple[int, ...]) -> CellStream:
    """The cell at a position of a tensor's grid, for one thread."""
    place = self._places[info.name]
    metadata = self._metadata[place.array]
    key = f"{place.array}/{cell_key(metadata, position if place.layer is None else (place.layer, *position))}"
    return CellStream(
      self._values,
      key if key in self._keys else None,
      metadata,
      _cell_bytes(info),
      functools.partial(self._store.errors, f"{info.name} "),
      self._on_bytes,
    )

  def check_equal(self, name: str, twin: str, part: int = 0, parts: int = 1) -> None:
    """Compares two tensors' numbers, or one of some parts of their rows.

    Raises:
      CheckpointError: if they differ.
    """
    a, b = self.tensors[name], self.tensors[twin]
    same = (a.shape, a.dtype) == (b.shape, b.dtype)
    rows = a.shape[0] if same else 0
    for row in range(rows * part // parts, rows * (part + 1) // parts):
      index = (slice(row, row + 1), *(slice(0, size) for size in a.shape[1:]))
      same = same and self.read_box(a, index).tobytes() == self.read_box(b, index).tobytes()
    if not same:
      raise CheckpointError(
        self._store.where, [f"{name} differs from {twin}, which it should repeat: remove {name}"]
      )

  def close(self) -> None:
    """Lets go of the arrays and of what is cached of them."""
    self._arrays.clear()


ORBAX = Format(
  name="orbax",
  naming="orbax",
  keeps_own_names=True,
  # Its files have the names of arrays and of a database, which are none of a format's own.
  owns=lambda name: False,
  is_in=lambda files: find_orbax(files) is not None,
  read=read_orbax,
  entries=tree_entries,
)
