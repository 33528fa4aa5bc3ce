"""Saving to a target: what goes up, in which order, and what memory holds."""

import contextlib
import dataclasses
import errno
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from models_core.errors import CheckpointError, SaveError
from models_core.formats import LocalFiles, safetensors_entries
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.saving import check_directory, local_path, safetensors_writer
from models_core.saving.orbax_saver import save_parameters_to_orbax
from models_core.saving.plan import numbered, plan_state

INDEX = "model.safetensors.index.json"
TOKEN = "0123456789abcdef"


@dataclasses.dataclass
class Folder:
  """A target on the disk of the test, which notes what is asked of it."""

  root: object
  steps: list = dataclasses.field(default_factory=list)
  token: str = TOKEN

  @property
  def path(self):
    return f"mem://{self.root.name}"

  @property
  def files(self):
    return LocalFiles(str(self.root))

  def begin(self, *, overwrite, last):
    self.steps.append(("begin", overwrite, last))
    self.small = {}
    return self

  @contextlib.contextmanager
  def create(self, name, nbytes):
    pieces = []
    yield pieces.append
    data = b"".join(pieces)
    assert len(data) == nbytes
    (self.root / name).write_bytes(data)
    self.steps.append(("create", name))

  def put(self, name, data):
    self.small[name] = data

  def commit(self, sizes, outdated, conflicting=()):
    self.steps.append(("commit", sizes, set(outdated), set(conflicting)))
    for name in outdated:
      (self.root / name).unlink()
    for name, data in self.small.items():
      (self.root / name).write_bytes(data)

  def discard(self):
    self.steps.append(("discard",))


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "folder").mkdir()
  return Folder(tmp_path / "folder")


def state(**shapes):
  return {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(shapes.items())
  }


def loaded(root):
  found = {}
  for path in root.glob("*.safetensors"):
    found |= safetensors.numpy.load_file(path)
  return found


@pytest.mark.parametrize("sharded", [False, True])
def test_streams_hold_what_files_hold(folder, tmp_path, sharded):
  """Tensors whose order in a file is not that of the state, and sizes that are no multiples of anything."""
  arrays = state(a=(3,), b=(64, 16), c=(), d=(0, 4), e=(7, 5), f=(8, 16))
  arrays["g"] = arrays["e"].astype(np.float16)
  if sharded:
    sharding = jax.NamedSharding(jax.make_mesh((len(jax.devices()),), ("x",)), jax.P())
    arrays = jax.device_put(arrays, sharding)
  save_model_to_safetensors(arrays, folder, "2KB", more={"note.json": b"{}"})
  save_model_to_safetensors(arrays, tmp_path / "directory", "2KB")
  ours, theirs = loaded(folder.root), loaded(tmp_path / "directory")
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    assert (ours[name].dtype, ours[name].tobytes()) == (array.dtype, array.tobytes()), name
  plain = sorted(path.read_bytes() for path in (tmp_path / "directory").glob("*.safetensors"))
  assert sorted(path.read_bytes() for path in folder.root.glob("*.safetensors")) == plain
  assert (folder.root / "note.json").read_bytes() == b"{}"


def test_an_index_names_the_files_even_of_a_single_one(folder):
  folder.root.joinpath("model.safetensors").write_bytes(b"old")
  folder.root.joinpath("model-00001-of-00002.safetensors").write_bytes(b"old")
  folder.root.joinpath("other.safetensors").write_bytes(b"mine")
  save_model_to_safetensors(state(a=(4, 4)), folder, overwrite=True)
  name = f"model-{TOKEN}-00001-of-00001.safetensors"
  assert json.loads((folder.root / INDEX).read_text())["weight_map"] == {"a": name}
  size = (folder.root / name).stat().st_size
  old = {"model.safetensors", "model-00001-of-00002.safetensors"}
  assert folder.steps == [
    ("begin", True, INDEX),
    ("create", name),
    ("commit", {name: size}, old, {"model.safetensors"}),
  ]
  assert sorted(path.name for path in folder.root.iterdir()) == sorted({name, INDEX, "other.safetensors"})


def test_what_fails_is_discarded(folder, monkeypatch):
  def full(name, nbytes):
    raise SaveError("the store refuses")

  monkeypatch.setattr(folder, "create", full)
  with pytest.raises(SaveError, match="the store refuses"):
    save_model_to_safetensors(state(a=(4, 4)), folder)
  assert [step[0] for step in folder.steps] == ["begin", "discard"]


