"""Orbax trees, read in place: names, shapes and cells from their metadata, numbers box by box.

A tree consists of zarr arrays, in one OCDBT database (`manifest.ocdbt`) or, as older versions of Orbax wrote it, in one
directory for each array. `_METADATA`, or the older msgpack file `checkpoint`, lists the arrays. TensorStore reads them;
Orbax itself would restore whole arrays. Large cells that are uncompressed or compressed with zstd are decoded straight
into the shards (`models_core.formats.orbax_cells`).

Tensors have the names of Google's Gemma trees, such as `transformer/layer_0/attn/q_einsum.w`: dots join the keys of
the tree, and a slash is part of a key. Two other kinds of trees get the same names:

- If parameters are wrapped, as in `{"params": ..., "step": ...}`, also twice, the prefix `params.` is dropped.
- If layers are stacked, `transformer/stacked_layers/attention_type_1/...` is an array of all layers at position 1 of
  the cycle of attention types. In a cycle of 2, its index 3 along the first axis is layer 3 * 2 + 1 = 7.
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
from models_core.formats.files import Files, LocalFiles, has_file
from models_core.formats.json_files import read_json
from models_core.formats.orbax_cells import CellStream, KeyValues, cell_key, is_stream
from models_core.formats.orbax_trees import (
  AGGREGATE,
  DATABASE,
  METADATA,
  UNFINISHED,
  find_tree,
  is_map,
)
from models_core.formats.reader import OnBytes
from models_core.formats.tensors import Index, TensorInfo, cells_of
from models_core.threads import THREADS

# Bytes to read at a time: enough to outweigh the cost of a request, but few enough for a core's cache.
_CHUNK = 4 << 20
# Bytes of a cell to decode at a time: together with a copy of them they fit in a core's own cache.
_RUN = 512 << 10
# In bytes: larger cells are decoded straight into the destination buffer; for smaller ones TensorStore is faster.
_LARGE = 16 << 20
# Bytes of decoded cells that are kept for further reads of the same cells, in addition to the largest cell.
_CACHE = 48 << 20

# Names, as patterns, of what Orbax writes beside the arrays, and of the parts of an OCDBT database.
_ACCOUNTS = ("_sharding", "_CHECKPOINT_METADATA", "array_metadatas", "commit_success.txt")
_DATABASE_PARTS = ("d", "ocdbt.process_*")

# Name of the file that describes an array -> TensorStore's driver for the array.
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
# How `checkpoint` marks an array that is stored beside it.
_BESIDE = ("PLACEHOLDER://", "AGGREGATED://")
# How `_METADATA` marks leaves that are not arrays.
_EMPTY = frozenset({"None", "Dict", "List", "Tuple", "NamedTuple"})
_STACKED = re.compile(r"(?P<head>.*?)stacked_layers/attention_type_(?P<position>\d+)(?P<tail>/.*)")
_WRAPPING = re.compile(r"(params\.)+")


def tree_entries(directory: str) -> set[str]:
  """Names of the files and folders in a directory that belong to its Orbax tree; none if it is not a tree."""
  names = set(os.listdir(directory))
  own = names & {DATABASE, METADATA}
  if AGGREGATE in names and is_map(LocalFiles(directory), AGGREGATE):
    own.add(AGGREGATE)
  if own:
    patterns = _ACCOUNTS + (_DATABASE_PARTS if DATABASE in own else ())
    own |= {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    own |= {name for name in names if any(os.path.isfile(os.path.join(directory, name, m)) for m in _DRIVERS)}
  return own


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrbaxCheckpoint(Checkpoint):
  """A checkpoint that is an Orbax tree.

  Attributes:
    store: that holds the arrays.
    places: where each tensor is in the arrays, by the tensor's name.
    drivers: TensorStore's driver for each array, by the array's name.
    keys: all keys of the store.
  """

  store: _Store = dataclasses.field(repr=False)
  places: Mapping[str, _Place] = dataclasses.field(repr=False)
  drivers: Mapping[str, str] = dataclasses.field(repr=False)
  keys: frozenset[str] = dataclasses.field(repr=False)

  @property
  def format(self) -> Format:
    """The Orbax format."""
    return ORBAX

  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> OrbaxReader:
    """Opens a reader of all tensors. `names` has no effect: TensorStore opens the files that it needs.

    Raises:
      CheckpointError: if an array cannot be opened, or has changed since its metadata was read.
    """
    largest = max(map(_cell_bytes, self.tensors.values()), default=0)
    arrays = self.store.open(self.drivers, _CACHE + largest)
    return OrbaxReader(self, arrays, on_bytes)


def read_orbax(files: Files) -> OrbaxCheckpoint:
  """Reads the metadata of the Orbax tree among some files, which `find_tree` finds.

  Files whose `path` is an address, such as `gs://bucket/tree`, are read in place; all others are fetched first.

  Raises:
    CheckpointError: if there is no tree, several trees, or one that cannot be read.
    MissingExtraError: if TensorStore is not installed.
  """
  tree = find_tree(files)
  if tree is None:
    raise CheckpointError(
      files.path,
      [f"no Orbax checkpoint: there is no {DATABASE}, no {METADATA} and no {AGGREGATE} file of Orbax"],
    )
  folder = tree.folder
  own = tuple(name for name in files.names() if name.startswith(folder))
  stays = "://" in files.path
  root = files.path if stays else files.fetch(own)
  where = f"{root.rstrip('/')}/{folder}".rstrip("/")
  if UNFINISHED in where:
    raise CheckpointError(where, ["saving this checkpoint was never finished: use another one"])
  structure = _Structure.read(files, folder)
  store = _Store(where, is_database=has_file(files, folder + DATABASE))
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
      problems.append(
        f"{name} occurs twice: the arrays {places[name].array} and {place.array} both hold it; remove one"
      )
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
    notes=tree.notes,
    shared_files=() if stays else own,
    store=store,
    places=places,
    drivers=drivers,
    keys=frozenset(keys),
  )


@dataclasses.dataclass(frozen=True)
class _Structure:
  """The arrays that a tree should have, as `_METADATA` or `checkpoint` lists them.

  Attributes:
    file: name of the file that lists them; "" if there is none.
    arrays: names of the arrays that should be stored beside the file.
    inline: names of the arrays that are stored inside the file.
  """

  file: str
  arrays: frozenset[str]
  inline: frozenset[str] = frozenset()

  @classmethod
  def read(cls, files: Files, folder: str) -> _Structure:
    """Reads the list of the tree in a folder; without a list, the result is empty."""
    if has_file(files, name := folder + METADATA):
      return cls(METADATA, _listed(files, name))
    if has_file(files, name := folder + AGGREGATE):
      return cls(AGGREGATE, *_aggregated(files, name))
    return cls("", frozenset())

  def problems(self, arrays: Mapping[str, Any]) -> list[str]:
    """Problems of listed arrays that are missing or stored inside the file."""
    missing = sorted(self.arrays - arrays.keys())
    return [
      f"{name} is missing, but {self.file} lists it: copy or download the checkpoint again"
      for name in missing
    ] + [
      f"{name} is stored inside the file {self.file}, which is not supported: save the checkpoint with a newer Orbax"
      for name in sorted(self.inline)
    ]


def _listed(files: Files, name: str) -> frozenset[str]:
  """Names of the arrays that a `_METADATA` file lists."""
  where = f"{files.path}/{name}"
  try:
    tree = read_json(files, name)["tree_metadata"]
    return frozenset(
      ".".join(map(str, ast.literal_eval(key)))
      for key, entry in tree.items()
      if entry["value_metadata"]["value_type"] not in _EMPTY
    )
  except (ValueError, SyntaxError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise CheckpointError(
      where, [f"the file is not the metadata of an Orbax checkpoint: {error!r}"]
    ) from None


def _aggregated(files: Files, name: str) -> tuple[frozenset[str], frozenset[str]]:
  """Names of the arrays that are stored beside a `checkpoint` file, and of those that are stored inside it."""
  where = f"{files.path}/{name}"
  msgpack = require("msgpack", "models-core[orbax]", "Reading an Orbax checkpoint")
  try:
    tree = msgpack.unpackb(files.read(name, 0, files.size(name)), raw=False, strict_map_key=False)
    leaves = dict(_leaves(tree))
  except (ValueError, AttributeError, RecursionError) as error:
    raise CheckpointError(
      where, [f"the file is not the msgpack map of an Orbax checkpoint: {error!r}"]
    ) from None
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
  """The keys and values of a tree, as TensorStore reads them.

  Attributes:
    where: directory or address of the tree.
    is_database: whether the arrays are in an OCDBT database, not in a directory each.
  """

  where: str
  is_database: bool

  def _at(self, path: str) -> Any:
    """TensorStore's specification of the keys below a path."""
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
    """Opens arrays.

    Args:
      drivers: TensorStore's driver for each array, by the array's name.
      cache: size of the cache of decoded cells that the arrays share, in bytes.

    Returns:
      TensorStore's arrays, by name.

    Raises:
      CheckpointError: if an array cannot be opened.
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
    """Opens the values for reads by key."""
    ts = _tensorstore()
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    with self.errors():
      kvstore = ts.KvStore.open(self._at(""), context=context).result()
    return KeyValues(kvstore, is_local="://" not in self.where)

  @contextlib.contextmanager
  def errors(self, what: str = "the checkpoint ") -> Iterator[None]:
    """Turns errors of TensorStore into a CheckpointError, which says that `what` cannot be read."""
    try:
      yield
    except (ValueError, OSError, RuntimeError) as error:
      # What follows in TensorStore's message is its specification, which tells a user nothing.
      problem = str(error).partition(" [tensorstore_spec=")[0]
      raise CheckpointError(self.where, [f"{what}cannot be read: {problem}"]) from None


def _tensorstore() -> Any:
  return require("tensorstore", "models-core[orbax]", "Reading an Orbax checkpoint")


def _drivers(keys: Sequence[str]) -> dict[str, str]:
  """TensorStore's driver for each array, by the array's name."""
  split = (key.rpartition("/") for key in keys)
  return {name: _DRIVERS[last] for name, _, last in sorted(split) if name and last in _DRIVERS}


def _missing_cells(arrays: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
  """Problems of arrays that lack files. TensorStore would read missing cells as zeros."""
  held = collections.Counter()  # type: ignore[var-annotated]
  for key in keys:
    for name in _prefixes(key):
      held[name] += 1
  problems = []
  for name, array in arrays.items():
    cells = math.prod(-(-size // cell) for size, cell in zip(array.shape, _cell(array), strict=True))
    if missing := cells + 1 - held[name]:
      problems.append(
        f"{name} is incomplete ({missing} of {cells} files are missing): copy or download it again"
      )
  return problems


def _prefixes(key: str) -> Iterator[str]:
  """Yields the folders above a key: `a` and `a/b` for `a/b/c`."""
  for place, letter in enumerate(key):
    if letter == "/":
      yield key[:place]


def _cell_bytes(info: TensorInfo) -> int:
  return math.prod(info.cell or ()) * info.dtype.itemsize


def _cell(array: Any) -> tuple[int, ...]:
  return tuple(array.chunk_layout.read_chunk.shape or ())


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tensor is stored.

  Attributes:
    array: name of the array.
    layer: index of the tensor along the array's first axis, if the array stacks layers; None if it holds one tensor.
  """

  array: str
  layer: int | None = None


