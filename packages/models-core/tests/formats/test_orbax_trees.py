"""Which Orbax tree counts: in folders, and in the steps and items that a checkpoint manager of Orbax writes."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles
from models_core.formats.orbax import read_orbax
from models_core.formats.orbax_trees import Tree, find_tree

MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
MOMENTS = {"mu": {"w": np.ones((2, 3), np.float32)}}
STEP_OF_SEVERAL = "step {} is loaded, not {}: for another step, give the path of its folder"
NO_OPTIMIZER = "optimizer_state is not loaded: the state of a training run"


def train(directory, steps, **items):
  """Saves each step as a trainer does; the weights of a step are those of MODEL plus its number."""
  with ocp.CheckpointManager(directory, item_names=tuple(items)) as manager:
    for step in steps:
      trees = {name: {"w": tree["w"] + step} if tree is MODEL else tree for name, tree in items.items()}
      saved = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
      manager.save(step, args=ocp.args.Composite(**saved))
  return directory


def find(directory):
  return find_tree(LocalFiles(str(directory)))


def first_number(directory):
  checkpoint = read_orbax(LocalFiles(str(directory)))
  assert not checkpoint.problems
  info = checkpoint.tensors["w"]
  return checkpoint.open(()).read_box(info, info.everything)[0, 0]


@pytest.fixture
def run(tmp_path):
  return train(tmp_path / "run", (9, 10, 100), model_params=MODEL, optimizer_state=MOMENTS)


def test_the_newest_step(run):
  assert find(run) == Tree("100/model_params/", (STEP_OF_SEVERAL.format(100, "9, 10"), NO_OPTIMIZER))
  assert first_number(run) == 100
  assert read_orbax(LocalFiles(str(run))).notes == find(run).notes


def test_another_step_and_its_item_by_their_paths(run):
  assert find(run / "10") == Tree("model_params/", (NO_OPTIMIZER,))
  assert find(run / "10" / "model_params") == Tree("")
  assert first_number(run / "10") == first_number(run / "10" / "model_params") == 10


def test_one_step_needs_no_note(tmp_path):
  assert find(train(tmp_path / "run", (0,), default=MODEL)) == Tree("0/default/")


def test_steps_that_are_trees_themselves(tmp_path):
  with ocp.StandardCheckpointer() as checkpointer:
    for step in (3, 20):
      checkpointer.save(tmp_path / str(step), MODEL)
  assert find(tmp_path) == Tree("20/", (STEP_OF_SEVERAL.format(20, "3"),))


def test_a_step_that_was_never_finished_is_no_step(run):
  shutil.copytree(run / "100", run / "200.orbax-checkpoint-tmp-1")
  assert find(run).folder == "100/model_params/"


def test_where_finished_steps_are_marked_the_others_are_not_finished(run):
  shutil.copytree(run / "100", run / "200")
  (run / "200" / "commit_success.txt").unlink()
  for step in ("9", "10", "100"):
    (run / step / "commit_success.txt").write_text("complete")
  assert find(run).folder == "100/model_params/"


def test_the_newest_step_that_holds_a_model(run):
  shutil.rmtree(run / "100" / "model_params")
  assert find(run).folder == "10/model_params/"


def test_items_among_which_none_is_the_model(tmp_path):
  run = train(tmp_path / "run", (1, 2), actor=MODEL, critic=MODEL)
  with pytest.raises(
    CheckpointError, match=r"several checkpoints \(2/actor, 2/critic\): pass the path of one"
  ):
    find(run)
  assert find(run / "1" / "critic") == Tree("")


def test_the_state_of_a_training_run_is_no_model(tmp_path):
  run = train(tmp_path / "run", (1,), optimizer_state=MOMENTS)
  with pytest.raises(CheckpointError, match=r"state of a training run alone \(optimizer_state\)"):
    find(run)


def test_a_folder_beside_steps_is_as_good_as_they(run):
  shutil.copytree(run / "100" / "model_params", run / "best")
  with pytest.raises(CheckpointError, match=r"\(10/model_params, 100/model_params, 9/model_params, best\)"):
    find(run)


class Listed:
  """Files of a source that lists those of all folders, such as an object store."""

  path = "store"

  def __init__(self, directory):
    self.local = directory

  def names(self):
    return sorted(p.relative_to(self.local).as_posix() for p in self.local.rglob("*") if p.is_file())

  def read(self, name, start, stop):
    return (self.local / name).read_bytes()[start:stop]


def test_files_of_a_source(run):
  assert find_tree(Listed(run)) == find(run)
  assert find_tree(Listed(run / "9")) == find(run / "9")