def test_no_thread_reads_a_parameter_after_an_error(folder, monkeypatch):
  monkeypatch.setattr(safetensors_writer, "_TASK", 64)

  @contextlib.contextmanager
  def create(name, nbytes):
    def put(data):
      raise SaveError("the store refuses")

    yield put

  made = []
  make = safetensors_writer._piece
  monkeypatch.setattr(safetensors_writer, "_piece", lambda *a: made.append(1) or make(*a))
  monkeypatch.setattr(folder, "create", create)
  with pytest.raises(SaveError):
    save_model_to_safetensors(state(a=(1024, 16)), folder)
  before = len(made)
  assert before < 1024
  assert len(made) == before


def test_a_number_that_does_not_fit_is_an_error(folder):
  with pytest.raises(SaveError, match="in another dtype"):
    save_model_to_safetensors({"a": np.full(3, 1e30, np.float32)}, folder, dtype="float16")
  assert folder.steps[-1] == ("discard",)


def test_a_tree_is_not_mixed_with_tensors(folder):
  (folder.root / "_METADATA").write_text("{}")
  (folder.root / "manifest.ocdbt").write_text("")
  with pytest.raises(SaveError, match="holds an Orbax tree, which would stay"):
    save_model_to_safetensors(state(a=(4,)), folder, overwrite=True)
  assert folder.steps[-1] == ("discard",)


def test_an_orbax_tree_is_written_to_a_directory_alone(folder):
  with pytest.raises(SaveError, match="an Orbax tree is written to a directory of this machine only"):
    save_parameters_to_orbax({}, {}.__getitem__, folder, family=None, config=None)
  assert not folder.steps


def test_threads_hold_few_pieces(folder, monkeypatch):
  """Host memory does not grow with the file."""
  monkeypatch.setattr(safetensors_writer, "_TASK", 1 << 10)
  monkeypatch.setattr(safetensors_writer, "_STREAMED", 4 << 10)
  waiting, most, make = [], 0, safetensors_writer._piece

  def noted(*args):
    data = make(*args)
    waiting.append(len(data))
    return data

  @contextlib.contextmanager
  def create(name, nbytes):
    yield lambda data: waiting.remove(len(data)) if len(data) in waiting else None

  class Noted(list):
    def append(self, value):
      nonlocal most
      super().append(value)
      most = max(most, sum(self))

  waiting = Noted()
  monkeypatch.setattr(safetensors_writer, "_piece", noted)
  monkeypatch.setattr(folder, "create", create)
  save_model_to_safetensors(state(a=(1024, 64)), folder)
  assert most <= 6 << 10


def test_names_that_one_save_uses_are_replaced_by_the_next(tmp_path):
  tensors = plan_state({"a": np.zeros(3, ml_dtypes.bfloat16)})
  (name,) = (file.name for file in numbered([tensors], TOKEN))
  (tmp_path / name).write_text("")
  (tmp_path / "model-of-mine.safetensors").write_text("")
  assert safetensors_entries(LocalFiles(str(tmp_path))) == {name}


# Directories of this machine.


@pytest.mark.parametrize("place", ["gs://b/x", "s3:/b/x", "HTTP://x", "a\0b"])
def test_places_that_are_no_directories(place, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for use in (local_path, check_directory, lambda place: save_model_to_safetensors(state(a=(2,)), place)):
    with pytest.raises(SaveError, match=r"is an address, not a directory of this machine|holds a NUL"):
      use(place)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["C:/models", "a:b", "a/b://c", "~/x", "models"])
def test_places_that_are_directories(place, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert local_path(place).startswith(str(tmp_path))
  check_directory(place)


def test_a_directory_is_checked_without_writing(tmp_path):
  check_directory(str(tmp_path / "a" / "b"))
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  for place, message, number in (
    ("file", "is not a directory", errno.ENOTDIR),
    ("file/a/b", "cannot be written: .*/file is not a directory", errno.ENOTDIR),
    ("full", "exists and is not empty", errno.EEXIST),
    ("x" * 240, "File name too long", errno.ENAMETOOLONG),
  ):
    with pytest.raises(SaveError, match=message) as caught:
      check_directory(str(tmp_path / place))
    assert caught.value.errno == number
  check_directory(str(tmp_path / "full"), overwrite=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_parent_that_cannot_be_written_is_seen_before(tmp_path, monkeypatch):
  monkeypatch.setattr("os.access", lambda path, mode: False)
  with pytest.raises(
    SaveError, match=r"Permission denied .*; its previous contents are unchanged\. Make the directory"
  ):
    check_directory(str(tmp_path / "a"))


def test_what_may_not_be_read_is_an_error_of_the_checkpoint(tmp_path, monkeypatch):
  (tmp_path / "model.safetensors").symlink_to("model.safetensors")
  with pytest.raises(
    CheckpointError, match=r"model\.safetensors: 1 problem\n.*cannot be read: .*symbolic links"
  ):
    LocalFiles(str(tmp_path)).size("model.safetensors")
