"""Writes planned tensors into an Orbax tree, cell by cell, straight from the memory of the devices.

The tree is one OCDBT database of zarr arrays, with the metadata files that Orbax reads. Its leaves are marked as NumPy
arrays. For leaves that are marked as JAX arrays, Orbax would look for devices with the names of those that wrote them;
NumPy arrays it restores on any machine, to any sharding.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from models_core.extras import require
from models_core.formats import METADATA, Index, OnBytes, TensorInfo, TensorReader, aligned_empty, cells_of
from models_core.saving.atomic import sync_directory
from models_core.saving.directory import write_texts
from models_core.saving.host_arrays import HostArray, assemble, cast, with_arrays
from models_core.saving.plan import SavedTensor
from models_core.weights import Piece, group_axes

# Most bytes of a cell: few enough that most cells belong to one shard, and enough to keep a thread busy.
CELL = 16 << 20
# Bytes of cells that are committed together. One batch is written while the next one is collected.
_BATCH = 128 << 20

# Cells are not compressed: compressed weights are only a fifth smaller, and load half as fast.
_COMPRESSOR = None

_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
# Orbax's code for a key of a dictionary.
_DICTIONARY = 2

# The errno in an error message of TensorStore, in the spellings of its versions.
_ERRNO = re.compile(r"(?:os_error_code='|OS error )(\d+)")


def write_tree(
  directory: str,
  tensors: Sequence[SavedTensor],
  get: Callable[[str], Any],
  *,
  reader: TensorReader | None = None,
  on_total: OnBytes | None = None,
  on_bytes: OnBytes | None = None,
) -> None:
  """Writes an Orbax tree and flushes it to the disk. Only a single process may call this.

  Args:
    directory: directory to write into; it holds no tree.
    tensors: all tensors of the checkpoint. The dots in a name separate the keys of the tree.
    get: a parameter's name -> its array, in any sharding. Called when the parameter is needed.
    reader: reader of the checkpoint that tensors are copied from.
    on_total: called once with the number of bytes that will be written.
    on_bytes: called with the number of bytes of each write.

  Raises:
    MissingExtraError: if TensorStore is not installed.
    OSError: if the file system refuses.
    SaveError: if a finite value is infinite in the dtype in which it is written.
  """
  ts = require("tensorstore", "models-core[orbax]", "Writing an Orbax checkpoint")
  if on_total is not None:
    on_total(sum(tensor.nbytes for tensor in tensors))
  under_way: collections.deque[tuple[Any, int]] = collections.deque()

  def finish_first() -> None:
    commit, nbytes = under_way[0]
    commit.result()
    under_way.popleft()
    if on_bytes is not None:
      on_bytes(nbytes)

  with contextlib.ExitStack() as stack:
    # After an error the directory is removed: no write may be under way then.
    stack.callback(lambda: [commit.exception() for commit, _ in under_way])
    stack.enter_context(_system_errors())
    for batch in _commits(ts, directory, tensors, get, reader):
      under_way.append(batch)
      if len(under_way) > 1:
        finish_first()
    finish_first()
  write_texts(directory, _account([tensor.name for tensor in tensors]))
  for folder, _, _ in os.walk(directory):
    sync_directory(folder)


def _commits(
  ts: Any,
  directory: str,
  tensors: Sequence[SavedTensor],
  get: Callable[[str], Any],
  reader: TensorReader | None,
) -> Iterator[tuple[Any, int]]:
  """Writes all arrays in batches, each of them one transaction: yields its commit and its bytes."""
  arrays = _create(ts, directory, tensors)
  batch, nbytes = ts.Transaction(), 0
  for tensor, held in with_arrays(tensors, get):
    for box, data in _cells(tensor, held, reader):
      array = arrays[tensor.name].with_transaction(batch)
      array[box].write(data, can_reference_source_data_indefinitely=True).result()
      nbytes += data.nbytes
      if nbytes >= _BATCH:
        yield batch.commit_async(), nbytes
        batch, nbytes = ts.Transaction(), 0
  yield batch.commit_async(), nbytes


def _create(ts: Any, directory: str, tensors: Sequence[SavedTensor]) -> dict[str, Any]:
  """Creates the arrays, still without cells; TensorStore's handles of them, by name."""
  database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
  # Arrays that share a context share the state of the database; otherwise they would wait for one another.
  context = ts.Context()
  # As a context manager it would wait, after an error or Ctrl-C, for arrays that nobody opens any more.
  transaction = ts.Transaction()
  opened = {
    tensor.name: ts.open(
      {
        "driver": "zarr",
        "kvstore": database | {"path": f"{tensor.name}/"},
        "metadata": {"chunks": cell_shape(tensor.shape, tensor.dtype.itemsize), "compressor": _COMPRESSOR},
        # Otherwise cells of zeros would not be stored, and could not be distinguished from missing cells.
        "store_data_equal_to_fill_value": True,
      },
      create=True,
      dtype=ts.dtype(tensor.dtype),
      shape=tensor.shape,
      context=context,
      transaction=transaction,
    )
    for tensor in tensors
  }
  arrays = {name: array.result() for name, array in opened.items()}
  commit = transaction.commit_async()
  try:
    commit.result()
  finally:
    # After Ctrl-C the directory is removed: no write may be under way then.
    commit.exception()
  return arrays


