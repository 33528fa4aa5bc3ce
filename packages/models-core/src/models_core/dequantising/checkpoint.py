"""A quantised checkpoint as a plain one: each weight is one tensor, which a reader decodes from the stored ones."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from models_core.casting import cast_into
from models_core.config import Stated, stated_quantisation
from models_core.dequantising.naming import IGNORED, is_skipped, skip_lists
from models_core.dequantising.parts import Parts
from models_core.dequantising.schemes import READ, Reading, Weight
from models_core.dtypes import as_dtype
from models_core.errors import CheckpointError
from models_core.formats import (
  SAFETENSORS,
  Checkpoint,
  Format,
  Index,
  OnBytes,
  Packing,
  ReadBox,
  RunReader,
  TensorInfo,
  TensorReader,
  open_file,
  read_json,
)

_CONFIG = "config.json"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# No scheme stores codes in these.
_PLAIN = {_BFLOAT16, *map(np.dtype, (np.float16, np.float32, np.float64))}
# Bytes of a tensor that may be read for a plan, such as the JSON of bitsandbytes.
_SMALL = 1 << 16
# Small tensors that are read concurrently, since each takes a request if the files are in a store.
_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class DequantisedCheckpoint(Checkpoint):
  """A quantised checkpoint whose tensors are the weights as floats. No weight has been read.

  Attributes:
    source: the checkpoint as it is stored.
    contradictions: between the configuration and the tensors, one sentence each.
  """

  source: Checkpoint | None = None
  contradictions: tuple[str, ...] = ()

  @property
  def format(self) -> Format:
    """The format of the files."""
    assert self.source is not None
    return self.source.format

  def open(self, names: Sequence[str], on_bytes: OnBytes = lambda count: None) -> DequantisingReader:
    """Opens the files and returns a reader that decodes weights on the way."""
    assert self.source is not None
    return DequantisingReader(self.source.open(names, on_bytes), self.tensors)


class DequantisingReader:
  """Reads weights that several stored tensors make, and plain tensors as they are.

  Args:
    stored: reader of the stored tensors.
    tensors: by name; those with a packing are decoded.
  """

  # Weights are read in boxes.
  cells: None = None

  def __init__(self, stored: TensorReader, tensors: Mapping[str, TensorInfo]):
    self.tensors = tensors
    self.where, self.chunk, self.threads = stored.where, stored.chunk, stored.threads
    self._stored = stored

  @property
  def runs(self) -> RunReader | None:
    """Reads contiguous elements of plain tensors."""
    return self._stored.runs

  def read_box(self, info: TensorInfo, index: Index) -> np.ndarray:
    """Reads one box of a tensor.

    Raises:
      CheckpointError: if numbers beside the codes are impossible.
    """
    if info.packing is None:
      return self._stored.read_box(info, index)
    try:
      with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told by name
        return info.packing.decode(self._stored.read_box, index)
    except ValueError as error:
      if isinstance(error, CheckpointError):
        raise
      raise CheckpointError(self.where, [f"{error}: {_DAMAGED}"]) from None

  def parts(self, info: TensorInfo) -> Iterator[np.ndarray]:
    """Yields all elements of a tensor, a few megabytes at a time."""
    if info.packing is None:
      yield from self._stored.parts(info)
      return
    row = math.prod(info.shape[1:]) * info.dtype.itemsize
    step = max(1, self.chunk // max(1, row))
    for start in range(0, info.shape[0], step):
      rows = slice(start, min(start + step, info.shape[0]))
      yield self.read_box(info, (rows, *info.everything[1:]))

  def close(self) -> None:
    """Closes the files."""
    self._stored.close()


_DAMAGED = "the checkpoint is damaged, or was written wrongly; download it again"


def dequantised(
  checkpoint: Checkpoint,
  *,
  dtype: np.dtype | None = None,
  raw: Mapping[str, Any] | None = None,
  is_ignored: Callable[[str], bool] = lambda name: False,
) -> Checkpoint:
  """A checkpoint whose quantised weights are plain ones.

  Tensors that no scheme explains stay what they are.

  Args:
    checkpoint: the headers of the checkpoint.
    dtype: of the weights; None is that of config.json, else bfloat16.
    raw: the checkpoint's config.json, if it has been read.
    is_ignored: whether no model needs a tensor; what is wrong with it does not matter then.

  Returns:
    The checkpoint itself if its weights are plain, or in a scheme that is not read.
  """
  if checkpoint.format is not SAFETENSORS or isinstance(checkpoint, DequantisedCheckpoint):
    return checkpoint
  if all(info.dtype in _PLAIN for info in checkpoint.tensors.values()):
    return checkpoint
  if raw is None and _CONFIG in checkpoint.files.names():
    raw = read_json(checkpoint.files, _CONFIG)
  stated = stated_quantisation(checkpoint.files, raw)
  reading = READ.get(stated.scheme.name) if stated is not None and stated.scheme is not None else None
  if stated is None or reading is None:
    return checkpoint
  groups = _groups(checkpoint, reading)
  if not groups:
    return checkpoint
  wanted = dtype or _stated_dtype(raw or {})
  build = functools.partial(_build, checkpoint, reading, stated, wanted)
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    built = list(pool.map(build, groups.values()))
  tensors, contradictions = dict(checkpoint.tensors), []
  for parts, made in zip(groups.values(), built, strict=True):
    if isinstance(made, TensorInfo):
      for info in parts.tensors.values():
        tensors.pop(info.name, None)
      tensors[made.name] = made
    elif not is_ignored(parts.weight) and not checkpoint.unread:
      contradictions.append(f"{made} ({stated.place})")
  notes = [*checkpoint.notes, *_left_out(tensors, is_ignored)]
  return DequantisedCheckpoint(
    checkpoint.files,
    tensors,
    checkpoint.metadata,
    checkpoint.problems,
    tuple(notes),
    checkpoint.shared_files,
    checkpoint.unread,
    source=checkpoint,
    contradictions=tuple(contradictions),
  )


def without_zero_biases(checkpoint: Checkpoint, needed: Collection[str]) -> Checkpoint:
  """A checkpoint without biases of zeros, which AutoGPTQ writes beside every quantised weight.

  Args:
    checkpoint: as `dequantised` returns it.
    needed: names of the tensors that a model needs.
  """
  if not isinstance(checkpoint, DequantisedCheckpoint):
    return checkpoint
  tensors = dict(checkpoint.tensors)
  weights = [name for name, info in tensors.items() if info.packing is not None and name.endswith(".weight")]
  spare = [bias for name in weights if (bias := f"{name.removesuffix('weight')}bias") in tensors]
  for name in spare:
    is_spare = name not in needed and tensors[name].stop - tensors[name].start <= _SMALL
    if is_spare and not np.any(_read_small(checkpoint, tensors[name])):
      del tensors[name]
  count = len(checkpoint.tensors) - len(tensors)
  if not count:
    return checkpoint
  note = f"{count} tensor{'s' * (count > 1)} not loaded: biases that the model does not have, all zero"
  return dataclasses.replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _groups(checkpoint: Checkpoint, reading: Reading) -> dict[str, Parts]:
  """The stored tensors of each weight that is not a plain one, by its name."""
  endings = sorted(reading.roles, key=len, reverse=True)
  found: dict[str, dict[str, TensorInfo]] = collections.defaultdict(dict)
  for name, info in checkpoint.tensors.items():
    if (ending := next((end for end in endings if name.endswith(end)), None)) is not None:
      role, plain = reading.roles[ending]
      found[name.removesuffix(ending) + plain][role] = info
  groups = {}
  for weight, tensors in found.items():
    if len(tensors) == 1 and not is_narrow(next(iter(tensors.values())).dtype):
      continue
    names = {
      role: weight.removesuffix(plain) + ending
      for ending, (role, plain) in reversed(list(reading.roles.items()))
      if weight.endswith(plain)
    }
    groups[weight] = Parts(weight, tensors, names, functools.partial(_read_small, checkpoint))
  return groups


def is_narrow(dtype: np.dtype) -> bool:
  """Whether numbers of a type are codes, not weights: integers, and floats of 8 bits."""
  return dtype.kind in "iu" or dtype.itemsize == 1


def _build(
  checkpoint: Checkpoint, reading: Reading, stated: Stated, dtype: np.dtype, parts: Parts
) -> TensorInfo | str:
  """The tensor that some stored ones make, or the problem."""
  module = parts.weight.rpartition(".")[0] if parts.weight.endswith(".weight") else parts.weight
  try:
    for key, entry in skip_lists(stated.described):
      if is_skipped(module, entry):
        raise ValueError(f"{module} is quantised, but {key} says {entry!r}, that it is not")
    encoding, weight = reading.build(parts, reading.of_module(stated.described, module))
  except ValueError as error:
    return error.problems[0] if isinstance(error, CheckpointError) else str(error)
  stored = weight.parts
  return TensorInfo(
    name=parts.weight,
    dtype=dtype,
    shape=weight.shape,
    file=stored[0].file,
    start=stored[0].start,
    stop=stored[0].stop,
    cell=weight.cell,
    packing=Packing(encoding, stored, functools.partial(_decode, weight, dtype)),
  )


def _decode(weight: Weight, dtype: np.dtype, read: ReadBox, index: Index) -> np.ndarray:
  numbers = weight.read(read, index, dtype)
  if numbers.dtype == dtype:
    return numbers
  cast = np.empty(numbers.shape, dtype)
  cast_into(cast, numbers)
  return cast


def _read_small(checkpoint: Checkpoint, info: TensorInfo) -> np.ndarray:
  """Reads a small tensor whole.

  Raises:
    ValueError: if it is too large to be what it should be.
  """
  if info.stop - info.start > _SMALL:
    raise ValueError(f"{info.name} has {info.stop - info.start} bytes, expected at most {_SMALL}")
  with open_file(checkpoint.files, info.file) as read:
    data = read(info.start, info.stop)
  if len(data) < info.stop - info.start:
    raise ValueError(f"{info.file} ends within {info.name}")
  return np.frombuffer(data, info.dtype).reshape(info.shape)


def _left_out(tensors: dict[str, TensorInfo], is_ignored: Callable[[str], bool]) -> Iterator[str]:
  """Removes tensors that act on activations and caches, and says how many there were."""
  counts: collections.Counter[str] = collections.Counter()
  for name in list(tensors):
    why = next((why for ending, why in IGNORED.items() if name.endswith(ending)), None)
    if why is not None and not is_ignored(name):
      del tensors[name]
      counts[why] += 1
  for why, count in counts.items():
    yield f"{count} tensor{'s' * (count > 1)} not loaded: {why}"


def _stated_dtype(raw: Mapping[str, Any]) -> np.dtype:
  """The dtype that config.json gives the weights; bfloat16 if it names none."""
  text = raw.get("text_config")
  for level in (raw, text if isinstance(text, Mapping) else {}):
    for key in ("dtype", "torch_dtype"):
      with contextlib.suppress(TypeError):
        if isinstance(level.get(key), str) and (found := as_dtype(level[key].removeprefix("torch."))):
          return found
  return _BFLOAT16
