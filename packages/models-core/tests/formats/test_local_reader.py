"""Reading files of this machine: runs, boxes, blocks, mapped memory, and files that are not what they were."""

import concurrent.futures
import contextlib
import errno
import gc
import itertools
import json
import os
import resource
import struct
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from models_core.errors import CheckpointError
from models_core.formats import byte_reader
from models_core.formats.byte_reader import BytesCheckpoint, LocalReader
from models_core.formats.checkpoint import Format, Header
from models_core.formats.files import LocalFiles
from models_core.formats.reader import Extent
from models_core.formats.safetensors import read_safetensors
from models_core.formats.tensors import Codec, TensorInfo

BF16 = np.dtype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def opened(place, names=None, on_bytes=lambda count: None, checkpoint=None):
  """The tensors of a directory or file, and a reader of its files."""
  checkpoint = checkpoint or read_safetensors(LocalFiles(str(place)))
  files = sorted({info.file for info in checkpoint.tensors.values()}) if names is None else names
  made = checkpoint.open(files, on_bytes)
  try:
    yield checkpoint.tensors, made
  finally:
    made.close()


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(LocalReader, "chunk", 64)


@pytest.fixture
def x(rng):
  return rng.normal(size=(6, 8)).astype(np.float32)


def descriptors():
  return len(os.listdir("/proc/self/fd"))