def _places(arrays: Mapping[str, Any]) -> Iterator[tuple[str, _Place]]:
  """Yields the name and the place of each tensor that the arrays hold."""
  found = {name: _STACKED.fullmatch(name) for name in arrays}
  cycle = max((int(match["position"]) + 1 for match in found.values() if match), default=0)
  for name, match in found.items():
    if match is None:
      yield _unwrapped(name), _Place(name)
      continue
    for layer in range(arrays[name].shape[0]):
      tensor = f"{match['head']}layer_{layer * cycle + int(match['position'])}{match['tail']}"
      yield _unwrapped(tensor), _Place(name, layer)


def _unwrapped(name: str) -> str:
  wrapping = _WRAPPING.match(name)
  return name[wrapping.end() :] if wrapping else name


@final
class OrbaxReader:
  """Reads the tensors of an Orbax tree, in any number of threads at once.

  Args:
    checkpoint: the tree, as its metadata describes it.
    arrays: the store's open arrays, by name.
    on_bytes: called with the number of bytes that were just read.

  Raises:
    CheckpointError: if an array has changed since its metadata was read.
  """

  chunk = _CHUNK
  run = _RUN
  threads = THREADS
  # Arrays are stored in cells, so their elements are not contiguous.
  runs = None

  def __init__(self, checkpoint: OrbaxCheckpoint, arrays: Mapping[str, Any], on_bytes: OnBytes):
    self.where = checkpoint.store.where
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
          self._store.where,
          [f"{info.name} has changed since its metadata was read: load the checkpoint again"],
        )

  @property
  def cells(self) -> OrbaxReader:
    """The reader itself: arrays are stored in cells."""
    return self

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """Reads one box of a tensor into new memory."""
    place = self._places[info.name]
    whole = index if place.layer is None else (place.layer, *index)
    with self._store.errors(f"{info.name} "):
      data = self._arrays[place.array][whole].read().result()
    self._on_bytes(data.nbytes)
    return data

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """Yields all elements of a tensor, cell by cell."""
    for index in cells_of(info.shape, info.cell or info.shape):
      yield self.read_box(info, index)

  def has_streams(self, info: TensorInfo) -> bool:
    """Whether a tensor's cells are large, hold no other tensor, and can be decoded front to back."""
    place = self._places[info.name]
    alone = place.layer is None or _cell(self._arrays[place.array])[0] == 1
    return _cell_bytes(info) > _LARGE and alone and place.array in self._metadata

  def open_cell(self, info: TensorInfo, position: tuple[int, ...]) -> CellStream:
    """Opens the cell at a position of the tensor's grid, for use by one thread."""
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

  def close(self) -> None:
    """Releases the arrays and their cache."""
    self._arrays.clear()


ORBAX = Format(
  name="orbax",
  naming="orbax",
  dialects=("tunix", "maxtext"),
  keeps_own_names=True,
  # No file name shows that a file is Orbax's: files have the names of arrays, or are parts of a database.
  owns=lambda name: False,
  is_in=lambda files: find_tree(files) is not None,
  read=read_orbax,
  entries=tree_entries,
)
