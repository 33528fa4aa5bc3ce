"""An entry of the shard cache: a directory with the shards in a safetensors file, and a record of their checksums.

The record begins with a hash of itself. It holds the hash of the file's header, and the sharding and the checksums of
each parameter, so that every byte of an entry is verified before any of it is used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from models_core.errors import CheckpointError
from models_core.formats import (
  LocalFiles,
  TensorInfo,
  TensorReader,
  aligned_empty,
  bounds_of,
  read_safetensors_file,
)
from models_core.saving import SavedFile, plan_state, write_own_file
from models_core.shard_cache.checksum import checksum
from models_core.sharding import named
from models_core.threads import THREADS

_SHARDS, _RECORD = "shards.safetensors", "record.json"
_VERSION = 1
# Bytes that one task of a thread verifies.
_TASK = 8 << 20
# Bytes of shards that are verified before they are placed.
_GROUP = 2 << 30

Bounds = tuple[tuple[int, int], ...]


def shards_of(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The distinct shards that this process's devices hold, by a name for each: `layers.0.mlp.up_proj.w#3`."""
  shards: dict[str, jax.Array] = {}
  for name, array in arrays.items():
    held = {bounds_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    shards |= {_shard_name(name, at): held[bounds] for at, bounds in enumerate(sorted(held))}
  return shards


def planned_file(shards: Mapping[str, jax.Array]) -> SavedFile:
  """The file that shards are written to.

  Raises:
    TypeError: if safetensors files cannot store a dtype.
  """
  return SavedFile(_SHARDS, tuple(plan_state(shards)))


def write_entry(
  directory: str, arrays: Mapping[str, jax.Array], shards: Mapping[str, jax.Array], file: SavedFile
) -> None:
  """Writes an entry into an empty directory. It is not flushed to the disk: whatever is lost there, checksums show.

  Args:
    directory: to write into.
    arrays: the parameters by name.
    shards: of the arrays, as `shards_of` returns them.
    file: for the shards.

  Raises:
    OSError: if the file system refuses.
  """
  write_own_file(os.path.join(directory, _SHARDS), file, shards.__getitem__)
  with _opened(directory) as (header, tensors, reader, pool):
    sums = {
      name: _joined(tasks) for name, info in tensors.items() for _, tasks in [_submitted(info, reader, pool)]
    }
  record = {
    "version": _VERSION,
    "header": header,
    "parameters": {
      name: {
        "shape": list(array.shape),
        "spec": _spec_as_json(array.sharding),
        "checksums": [
          sums[_shard_name(name, at)] for at in range(len(_bounds(array.sharding, tuple(array.shape))))
        ],
      }
      for name, array in arrays.items()
    },
  }
  text = json.dumps(record).encode()
  with open(os.path.join(directory, _RECORD), "wb") as out:
    out.write(hashlib.blake2b(text).hexdigest().encode() + b"\n" + text)


def read_entry(directory: str, mesh: Mesh | None) -> dict[str, jax.Array]:
  """Puts the shards of an entry on this process's devices; a CPU uses the mapped file itself.

  Args:
    directory: of the entry.
    mesh: on which its arrays lay.

  Returns:
    The arrays by name.

  Raises:
    CheckpointError: if any byte of the entry is not the one that was written.
    FileNotFoundError: if there is no entry.
    OSError: if the file system refuses.
  """
  record = _record(os.path.join(directory, _RECORD))
  arrays: dict[str, jax.Array] = {}
  with _opened(directory) as (header, tensors, reader, pool):
    if header != record["header"]:
      raise CheckpointError(directory, ["its header is not the one that was written"])
    for group in _groups(record["parameters"], tensors):
      submitted = {
        name: [
          _submitted(tensors[_shard_name(name, at)], reader, pool) for at in range(len(said["checksums"]))
        ]
        for name, said in group.items()
      }
      for name, said in group.items():
        found = submitted.pop(name)
        if [_joined(tasks) for _, tasks in found] != said["checksums"]:
          raise CheckpointError(directory, [f"{name} does not have the checksum that was written"])
        sharding = named(mesh, _spec_of_json(said["spec"]))
        arrays[name] = _placed(tuple(said["shape"]), sharding, [memory for memory, _ in found])
  return arrays


def _record(path: str) -> dict[str, Any]:
  with open(path, "rb") as file:
    expected, _, text = file.read().partition(b"\n")
  if hashlib.blake2b(text).hexdigest().encode() != expected:
    raise CheckpointError(path, ["it does not have the hash that was written"])
  record = json.loads(text)
  if record["version"] != _VERSION:
    raise CheckpointError(path, [f"it has version {record['version']}, expected {_VERSION}"])
  return record


@contextlib.contextmanager
def _opened(
  directory: str,
) -> Iterator[tuple[str, Mapping[str, TensorInfo], TensorReader, concurrent.futures.Executor]]:
  """The hash of the header of an entry's file, its tensors, their reader, and threads."""
  checkpoint = read_safetensors_file(LocalFiles(directory), _SHARDS)
  reader = checkpoint.open([_SHARDS])
  pool = concurrent.futures.ThreadPoolExecutor(THREADS, "shard_cache")
  try:
    yield checkpoint.headers[_SHARDS].digest.hex(), checkpoint.tensors, reader, pool
  finally:
    # Files may be closed only after all reads have ended.
    pool.shutdown(cancel_futures=True)
    reader.close()


def _submitted(
  info: TensorInfo, reader: TensorReader, pool: concurrent.futures.Executor
) -> tuple[np.ndarray, list[concurrent.futures.Future[bytes]]]:
  """The memory of a shard, and the tasks that read it, if it is not mapped, and compute the checksums of its parts."""
  assert reader.runs is not None
  count = math.prod(info.shape)
  mapped = reader.runs.map_elements(info, 0, count)
  memory = aligned_empty((count,), info.dtype) if mapped is None else mapped

  def task(start: int, stop: int) -> bytes:
    if mapped is None and reader.runs is not None:
      reader.runs.read_into(info, start, memory[start:stop])
    return checksum(memory[start:stop].view(np.uint8))

  step = _TASK // info.dtype.itemsize
  starts = range(0, count, step)
  tasks = [pool.submit(task, start, min(start + step, count)) for start in starts]
  return memory.reshape(info.shape), tasks


def _joined(parts: Sequence[concurrent.futures.Future[bytes]]) -> str:
  """The checksum of a shard, from those of its parts."""
  return hashlib.blake2b(b"".join(part.result() for part in parts), digest_size=16).hexdigest()


def _placed(shape: tuple[int, ...], sharding: Sharding, shards: Sequence[np.ndarray]) -> jax.Array:
  """The global array of this process's shards."""
  buffers = dict(zip(_bounds(sharding, shape), shards, strict=True))
  return jax.make_array_from_callback(
    shape, sharding, lambda index: buffers[bounds_of(index or (), shape)], dtype=shards[0].dtype
  )


def _groups(parameters: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[dict[str, Any]]:
  """Parameters that are verified at the same time."""
  group: dict[str, Any] = {}
  size = 0
  for name, said in parameters.items():
    group[name] = said
    infos = [tensors[_shard_name(name, at)] for at in range(len(said["checksums"]))]
    size += sum(info.stop - info.start for info in infos)
    if size >= _GROUP:
      yield group
      group, size = {}, 0
  if group:
    yield group


def _shard_name(parameter: str, at: int) -> str:
  return f"{parameter}#{at}"


@functools.lru_cache(1024)
def _bounds(sharding: Sharding, shape: tuple[int, ...]) -> list[Bounds]:
  """The bounds of the distinct shards that this process's devices hold, in order."""
  held = sharding.addressable_devices_indices_map(shape).values()
  return sorted({bounds_of(index or (), shape) for index in held})


def can_keep(array: jax.Array, mesh: Mesh | None) -> bool:
  """Whether the sharding of an array can be said by a spec on a mesh."""
  if mesh is None:
    return isinstance(array.sharding, SingleDeviceSharding)
  return isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh


def _spec_as_json(sharding: Sharding) -> list[Any]:
  return list(sharding.spec) if isinstance(sharding, NamedSharding) else []


def _spec_of_json(entries: Sequence[Any]) -> PartitionSpec:
  return PartitionSpec(*(tuple(entry) if isinstance(entry, list) else entry for entry in entries))
