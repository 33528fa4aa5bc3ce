"""Which formats a folder holds, what belongs to each, and that a checkpoint of any opens alike."""

import contextlib
import math

import gguf
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models_core.errors import CheckpointError
from models_core.formats import (
  GGUF,
  ORBAX,
  SAFETENSORS,
  LocalFiles,
  checkpoint_entries,
  formats_in,
  weight_files,
)

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def write(save, tmp_path):
  """Writes the tensor `x` in some formats into one folder."""

  def into(*formats):
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    if SAFETENSORS in formats:
      save({"x": X})
    if GGUF in formats:
      writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
      writer.add_tensor("x", X)
      for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
      writer.close()
    if ORBAX in formats:
      ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder / "tree", {"x": X})
    return LocalFiles(str(folder))

  return into


@pytest.mark.parametrize(
  "formats",
  [(), (SAFETENSORS,), (GGUF,), (ORBAX,), (SAFETENSORS, GGUF, ORBAX)],
  ids=lambda f: "+".join(one.name for one in f),
)
def test_formats_are_found_in_the_order_of_preference(write, formats):
  assert tuple(formats_in(write(*formats))) == formats


@pytest.mark.parametrize("format", [SAFETENSORS, GGUF, ORBAX], ids=lambda f: f.name)
def test_a_checkpoint_of_any_format_opens_alike(write, format):
  checkpoint = format.read(write(format))
  assert checkpoint.format is format
  info = checkpoint.tensors["x"]
  names = [info.file] if format is not ORBAX else []
  with contextlib.closing(checkpoint.open(names)) as reader:
    np.testing.assert_array_equal(reader.read_box(info, (slice(1, 3), slice(2, 5))), X[1:3, 2:5])
    parts = [np.array(part).reshape(-1) for part in reader.parts(info)]
    assert sum(part.size for part in parts) == X.size
    assert sorted(np.concatenate(parts)) == sorted(X.reshape(-1))
    # Each format has one way to read more than boxes.
    assert (reader.runs is None) == (format is ORBAX)
    assert (reader.cells is None) == (format is not ORBAX)
    if reader.runs is not None:
      np.testing.assert_array_equal(reader.runs.read_elements(info, 7, 5), X.reshape(-1)[7:12])


def test_weight_files_are_those_that_a_name_tells(write):
  files = write(SAFETENSORS, GGUF)
  assert weight_files(files) == ["m.gguf", "model.safetensors"]


def test_a_new_checkpoint_takes_the_place_of_weights_and_trees_alone(write, tmp_path):
  files = write(SAFETENSORS, GGUF)
  (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
  assert checkpoint_entries(files.path) == {"model.safetensors"}


@pytest.mark.parametrize("format", [SAFETENSORS, GGUF], ids=lambda f: f.name)
def test_a_header_that_changed_after_it_was_read_is_refused(write, format, tmp_path):
  checkpoint = format.read(write(format))
  name = checkpoint.tensors["x"].file
  path = tmp_path / "checkpoint" / name
  data = bytearray(path.read_bytes())
  at = data.index(b"x", 8)
  data[at : at + 1] = b"y"
  path.write_bytes(data)
  with pytest.raises(
    CheckpointError, match=f"{name}: 1 problem\n.*has changed since its header was read: load it again"
  ):
    checkpoint.open([name])


def test_a_file_that_was_not_named_is_opened_when_it_is_read(save_sharded):
  directory = save_sharded({"a.safetensors": {"a": X}, "b.safetensors": {"b": X + 1}})
  checkpoint = SAFETENSORS.read(LocalFiles(str(directory)))
  with contextlib.closing(checkpoint.open(["a.safetensors"])) as reader:
    (directory / "a.safetensors").unlink()  # it is open
    for name, expected in (("a", X), ("b", X + 1)):
      info = checkpoint.tensors[name]
      np.testing.assert_array_equal(reader.read_box(info, info.everything), expected)


def test_local_files_of_one_file_are_fetched_into_its_folder(write):
  files = write(GGUF)
  one = LocalFiles(f"{files.path}/m.gguf")
  assert one.fetch(["m.gguf"]) == files.fetch([]) == files.path
  assert math.prod(GGUF.read(one).tensors["x"].shape) == X.size
