"""Orbax trees: what their metadata says, in each way of writing them, and the problems of broken ones."""

import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles
from models_core.formats.orbax import read_orbax
from models_core.formats.orbax_trees import Tree, find_tree

KEY = "transformer/layer_0/attn/q_einsum"
TREE = {KEY: {"w": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}, "scale": np.arange(3, dtype=np.float32)}


@pytest.fixture
def save(tmp_path):
  def write(tree, name="tree", **options):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(tmp_path / name, tree)
    return tmp_path / name

  return write


def read(directory):
  return read_orbax(LocalFiles(str(directory)))


def values(checkpoint):
  assert not checkpoint.problems
  reader = checkpoint.open(())
  return {n: reader.read_box(i, tuple(slice(0, s) for s in i.shape)) for n, i in checkpoint.tensors.items()}


@pytest.mark.parametrize("database", [True, False])
def test_names_shapes_and_numbers(save, database):
  checkpoint = read(save(TREE, use_ocdbt=database))
  assert checkpoint.format.naming == "orbax"
  assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
    f"{KEY}.w": (2, 3, 4),
    "scale": (3,),
  }
  found = values(checkpoint)
  np.testing.assert_array_equal(found[f"{KEY}.w"], TREE[KEY]["w"])
  np.testing.assert_array_equal(found["scale"], TREE["scale"])


def write_aggregate(directory, tree):
  """Makes a tree of directories look as older versions wrote it: with a file `checkpoint`, without `_METADATA`."""
  (directory / "_METADATA").unlink()
  (directory / "checkpoint").write_bytes(msgpack.packb(tree))


def test_the_older_file_of_the_structure(save):
  directory = save(TREE, use_ocdbt=False)
  write_aggregate(directory, {KEY: {"w": f"PLACEHOLDER://{KEY}.w"}, "scale": "PLACEHOLDER://scale"})
  assert find_tree(LocalFiles(str(directory))) == Tree("")
  np.testing.assert_array_equal(values(read(directory))["scale"], TREE["scale"])


def test_arrays_that_the_older_file_lists_must_be_there(save):
  directory = save(TREE, use_ocdbt=False)
  inside = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0\0\0\0")))
  write_aggregate(directory, {"bias": "PLACEHOLDER://bias", "scale": inside})
  missing, within = read(directory).problems
  assert missing == "bias is missing, but checkpoint lists it: copy or download the checkpoint again"
  assert within.startswith("scale is stored inside the file checkpoint")


def test_a_tree_is_found_one_folder_below(save, tmp_path):
  save(TREE, "2b")
  (tmp_path / "tokenizer.model").write_bytes(b"")
  assert find_tree(LocalFiles(str(tmp_path))) == Tree("2b/")
  save(TREE, "7b")
  with pytest.raises(CheckpointError, match=r"the directory holds several checkpoints \(2b, 7b\)"):
    read(tmp_path)


def test_files_without_a_tree(tmp_path):
  (tmp_path / "checkpoint").write_text('model_checkpoint_path: "of TensorFlow"')
  assert find_tree(LocalFiles(str(tmp_path))) is None
  with pytest.raises(CheckpointError, match="no Orbax checkpoint"):
    read(tmp_path)


def test_a_missing_file_is_a_problem_and_not_zeros(save):
  directory = save(TREE, use_ocdbt=False)
  (directory / f"{KEY}.w" / "0.0.0").unlink()
  assert read(directory).problems == (
    f"{KEY}.w is incomplete (1 of 1 files are missing): copy or download it again",
  )


def test_a_missing_array(save):
  directory = save(TREE, use_ocdbt=False)
  for file in (directory / "scale").iterdir():
    file.unlink()
  assert read(directory).problems == (
    "scale is missing, but _METADATA lists it: copy or download the checkpoint again",
  )


def test_truncated_data(save):
  tree = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
  directory = save(tree)
  for file in [p for p in directory.rglob("d/*") if p.stat().st_size > 4096]:
    file.write_bytes(file.read_bytes()[:4096])
  with pytest.raises(CheckpointError, match="cannot be read"):
    values(read(directory))


def test_a_save_that_was_never_finished(save):
  directory = save(TREE)
  unfinished = directory.rename(f"{directory}.orbax-checkpoint-tmp-1")
  with pytest.raises(CheckpointError, match="never finished"):
    read(unfinished)


def test_stacked_layers_and_a_layer_that_occurs_twice(save):
  stacked = {
    f"transformer/stacked_layers/attention_type_{p}/mlp": {"w": np.full((2, 3), p, np.float32)}
    for p in (0, 1)
  }
  found = values(read(save(stacked)))
  assert {n: int(x[0]) for n, x in found.items()} == {f"transformer/layer_{i}/mlp.w": i % 2 for i in range(4)}
  both = read(save(stacked | {"transformer/layer_3/mlp": {"w": np.zeros(3, np.float32)}}, "both"))
  assert both.problems[0].startswith("transformer/layer_3/mlp.w occurs twice")


class Addressed:
  """Files that stay where they are, behind an address."""

  def __init__(self, directory):
    self.local = directory
    self.path = f"file://{directory}"

  def names(self):
    return sorted(p.relative_to(self.local).as_posix() for p in self.local.rglob("*") if p.is_file())

  def size(self, name):
    return (self.local / name).stat().st_size

  def read(self, name, start, stop):
    return (self.local / name).read_bytes()[start:stop]

  def fetch(self, names):
    raise AssertionError(f"{names} are fetched")


@pytest.mark.parametrize("database", [True, False])
def test_files_at_an_address_are_read_in_place(save, tmp_path, database):
  save(TREE, use_ocdbt=database)
  checkpoint = read_orbax(Addressed(tmp_path))
  np.testing.assert_array_equal(values(checkpoint)[f"{KEY}.w"], TREE[KEY]["w"])
  assert checkpoint.shared_files == ()
