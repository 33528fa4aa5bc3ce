"""Tied tensors: a head that a checkpoint holds beside the embedding must hold the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models_core.casting import cast_into
from models_core.config import TYING_FIELDS, field_of
from models_core.dtypes import float_dtypes
from models_core.formats import Index, TensorInfo, TensorReader
from models_core.weights import Tied


def differing(name: str, twin: str, config: Any, how: str = "differs from") -> str:
  """The sentence about a head that is not the embedding to which a configuration ties it, with the remedy.

  Args:
    name: of the head's tensor.
    twin: of the embedding's tensor.
    config: of the model; its field decides the remedy.
    how: the two differ.
  """
  field = field_of(config, TYING_FIELDS)
  untie = f"pass {field}=False" if field else "untie them in the configuration"
  return (
    f"{name} {how} {twin}, but the configuration ties the head to the embedding: {untie} to load both, or remove "
    f"{name} from the checkpoint"
  )


def mis_shaped(tie: Tied, tensors: Mapping[str, TensorInfo], config: Any) -> str | None:
  """The problem of a tied head whose shape is not that of the embedding; None if they agree."""
  head, twin = tensors[tie.tensor].shape, tensors[tie.twin].shape
  how = f"has shape {head}, unlike {twin} of"
  return None if head == twin else differing(tie.tensor, tie.twin, config, how)


def are_equal(reader: TensorReader, tie: Tied, dtype: np.dtype | None, part: int = 0, parts: int = 1) -> bool:
  """Whether two tensors of one shape hold the same numbers.

  If they are stored in two dtypes, it is enough that they agree when both are rounded to one of these: a float32 copy
  of a bfloat16 embedding equals it, and so does the float32 original. The same holds for the dtype in which they are loaded.

  Args:
    reader: of the checkpoint.
    tie: the two tensors.
    dtype: in which the embedding is loaded; None if it is not loaded.
    part: which part of the rows to compare, counted from 0.
    parts: number of parts that the comparison is divided into, such as one for each process.
  """
  a, b = reader.tensors[tie.tensor], reader.tensors[tie.twin]
  if (a.file, a.start, a.stop) == (b.file, b.start, b.stop) and a.cell is b.cell is None:
    return True  # One tensor under two names.
  kinds = float_dtypes(a.dtype, b.dtype, dtype)
  for index in _rows(a, reader.chunk, part, parts):
    # The memory of a read is that of the next one, too.
    left, right = np.array(reader.read_box(a, index)), reader.read_box(b, index)
    if left.dtype == right.dtype and left.tobytes() == right.tobytes():
      continue
    kinds = {kind for kind in kinds if _same(left, right, kind)}
    if not kinds:
      return False
  return True


def _rows(info: TensorInfo, chunk: int, part: int, parts: int) -> Iterator[Index]:
  """Boxes of whole rows, of a few megabytes each, that make up one part of a tensor."""
  count, *rest = info.shape or (1,)
  first, last = count * part // parts, count * (part + 1) // parts
  step = max(1, chunk // max(1, int(np.prod(rest)) * info.dtype.itemsize))
  if not info.shape:
    yield ()
    return
  for start in range(first, last, step):
    yield (slice(start, min(start + step, last)), *(slice(0, size) for size in rest))


def _same(left: np.ndarray, right: np.ndarray, dtype: np.dtype) -> bool:
  """Whether two arrays are the same numbers in a dtype; a NaN is the same as a NaN."""
  rounded = []
  for array in (left, right):
    rounded.append(np.empty(array.shape, dtype))
    try:
      cast_into(rounded[-1], array)
    except OverflowError:
      return False
  a, b = rounded
  return bool(np.all((a == b) | ((a != a) & (b != b))))