class TestRuns:
  @pytest.mark.parametrize("dtype", [np.float32, BF16, np.int8, np.bool_], ids=str)
  def test_elements_from_any_place_on(self, dtype, save, x):
    values = (x * 50).astype(dtype)
    with opened(save({"first": x, "values": values})) as (tensors, made):
      for start, count in [(0, 48), (5, 20), (47, 1), (10, 0)]:
        target = np.empty(count, dtype)
        made.read_into(tensors["values"], start, target)
        expected = values.reshape(-1)[start : start + count]
        assert target.tobytes() == expected.tobytes()
        assert made.read_elements(tensors["values"], start, count).tobytes() == expected.tobytes()

  def test_more_than_a_chunk_at_a_time(self, save, x, small_chunks):
    with opened(save({"x": x})) as (tensors, made):
      np.testing.assert_array_equal(made.read_elements(tensors["x"], 0, 48), x.reshape(-1))

  def test_the_system_may_read_less_than_it_was_asked_for(self, save, x, monkeypatch):
    preadv = os.preadv

    def a_part(descriptor, buffers, offset):
      return preadv(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(byte_reader.os, "preadv", a_part)
    with opened(save({"x": x})) as (tensors, made):
      np.testing.assert_array_equal(made.read_elements(tensors["x"], 3, 40), x.reshape(-1)[3:43])

  @pytest.mark.parametrize("most", ["all", "two buffers", "seven bytes", "what the system likes"])
  def test_neighbours_are_read_together(self, most, save, x, monkeypatch):
    calls = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
      calls.append((len(buffers), offset))
      # As little as it likes: all of the first buffer, and a part of the second one.
      some = buffers if most != "what the system likes" else [buffers[0], *(b[:5] for b in buffers[1:2])]
      return preadv(descriptor, some, offset)

    monkeypatch.setattr(byte_reader.os, "preadv", counted)
    if most == "two buffers":
      monkeypatch.setattr(byte_reader, "_MOST_BUFFERS", 2)
    if most == "seven bytes":
      monkeypatch.setattr(byte_reader, "_MOST_BYTES", 7)
    counts = []
    with opened(save({"a": x, "b": x + 1, "c": x + 2}), on_bytes=counts.append) as (tensors, made):
      # The whole of a, the end of b, the whole of c: b and c are neighbours, and nothing is read into no memory.
      wanted = [("a", 0, 192), ("b", 100, 0), ("b", 128, 64), ("c", 0, 100), ("c", 100, 92)]
      extents = [Extent(tensors[name], start, np.empty(count, np.uint8)) for name, start, count in wanted]
      made.read_extents(extents)
      for (name, start, count), extent in zip(wanted, extents, strict=True):
        stored = (x + "abc".index(name)).tobytes()
        assert extent.buffer.tobytes() == stored[start : start + count]
      begin = tensors["a"].start
      if most == "all":
        assert calls == [(1, begin), (3, begin + 192 + 128)]
      if most == "two buffers":
        assert calls == [(1, begin), (2, begin + 192 + 128), (1, begin + 384 + 100)]
    assert counts == [448]

  def test_more_files_than_may_be_open_and_a_system_that_takes_no_advice(self, save_sharded, x, monkeypatch):
    asked = []

    def refuses(descriptor, start, nbytes, advice):
      asked.append(nbytes)
      raise OSError(errno.ESPIPE, "illegal seek")

    monkeypatch.setattr(byte_reader.os, "posix_fadvise", refuses)
    monkeypatch.setattr(byte_reader, "_most_files", lambda: 1)
    folder = save_sharded({f"{n}.safetensors": {f"{n}": x + n, f"other{n}": x} for n in range(4)})
    with opened(folder) as (tensors, made):
      extents = [Extent(tensors[str(n)], 0, np.empty(192, np.uint8)) for n in (0, 1, 2, 3)]
      made.read_extents(extents)
      assert asked == [192]  # of the one file that was open
      assert len(made._open) == 1
    for n, extent in enumerate(extents):
      assert extent.buffer.tobytes() == (x + n).tobytes()

  def test_a_file_that_ends_within_one_of_several_neighbours_names_it(self, save, x):
    checkpoint = save({"a": x, "b": x, "c": x})
    with opened(checkpoint) as (tensors, made):
      name = tensors["b"].file
      os.truncate(os.path.join(made.where, name), tensors["b"].start + 10)
      extents = [Extent(tensors[name], 0, np.empty(192, np.uint8)) for name in "abc"]
      with pytest.raises(CheckpointError, match="the file ends within b: it has changed"):
        made.read_extents(extents)

  def test_many_threads_have_memory_of_their_own(self, save, x):
    together, found = threading.Barrier(6), {}

    def work(row):
      data = made.read_elements(tensors["x"], row * 8, 8)
      together.wait(10)
      found[row] = np.array(data)

    with opened(save({"x": x})) as (tensors, made):
      threads = [threading.Thread(target=work, args=(row,)) for row in range(6)]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    np.testing.assert_array_equal([found[row] for row in range(6)], x)

  def test_bytes_are_counted_as_they_lie_in_the_file(self, save, x):
    counts = []
    with opened(save({"x": x}), on_bytes=counts.append) as (tensors, made):
      made.read_into(tensors["x"], 0, np.empty(8, np.float32))
      made.read_elements(tensors["x"], 8, 3)
      assert counts == [32, 12]


# Of four numbers each: a sum to add, and four bytes.
SUMS = Codec(
  "SUMS",
  4,
  5,
  lambda data: (data.reshape(-1, 5)[:, 1:] + data.reshape(-1, 5)[:, :1]).astype(np.float32).reshape(-1),
)


class Blocks(BytesCheckpoint):
  """A file of blocks, whose first bytes are its header."""

  @property
  def format(self) -> Format:
    raise NotImplementedError


@pytest.fixture
def coded(tmp_path, rng):
  """A file of blocks, behind 3 other bytes, and the numbers [6, 8] that they stand for."""
  blocks = rng.integers(0, 100, (12, 5), np.uint8)
  (tmp_path / "blocks.bin").write_bytes(b"abc" + blocks.tobytes())
  info = TensorInfo("x", np.dtype(np.float32), (6, 8), "blocks.bin", 3, 63, SUMS)
  checkpoint = Blocks(LocalFiles(str(tmp_path)), {"x": info}, headers={"blocks.bin": Header.of(b"abc")})
  return checkpoint, SUMS.decode(blocks).reshape(6, 8)


class TestBlocks:
  def test_runs_of_blocks_are_decoded(self, coded):
    checkpoint, values = coded
    counts = []
    with opened(None, checkpoint=checkpoint, on_bytes=counts.append) as (tensors, made):
      for start, count in [(0, 48), (8, 16), (44, 4)]:
        decoded = made.read_elements(tensors["x"], start, count)
        np.testing.assert_array_equal(decoded, values.reshape(-1)[start : start + count])
    assert counts == [60, 20, 5]

  def test_boxes_that_cut_through_blocks(self, coded):
    checkpoint, values = coded
    with opened(None, checkpoint=checkpoint) as (tensors, made):
      for rows, columns in itertools.product([(0, 6), (2, 3), (1, 5)], [(0, 8), (1, 3), (3, 6), (7, 8)]):
        index = slice(*rows), slice(*columns)
        np.testing.assert_array_equal(made.read_box(tensors["x"], index), values[index])

  def test_they_are_never_mapped(self, tmp_path, rng):
    blocks = rng.integers(0, 100, (16, 5), np.uint8)
    (tmp_path / "blocks.bin").write_bytes(blocks.tobytes())
    info = TensorInfo("x", np.dtype(np.float32), (64,), "blocks.bin", 0, 80, SUMS)
    checkpoint = Blocks(LocalFiles(str(tmp_path)), {"x": info}, headers={"blocks.bin": Header.of(b"")})
    with opened(None, checkpoint=checkpoint) as (tensors, made):
      assert made.map_elements(tensors["x"], 0, 64) is None


class TestBoxes:
  @pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 5), (2, 1, 3, 4)], ids=str)
  def test_any_box_of_any_tensor(self, shape, save, rng, small_chunks):
    values = rng.normal(size=shape).astype(np.float32)
    spans = [sorted({(0, size), (size // 2, size // 2 + 1), (0, max(1, size - 1))}) for size in shape]
    with opened(save({"before": np.zeros(3, np.int8), "x": values})) as (tensors, made):
      for bounds in itertools.product(*spans):
        index = tuple(slice(*bound) for bound in bounds)
        np.testing.assert_array_equal(made.read_box(tensors["x"], index), values[index])

  @pytest.mark.parametrize(
    ("index", "elements"),
    [
      ((slice(0, 3), slice(0, 4), slice(0, 5)), 60),
      ((slice(1, 2), slice(0, 4), slice(0, 5)), 20),
      ((slice(1, 2), slice(1, 3), slice(0, 5)), 10),
      ((slice(1, 2), slice(2, 3), slice(1, 4)), 3),
      # Only the run that spans it: rows 0 and 1 whole.
      ((slice(0, 2), slice(1, 2), slice(0, 1)), 40),
    ],
  )
  def test_no_more_is_read_than_the_run_that_spans_it(self, index, elements, save, rng):
    counts = []
    values = rng.normal(size=(3, 4, 5)).astype(np.float32)
    with opened(save({"x": values}), on_bytes=counts.append) as (tensors, made):
      np.testing.assert_array_equal(made.read_box(tensors["x"], index), values[index])
    assert counts == [4 * elements]


class TestMaps:
  @pytest.mark.parametrize("offset", [0, 4, 8, 32, 60])
  def test_only_memory_that_a_device_can_alias(self, offset, save, x):
    """Where the data starts, and each element within it, at a multiple of 64 bytes or not."""
    directory = save({"x": x}, data_start=offset)
    with opened(directory) as (tensors, made):
      for element in range(48):
        mapped = made.map_elements(tensors["x"], element, 48 - element)
        assert (mapped is not None) == ((offset + 4 * element) % 64 == 0)
        if mapped is not None:
          np.testing.assert_array_equal(mapped, x.reshape(-1)[element:])
          assert mapped.ctypes.data % 64 == 0
          assert not mapped.flags.writeable

  def test_nothing_is_no_memory(self, save):
    with opened(save({"x": np.zeros((0, 4), np.float32)}, data_start=0)) as (tensors, made):
      assert made.map_elements(tensors["x"], 0, 0) is None

  def test_it_outlives_the_reader_and_the_file_s_name(self, save, x):
    directory = save({"x": x}, data_start=0)
    with opened(directory) as (tensors, made):
      mapped = made.map_elements(tensors["x"], 0, 48)
    os.remove(directory / "model.safetensors")
    del made
    gc.collect()
    np.testing.assert_array_equal(mapped, x.reshape(-1))

  def test_its_bytes_count_as_read(self, save, x):
    counts = []
    with opened(save({"x": x}, data_start=0), on_bytes=counts.append) as (tensors, made):
      made.map_elements(tensors["x"], 16, 20)
    assert counts == [80]


class TestFiles:
  def test_one_file_is_read_by_its_path(self, save, x):
    with opened(save({"x": x}) / "model.safetensors") as (tensors, made):
      np.testing.assert_array_equal(made.read_elements(tensors["x"], 0, 48), x.reshape(-1))

  def test_only_the_named_files_are_opened(self, save_sharded, x):
    directory = save_sharded({f"m-{name}.safetensors": {name: x} for name in "abc"})
    checkpoint = read_safetensors(LocalFiles(str(directory)))
    os.remove(directory / "m-b.safetensors")
    before = descriptors()
    names = ["m-a.safetensors", "m-c.safetensors"]
    with opened(None, names, checkpoint=checkpoint) as (tensors, made):
      assert descriptors() == before + 2
      np.testing.assert_array_equal(made.read_elements(tensors["c"], 0, 48), x.reshape(-1))
    assert descriptors() == before

  @pytest.mark.parametrize("change", ["gone", "shorter", "replaced"])
  def test_nothing_stays_open_where_one_of_them_cannot_be_read(self, change, save_sharded, save, x):
    directory = save_sharded({f"m-{name}.safetensors": {name: x} for name in "ab"})
    checkpoint = read_safetensors(LocalFiles(str(directory)))
    last = directory / "m-b.safetensors"
    if change == "gone":
      last.unlink()
    elif change == "shorter":
      os.truncate(last, last.stat().st_size - 1)
    else:
      save({"b": x.T.copy()}, last.name)
    before = descriptors()
    with (
      pytest.raises(CheckpointError, match=r"m-b\.safetensors"),
      opened(None, checkpoint=checkpoint),
    ):
      pytest.fail("nothing is read")
    assert descriptors() == before

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (
        lambda data: data[:62],
        "the file has 62 bytes, but its header describes 63: the file has changed since",
      ),
      (
        lambda data: b"abd" + data[3:],
        "the file has changed since its header was read: load it again",
      ),
    ],
  )
  def test_a_file_that_was_replaced_before_it_is_opened_is_an_error(self, change, message, coded, tmp_path):
    checkpoint, _ = coded
    path = tmp_path / "blocks.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message), opened(None, checkpoint=checkpoint):
      pytest.fail("nothing is read")

  def test_a_file_that_shrinks_meanwhile_is_an_error(self, save, x):
    directory = save({"x": x})
    with opened(directory) as (tensors, made):
      made.read_elements(tensors["x"], 0, 48)
      os.truncate(directory / "model.safetensors", tensors["x"].stop - 4)
      np.testing.assert_array_equal(made.read_elements(tensors["x"], 0, 47), x.reshape(-1)[:47])
      with pytest.raises(
        CheckpointError,
        match="the file ends within x: it has changed since its header was read; load it again",
      ):
        made.read_elements(tensors["x"], 0, 48)

  def test_a_file_that_is_replaced_meanwhile_is_still_the_old_one(self, save, x):
    directory = save({"x": x})
    with opened(directory) as (tensors, made):
      (directory / "other").write_bytes((directory / "model.safetensors").read_bytes()[::-1])
      os.replace(directory / "other", directory / "model.safetensors")
      np.testing.assert_array_equal(made.read_elements(tensors["x"], 0, 48), x.reshape(-1))


class TestManyFiles:
  """A checkpoint may have more files than a process may open."""

  @pytest.fixture
  def shards(self, rng, tmp_path):
    # The header takes 128 bytes, so each tensor starts at an aligned place and can be mapped.
    values = {f"t{i}": rng.normal(size=64).astype(np.float32) for i in range(8)}
    for name, value in values.items():
      header = json.dumps({name: {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
      header = header.ljust(120)
      (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", 120) + header + value.tobytes())
    index = {"weight_map": {name: f"{name}.safetensors" for name in values}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, values

  def test_few_are_open_at_a_time(self, shards, monkeypatch):
    place, values = shards
    monkeypatch.setattr(byte_reader, "_most_files", lambda: 2)
    checkpoint = read_safetensors(LocalFiles(str(place)))
    before = descriptors()
    with opened(place, checkpoint=checkpoint) as (tensors, made):
      for _ in range(2):
        for name, value in values.items():
          assert made.read_elements(tensors[name], 0, 64).tobytes() == value.tobytes()
          assert descriptors() <= before + 2
    assert descriptors() == before

  def test_few_are_mapped_at_a_time(self, shards, monkeypatch):
    place, values = shards
    monkeypatch.setattr(byte_reader, "_most_files", lambda: 2)
    before = descriptors()
    with opened(place) as (tensors, made):
      maps = [made.map_elements(tensors[name], 0, 64) for name in values]
      assert [array is not None for array in maps] == [True, True, *[False] * 6]
      assert maps[1].tobytes() == values["t1"].tobytes()
      assert descriptors() <= before + 4
      del maps
      # Maps that no array refers to make room for others.
      for _ in range(2):
        for name, value in values.items():
          assert made.map_elements(tensors[name], 0, 64).tobytes() == value.tobytes()

  def test_a_file_that_is_opened_again_must_be_the_same(self, shards, monkeypatch):
    place, _ = shards
    monkeypatch.setattr(byte_reader, "_most_files", lambda: 1)
    with opened(place) as (tensors, made):
      path = place / "t0.safetensors"
      path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
      made.read_elements(tensors["t1"], 0, 64)
      with pytest.raises(CheckpointError, match="the file has changed since its header was read"):
        made.read_elements(tensors["t0"], 0, 64)

  def test_threads_may_read_from_a_file_that_is_closed_for_another(self, shards, monkeypatch):
    place, values = shards
    monkeypatch.setattr(byte_reader, "_most_files", lambda: 1)
    with opened(place) as (tensors, made), concurrent.futures.ThreadPoolExecutor(8) as pool:
      names = list(values) * 50
      read = pool.map(lambda name: made.read_elements(tensors[name], 0, 64).tobytes(), names)
      assert list(read) == [values[name].tobytes() for name in names]

  @pytest.mark.parametrize(("limit", "most"), [(1024, 256), (3, 1), (resource.RLIM_INFINITY, sys.maxsize)])
  def test_a_quarter_of_the_limit(self, limit, most, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert byte_reader._most_files() == most
