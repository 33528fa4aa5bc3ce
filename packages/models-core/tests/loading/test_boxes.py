"""Boxes: every element of a tensor reaches its place once, whatever layout, cells, sharding and size of a read."""

import math

import numpy as np
import pytest

from models_core.formats.tensors import TensorInfo
from models_core.loading import boxes
from models_core.weights.layout import arrange, part_shape, pieces
from models_core.weights.table import WeightTable

LAYOUTS = [
  ("d f -> f d", (10, 12)),
  ("n d h -> n h d", (4, 6, 10)),
  ("n h d -> d n h", (10, 4, 6)),
  ("1/2 k d h -> k h d", (3, 6, 10)),
  ("0/2 f d -> f d", (10, 12)),
  ("n (1/3 h) d -> n h d", (4, 6, 10)),
  ("(2/3 n) h -> h n", (6, 4)),
  ("(n p 2) d -> n (2 p) d", (4, 6, 10)),
  ("(n h) d -> d n h", (10, 4, 6)),
  ("1/3 k d h -> k h d", (1, 6, 10)),
]


def shards(shape, axis, count):
  """Indices of shards along an axis that it divides, or one of all."""
  size = shape[axis]
  count = count if size % count == 0 else 1
  step = size // count
  for start in range(0, size, step):
    yield tuple(slice(start, start + step) if a == axis else slice(0, s) for a, s in enumerate(shape))


@pytest.mark.parametrize("most", [8, 200, 1 << 20])
@pytest.mark.parametrize("cell", [None, 1, 4, 7, 100])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_every_element_reaches_its_place_and_is_read_once(layout, shape, cell, most):
  row = WeightTable(("ours", "w", layout)).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, shape)
  data = np.arange(math.prod(piece.shape), dtype=np.float32).reshape(piece.shape)
  cells = None if cell is None else tuple(min(cell, size) for size in piece.shape)
  info = TensorInfo("w", data.dtype, piece.shape, "file", 0, data.nbytes, cell=cells)
  expected = arrange(data, piece, part_shape(piece, shape))
  factoring = boxes.factoring(piece, shape)
  for axis in range(len(shape)):
    indices = list(shards(shape, axis, 2))
    targets = [np.full([s.stop - s.start for s in index], -1, np.float32) for index in indices]
    faces = [boxes.face(factoring, index, target) for index, target in zip(indices, targets, strict=True)]
    if None in faces:
      assert "(2 p)" in layout
      assert axis == 1
      continue
    read = 0
    for box, copies in boxes.cut(factoring, info, faces, most):
      part = boxes.factored(factoring, box, data[box])
      read += part.size
      for view, index in copies:
        assert (view == -1).all()
        view[...] = part[index]
    for index, target in zip(indices, targets, strict=True):
      np.testing.assert_array_equal(target, expected[index])
    assert read == expected.size


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shard_alone_reads_no_more_than_its_share(axis):
  row = WeightTable(("ours", "w", "0/2 k d h -> k h d")).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, (8, 16, 32))
  info = TensorInfo(
    "w", np.dtype(np.float32), piece.shape, "file", 0, 4 * math.prod(piece.shape), cell=(2, 1, 4, 4)
  )
  factoring = boxes.factoring(piece, (8, 16, 32))
  index = next(shards((8, 16, 32), axis, 4))
  face = boxes.face(factoring, index, np.empty([s.stop - s.start for s in index], np.float32))
  boxes_read = [box for box, _ in boxes.cut(factoring, info, [face], 256)]
  sizes = [math.prod(s.stop - s.start for s in box) for box in boxes_read]
  assert sum(sizes) == 8 * 16 * 32 // 4
  assert max(sizes) * 4 <= 256


def test_shapes_without_common_factors_have_no_grid():
  row = WeightTable(("ours", "w", "v d")).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, (4, 6))
  assert boxes.factoring(piece, (6, 4)) is None
  assert boxes.factoring(piece, (2, 2, 6)) is not None