def cell_shape(shape: Sequence[int], itemsize: int) -> list[int]:
  """The shape of an array's cells: contiguous elements of at most CELL bytes.

  The array is cut into a power of two of cells along an axis. Mesh axes mostly have such sizes, too, so that few cells
  belong to several shards. Example: a bfloat16 array [4096, 14336] has 112 MiB and 8 cells of [512, 14336].

  Args:
    shape: shape of the array.
    itemsize: bytes of an element.
  """
  cell = list(shape)
  for axis, size in enumerate(shape):
    row = math.prod(shape[axis + 1 :]) * itemsize
    if row * size <= CELL:
      break
    least = -(-row * size // CELL)
    cell[axis] = max(1, -(-size // (1 << (least - 1).bit_length())))
    if row <= CELL:
      break
  return [max(1, size) for size in cell]


def _cells(
  tensor: SavedTensor, held: Mapping[str, HostArray], reader: TensorReader | None
) -> Iterator[tuple[Index, np.ndarray]]:
  """The cells of a tensor, each as a box and its elements."""
  make = _maker(tensor, held, reader)
  cell = cell_shape(tensor.shape, tensor.dtype.itemsize)
  for box in cells_of(tensor.shape, cell):
    yield box, make(box)


def _maker(
  tensor: SavedTensor, held: Mapping[str, HostArray], reader: TensorReader | None
) -> Callable[[Index], np.ndarray]:
  """A function that returns the elements within a box of a tensor."""
  if (copied := tensor.copied) is not None:
    assert reader is not None
    return lambda box: _copied(reader, copied, box)
  sources = [(held[name], piece) for name, piece in tensor.parts]
  for host, _ in sources:
    host.fetch()
  if all(_is_plain(piece) for _, piece in sources):
    return lambda box: _part(tensor, sources, box)
  whole = assemble(tensor, sources, None).reshape(tensor.shape)
  return whole.__getitem__


def _copied(reader: TensorReader, info: TensorInfo, box: Index) -> np.ndarray:
  # A copy: the reader's next call overwrites its result.
  return np.array(reader.read_box(info, box))


def _is_plain(piece: Piece) -> bool:
  """Whether a piece only permutes and joins axes and selects positions: it converts no numbers and stacks no axes."""
  return (
    piece.conversion is None
    and piece.split == piece.shape
    and not any(isinstance(at, int) for at in piece.target)
  )


def _part(tensor: SavedTensor, sources: Sequence[tuple[HostArray, Piece]], box: Index) -> np.ndarray:
  """The elements within a box of a tensor, in the dtype of the tree, from parameters whose pieces are plain."""
  shape = [bounds.stop - bounds.start for bounds in box]
  data: np.ndarray | None = None
  for host, piece in sources:
    axes = list(zip(piece.select, box, strict=True))
    if any(isinstance(at, int) and not bounds.start <= at < bounds.stop for at, bounds in axes):
      continue
    kept = [
      (bounds, size) for (at, bounds), size in zip(axes, piece.split, strict=True) if isinstance(at, slice)
    ]
    part = _joined_region(host, [kept[axis] for axis in piece.order]).transpose(np.argsort(piece.order))
    part = cast(part, tensor)
    if part.size == math.prod(shape):
      return part.reshape(shape)
    if data is None:
      data = aligned_empty(shape, tensor.dtype)
    place: tuple[Any, ...] = tuple(at - bounds.start if isinstance(at, int) else at for at, bounds in axes)
    data[(*place, ...)] = part
  assert data is not None
  return data


def _joined_region(host: HostArray, factors: Sequence[tuple[slice, int]]) -> np.ndarray:
  """The elements within a box whose axes are factors of an array's axes, with an axis for each factor.

  Args:
    host: the array.
    factors: bounds and whole size of each factor, in the array's order.
  """
  groups = group_axes(host.shape, [size for _, size in factors])
  assert groups is not None
  region, shape, within = [], [], []
  for first, *rest in groups:
    inner = math.prod(factors[axis][1] for axis in rest)
    bounds = factors[first][0]
    region.append(slice(bounds.start * inner, bounds.stop * inner))
    shape += [bounds.stop - bounds.start, *(factors[axis][1] for axis in rest)]
    within += [slice(None), *(factors[axis][0] for axis in rest)]
  return host.region(tuple(region)).reshape(shape)[tuple(within)]


def _account(names: Sequence[str]) -> dict[str, bytes]:
  """The contents of Orbax's metadata files, by file name."""
  tree = {
    str(tuple(keys := name.split("."))): {
      "key_metadata": [{"key": key, "key_type": _DICTIONARY} for key in keys],
      "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }
    for name in names
  }
  metadata = {
    "tree_metadata": tree,
    "use_ocdbt": True,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }
  checkpoint = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
  return {
    METADATA: json.dumps(metadata).encode(),
    "_CHECKPOINT_METADATA": json.dumps(checkpoint).encode(),
    # Buckets have no renames: there, Orbax takes this file as the sign that a tree is complete.
    "commit_success.txt": b"complete\n",
  }


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
  """Turns TensorStore's errors about the file system into an OSError."""
  try:
    yield
  except (ValueError, RuntimeError) as error:
    if (found := _ERRNO.search(str(error))) is None:
      raise
    number = int(found[1])
    raise OSError(number, os.strerror(number)) from error
