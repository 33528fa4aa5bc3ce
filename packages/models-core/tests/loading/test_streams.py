"""Cells as streams: every number of every way to store an array, as TensorStore reads it, and cells that are broken."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import tensorstore as ts
import zstandard

from models_core.casting import cast_into
from models_core.errors import CheckpointError
from models_core.formats import orbax as orbax_checkpoint
from models_core.formats import orbax_cells
from models_core.formats.files import LocalFiles
from models_core.formats.orbax import read_orbax
from models_core.formats.tensors import TensorInfo
from models_core.loading import boxes, streams
from models_core.weights.layout import arrange, part_shape, pieces
from models_core.weights.table import WeightTable

SHAPE = (6, 10, 8)
LAYOUTS = [
  ("n d h -> n h d", (6, 8, 10)),
  ("6 d h -> h (6 d)", (8, 60)),
  ("(n 2) d h -> 2 h n d", (2, 8, 3, 10)),
]
ZSTD = {"id": "zstd", "level": 1}


@pytest.fixture(autouse=True)
def _small_cells_are_streams(monkeypatch):
  monkeypatch.setattr(orbax_checkpoint, "_LARGE", 0)


def write(directory, cell, *, database=True, **metadata):
  """A tree of one array, `w`, whose numbers are random."""
  base = {"driver": "file", "path": f"{directory}/"}
  kvstore = (
    {"driver": "ocdbt", "base": base, "path": "w/"} if database else base | {"path": f"{directory}/w/"}
  )
  settings = {"chunks": list(cell), "compressor": ZSTD, "dtype": "<f4"} | metadata
  spec = {"driver": "zarr", "kvstore": kvstore, "metadata": settings | {"shape": list(SHAPE)}}
  data = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  array = ts.open(spec, create=True).result()
  array.write(data.astype(array.dtype.numpy_dtype)).result()
  if not database:
    (directory / "_METADATA").write_text(json.dumps({"tree_metadata": {}}))
  return array.read().result()


def open_tree(directory):
  checkpoint = read_orbax(LocalFiles(str(directory)))
  assert not checkpoint.problems
  return checkpoint.tensors["w"], checkpoint.open(())


def read(info, reader, shares, most):
  """What the loader does with streams."""
  for position in streams.wanted(info, shares):
    cell = reader.open_cell(info, position)
    for run in streams.runs(info, position, shares, most):
      data = streams.scratch(run, info.dtype)
      copies = list(streams.copies(run, data, shares))
      if copies:
        cell.read_into(run.start, data)
      for target, source in copies:
        assert (target == -1).all()
        cast_into(target, source)


def share(layout, shape, axis, parts, tensor_shape=SHAPE):
  """The shards of a parameter with that layout, and what belongs into them."""
  row = WeightTable(("ours", "w", layout)).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, shape)
  assert piece.shape == tensor_shape
  step = shape[axis] // parts
  indices = [
    tuple(slice(n * step, (n + 1) * step) if a == axis else slice(0, s) for a, s in enumerate(shape))
    for n in range(parts)
  ]
  targets = [np.full([s.stop - s.start for s in index], -1, np.float32) for index in indices]
  factoring = boxes.factoring(piece, shape)
  faces = [boxes.face(factoring, index, target) for index, target in zip(indices, targets, strict=True)]
  return (
    streams.Share(factoring, tuple(faces)),
    targets,
    indices,
    lambda data: arrange(data, piece, part_shape(piece, shape)),
  )


@pytest.mark.parametrize("most", [16, 200, 1 << 20])
@pytest.mark.parametrize("cell", [SHAPE, (1, 10, 8), (3, 2, 8), (4, 3, 5), (6, 5, 4)])
@pytest.mark.parametrize("compressor", [None, ZSTD])
def test_every_number_reaches_its_place(tmp_path, cell, compressor, most):
  data = write(tmp_path, cell, compressor=compressor)
  info, reader = open_tree(tmp_path)
  assert reader.has_streams(info)
  for (layout, shape), axis in itertools.product(LAYOUTS, range(2)):
    wanted, targets, indices, arranged = share(layout, shape, axis, 2)
    if not streams.is_aligned(wanted, info):
      assert "(n 2)" in layout
      continue
    read(info, reader, [wanted], most)
    for index, target in zip(indices, targets, strict=True):
      np.testing.assert_array_equal(target, arranged(data)[index])
  reader.close()


@pytest.mark.parametrize("most", [16, 1 << 20])
def test_parameters_that_share_a_cell(tmp_path, most):
  data = write(tmp_path, SHAPE)
  info, reader = open_tree(tmp_path)
  parts = [share(f"{n}/6 d h -> h d", (8, 10), 0, 2) for n in (4, 1)]
  opened = []
  open_cell, reader.open_cell = reader.open_cell, lambda *at: opened.append(at) or open_cell(*at)
  read(info, reader, [wanted for wanted, *_ in parts], most)
  for n, (_, targets, _, _) in zip((4, 1), parts, strict=True):
    np.testing.assert_array_equal(np.concatenate(targets), data[n].T)
  assert len(opened) == 1


@pytest.mark.parametrize(
  "metadata",
  [
    {"order": "F"},
    {"dtype": ">f4"},
    {"fill_value": 1.0},
    {"compressor": {"id": "zlib", "level": 1}},
    {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
  ],
)
def test_all_else_is_left_to_tensorstore(tmp_path, metadata):
  data = write(tmp_path, (3, 10, 8), **metadata)
  info, reader = open_tree(tmp_path)
  assert not reader.has_streams(info)
  np.testing.assert_array_equal(reader.read_box(info, tuple(slice(0, s) for s in SHAPE)), data)


def test_without_zstandard_tensorstore_decodes(tmp_path, monkeypatch):
  write(tmp_path, SHAPE)
  monkeypatch.setitem(sys.modules, "zstandard", None)
  info, reader = open_tree(tmp_path)
  assert not reader.has_streams(info)


def test_a_cell_that_is_not_stored_holds_zeros(tmp_path):
  base = {"driver": "file", "path": f"{tmp_path}/"}
  spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": "w/"}}
  spec["metadata"] = {"chunks": [3, 10, 8], "compressor": ZSTD, "dtype": "<f4", "shape": list(SHAPE)}
  array = ts.open(spec, create=True).result()
  array[3:].write(np.full((3, 10, 8), 2, np.float32)).result()
  info, reader = open_tree(tmp_path)
  wanted, (target,), _, _ = share("n d h", SHAPE, 0, 1)
  read(info, reader, [wanted], 1 << 20)
  assert (target[:3] == 0).all()
  assert (target[3:] == 2).all()


@pytest.mark.parametrize("step", [7, 64, 1 << 20])
@pytest.mark.parametrize("compressor", [None, ZSTD])
def test_requests_of_any_size(tmp_path, monkeypatch, compressor, step):
  monkeypatch.setattr(orbax_cells, "_LOCAL", step)
  data = write(tmp_path, SHAPE, compressor=compressor)
  info, reader = open_tree(tmp_path)
  wanted, (target,), _, _ = share("n d h", SHAPE, 0, 1)
  read(info, reader, [wanted], 256)
  np.testing.assert_array_equal(target, data)


def zstd(data):
  return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
  ("compressor", "stored", "problem"),
  [
    (
      None,
      bytes(1000),
      r"w cannot be read: a chunk has 1000 bytes, not the 1920 that the array's metadata state",
    ),
    (None, bytes(1921), r"w cannot be read: a chunk has more than the 1920 bytes"),
    (ZSTD, zstd(bytes(1000)), r"w cannot be read: a chunk has 1000 bytes, not the 1920"),
    (ZSTD, zstd(bytes(1921)), r"w cannot be read: a chunk has more than the 1920 bytes"),
    (ZSTD, zstd(np.random.default_rng(0).bytes(1920))[:900], r"w cannot be read: a chunk has \d+ bytes, not"),
    (ZSTD, b"no zstd at all, but something else", r"w cannot be read: .*zstd.*Unknown frame"),
    (ZSTD, zstd(bytes(1920)) + b"and more", r"w cannot be read: .*zstd.*Unknown frame"),
  ],
)
def test_a_cell_that_is_not_what_its_metadata_say(tmp_path, compressor, stored, problem):
  write(tmp_path, SHAPE, compressor=compressor, database=False)
  (tmp_path / "w" / "0.0.0").write_bytes(stored)
  info, reader = open_tree(tmp_path)
  wanted, _, _, _ = share("n d h", SHAPE, 0, 1)
  with pytest.raises(CheckpointError, match=problem):
    read(info, reader, [wanted], 256)


def test_runs_are_small_and_in_order():
  info = TensorInfo("w", np.dtype(np.float32), SHAPE, "file", 0, 4 * math.prod(SHAPE), cell=(4, 10, 8))
  wanted, _, _, _ = share("n d h -> n h d", (6, 8, 10), 0, 1)
  found = list(streams.runs(info, (1, 0, 0), [wanted], 200))
  assert [run.start for run in found] == [0, 192, 320, 512]
  assert [run.shape for run in found] == [(1, 6, 8), (1, 4, 8)] * 2
