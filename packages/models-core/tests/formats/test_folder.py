"""Which files of a folder count: each mixture has one answer, a note where something is left out, or an error."""

import json
import os

import numpy as np
import pytest

from models_core.errors import CheckpointError, ConfigError
from models_core.formats import SAFETENSORS, LocalFiles, formats_in, read_json, read_safetensors
from models_core.formats.safetensors import INDEX, SINGLE

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 4976698672\n"
ONE, TWO = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))


def ones(*names):
  return {name: np.ones(2, np.float32) for name in names}


def read(directory):
  return read_safetensors(LocalFiles(str(directory)))


def problems(directory):
  """All problems of a checkpoint: those of its headers, or the error if it cannot be read at all."""
  try:
    return read(directory).problems
  except CheckpointError as error:
    return error.problems


@pytest.fixture
def shards(save_sharded):
  """A directory of two shards and their index, and a function that writes the index again."""
  directory = save_sharded({ONE: ones("a", "b"), TWO: ones("c")})

  def write(**places):
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "b": ONE, "c": TWO} | places}))
    return directory

  return directory, write


class TestTheIndex:
  def test_a_whole_file_counts_before_it_with_a_note(self, shards, save):
    directory = save(ones("x"))
    found = read(directory)
    assert list(found.tensors) == ["x"]
    assert found.problems == ()
    assert any(SINGLE in note and INDEX in note and "file=" in note for note in found.notes)
    assert any(note.startswith(f"{ONE} and 1 more are not loaded") for note in found.notes)

  def test_its_files_may_be_gone_if_there_is_a_whole_file(self, shards, save):
    directory = save(ones("x"))
    (directory / ONE).unlink(), (directory / TWO).unlink()
    assert list(read(directory).tensors) == ["x"]
    assert problems(directory) == ()

  def test_one_that_lists_the_whole_file_is_no_note(self, save):
    directory = save(ones("x"))
    (directory / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    assert read(directory).notes == ()

  def test_without_a_whole_file_it_decides_and_others_are_noted(self, shards, save):
    directory = save(ones("a"), "consolidated.safetensors")
    found = read(directory)
    assert {name: info.file for name, info in found.tensors.items()} == {"a": ONE, "b": ONE, "c": TWO}
    assert found.notes == (
      "consolidated.safetensors is not loaded: the weights in the format of their author",
    )

  def test_headers_count_where_it_names_another_file(self, shards):
    found = read(shards[1](a=TWO))
    assert found.tensors["a"].file == ONE
    assert found.problems == ()
    assert found.notes == (f"{INDEX} puts a into another file than holds it: the headers count",)

  def test_headers_count_where_it_leaves_a_tensor_out(self, shards):
    directory, _ = shards
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "c": TWO}}))
    found = read(directory)
    assert set(found.tensors) == {"a", "b", "c"}
    assert found.notes == (f"{INDEX} does not list b, which the files hold: the headers count",)

  def test_a_tensor_that_no_file_holds_is_a_note(self, shards):
    """The model decides whether it is missing: a tied head is not."""
    found = read(shards[1](**{"lm_head.weight": TWO}))
    assert found.problems == ()
    assert found.notes == (f"{INDEX} lists lm_head.weight, which no file holds",)

  def test_one_of_a_variant_counts_if_it_is_the_only_one(self, shards):
    directory, _ = shards
    fp16, fp32 = (f"model.safetensors.index.{variant}.json" for variant in ("fp16", "fp32"))
    (directory / "consolidated.safetensors.index.json").write_bytes((directory / INDEX).read_bytes())
    (directory / INDEX).rename(directory / fp16)
    assert set(read(directory).tensors) == {"a", "b", "c"}
    (directory / fp32).write_bytes((directory / fp16).read_bytes())
    (problem,) = problems(directory)
    assert (
      problem == f"it holds several indexes ({fp16}, {fp32}): choose one with file=, such as file={fp16!r}"
    )

  def test_names_may_begin_with_a_dot(self, shards):
    found = read(shards[1](a=f"./{ONE}", b=f"./{ONE}"))
    assert set(found.tensors) == {"a", "b", "c"}
    assert (found.problems, found.notes) == ((), ())

  def test_it_may_list_files_in_folders(self, shards):
    directory, write = shards
    (directory / "parts").mkdir()
    (directory / TWO).rename(directory / "parts" / TWO)
    found = read(write(c=f"parts/{TWO}"))
    assert found.tensors["c"].file == f"parts/{TWO}"
    assert (found.problems, found.notes) == ((), ())

  def test_missing_files_are_one_problem(self, shards):
    directory, _ = shards
    (directory / ONE).unlink(), (directory / TWO).unlink()
    assert problems(directory) == (
      f"{ONE} and 1 more are missing, but {INDEX} lists them: the download or copy is incomplete",
    )

  def test_a_stale_one_names_what_there_is(self, shards, save):
    directory = save(ones("a"), "renamed.safetensors")
    (directory / ONE).unlink(), (directory / TWO).unlink()
    (problem,) = problems(directory)
    assert problem.endswith("remove the index to load renamed.safetensors instead")

  @pytest.mark.parametrize("kind", ["folder", "dangling", "loop"])
  def test_one_that_cannot_be_read_is_an_error(self, shards, kind):
    directory, _ = shards
    replace(directory / INDEX, kind)
    (problem,) = problems(directory)
    assert problem.startswith(f"{INDEX} is a {'folder' if kind == 'folder' else 'link'}")
    assert "remove it to load all safetensors files" in problem

  def test_many_contradictions_take_no_quadratic_time(self, save_sharded):
    index = {f"t{i}": ONE for i in range(50_000)}
    assert read(save_sharded({ONE: ones("a")}, index)).notes[0].startswith(f"{INDEX} lists t0 and 49999 more")


def replace(path, kind):
  path.unlink()
  if kind == "folder":
    path.mkdir()
  else:
    path.symlink_to(path.name if kind == "loop" else "nowhere")


class TestFiles:
  @pytest.mark.parametrize("kind", ["folder", "dangling", "loop"])
  @pytest.mark.parametrize("name", [TWO, SINGLE])
  def test_what_is_in_the_place_of_a_file_is_said(self, shards, save, name, kind):
    directory, _ = shards
    if name == SINGLE:
      directory = save(ones("a"), folder="alone")
    replace(directory / name, kind)
    (problem,) = problems(directory)
    said = {"folder": "is a folder", "dangling": "is a link to nowhere, which does not exist"}
    assert problem.startswith(f"{name} {said.get(kind, 'is a link that leads back to itself')}")

  @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
  def test_a_file_that_may_not_be_read_is_a_problem(self, shards):
    directory, _ = shards
    (directory / TWO).chmod(0)
    assert problems(directory) == (f"{TWO} cannot be read: Permission denied",)

  def test_a_missing_part_of_a_split_file_is_one_problem(self, shards):
    directory, _ = shards
    (directory / INDEX).unlink(), (directory / ONE).unlink()
    found = read(directory)
    assert found.problems == (f"{ONE} is missing: the download or copy is incomplete",)
    assert found.may_hold("a")

  def test_an_absurd_number_of_parts(self, save):
    found = read(save(ones("a"), "model-00001-of-99999.safetensors"))
    assert found.problems[0].startswith("model-00002-of-99999.safetensors is missing")

  @pytest.mark.parametrize("other", ["adapter_model.safetensors", "consolidated.safetensors"])
  def test_files_that_are_never_the_model_are_left_out(self, save, other):
    save(ones("a"), "weights.safetensors")
    found = read(save(ones("a", "b"), other))
    assert list(found.tensors) == ["a"]
    assert found.problems == ()
    assert found.notes[0].startswith(f"{other} is not loaded: ")

  def test_several_whole_files_are_one_problem_that_names_both(self, save):
    save(ones("a", "b", "c"), "model.fp16.safetensors")
    (problem,) = problems(save(ones("a", "b", "c"), "model.fp32.safetensors"))
    assert problem.startswith(
      "a and 2 more tensors occur twice: in model.fp16.safetensors and in model.fp32.safetensors"
    )
    assert "file='model.fp32.safetensors'" in problem

  def test_twins_in_other_formats_are_noted(self, save):
    directory = save(ones("a"))
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "tf_model.h5", "m.gguf"):
      (directory / name).write_bytes(b"x")
    for name in ("training_args.bin", "optimizer.pt", "README.md"):
      (directory / name).write_bytes(b"x")
    (directory / "original").mkdir()
    (directory / "original" / "consolidated.00.pth").write_bytes(b"x")
    (directory / "assets").mkdir()
    assert set(read(directory).notes) == {
      "pytorch_model-1.bin and 1 more are not loaded: pickles are never loaded",
      "tf_model.h5 is not loaded: the weights for another framework",
      "m.gguf is not loaded: GGUF files beside the weights; file= chooses one",
      "the folder original is not loaded: subfolder= chooses one",
    }

  def test_only_pickles_are_refused_with_the_remedy(self, tmp_path):
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "training_args.bin"):
      (tmp_path / name).write_bytes(b"PK\x03\x04")
    (problem,) = problems(tmp_path)
    assert problem.startswith("the weights are pickled (pytorch_model-1.bin and 1 more)")
    assert "save_pretrained(NEW_DIRECTORY)" in problem

  def test_folders_with_checkpoints_are_named(self, tmp_path):
    for name in ("checkpoint-500", "checkpoint-1000"):
      (tmp_path / name).mkdir()
      (tmp_path / name / "config.json").write_text("{}")
    (problem,) = problems(tmp_path)
    assert "in the folders checkpoint-1000, checkpoint-500: choose one with subfolder=" in problem


class TestKinds:
  def test_lfs_pointers_are_one_problem(self, save_sharded):
    directory = save_sharded({f"m-{i}.safetensors": ones(f"t{i}") for i in range(5)})
    for i in range(4):
      (directory / f"m-{i}.safetensors").write_text(POINTER)
    found = read(directory)
    assert found.problems == (
      "m-0.safetensors is a Git LFS pointer, not the file: run `git lfs pull` in the clone; so are 3 other files, such "
      "as m-1.safetensors",
    )
    assert [found.may_hold(f"t{i}") for i in range(5)] == [True] * 4 + [False]

  def test_a_json_file_may_be_one_too(self, tmp_path):
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(
      ConfigError, match=r"config\.json is a Git LFS pointer, not the file: run `git lfs pull`"
    ):
      read_json(LocalFiles(str(tmp_path)), "config.json")

  @pytest.mark.parametrize(
    ("content", "what"),
    [
      (b"<!DOCTYPE html><html>", "is a web page, not the file: download it again"),
      (b"PK\x03\x04rest", "is a pickle of PyTorch, and pickles are never loaded"),
      (bytes(100), "begins with zeros, as a download that was cut off leaves it"),
    ],
  )
  def test_what_lies_in_the_place_of_weights_is_said(self, tmp_path, content, what):
    (tmp_path / SINGLE).write_bytes(content)
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{SINGLE} {what}")

  def test_the_first_bytes_tell_the_kind_of_a_file_without_a_suffix(self, save):
    directory = save(ones("a"), "blob")
    for place in (directory, directory / "blob"):
      (format,) = formats_in(LocalFiles(str(place)))
      assert format is SAFETENSORS
      assert list(format.read(LocalFiles(str(place))).tensors) == ["a"]


@pytest.mark.parametrize("magic", [b"\x80\x02", b"\x1f\x8b"], ids=["pickle", "gzip"])
def test_a_length_with_the_first_bytes_of_another_kind_is_a_length(magic: bytes, tmp_path) -> None:
  length = int.from_bytes(magic, "little")
  header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
  (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
  assert read_safetensors(LocalFiles(str(tmp_path))).tensors["a"].shape == (1,)
