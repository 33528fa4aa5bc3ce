"""A folder of some files, or one of several checkpoints in them."""

import dataclasses
import json

import numpy as np
import pytest

from models_core.errors import CheckpointError, ConfigError
from models_core.formats import LocalFiles, RangeFiles, open_folder, read_safetensors, select

GGUFS = (
  "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "BF16/m-BF16.gguf",
  "mmproj-F16.gguf",
)  # fmt: skip
OTHERS = ("README.md", "config.json", "tokenizer.json")


@dataclasses.dataclass
class Memory:
  """Files of a source that lists folders, too."""

  contents: dict
  path: str = "memory"
  revision: str = "abc"

  def names(self):
    return sorted(self.contents)

  def size(self, name):
    return len(self.contents[name])

  def read(self, name, start, stop):
    return self.contents[name][start:stop]

  def fetch(self, names):
    assert set(names) <= set(self.contents)
    return "fetched"


class Ranges(Memory):
  def read_into(self, name, start, buffer):
    buffer[:] = self.contents[name][start : start + len(buffer)]


@pytest.fixture
def files():
  return Memory(dict.fromkeys((*GGUFS, *OTHERS), b"x"))


@pytest.mark.parametrize(
  ("asked", "chosen"),
  [
    ({"file": "m-Q4_K_M.gguf"}, ["m-Q4_K_M.gguf"]),
    ({"file": "./m-Q4_K_M.gguf"}, ["m-Q4_K_M.gguf"]),
    ({"file": "*q4_k_m*"}, ["m-Q4_K_M.gguf"]),
    ({"file": "*Q8_0*"}, list(GGUFS[2:4])),
    ({"file": "m-Q8_0-00002-of-00002.gguf"}, list(GGUFS[2:4])),
    ({"file": "BF16/*"}, ["BF16/m-BF16.gguf"]),
    ({"file": "m-BF16.gguf"}, ["BF16/m-BF16.gguf"]),
    ({"file": "*F16*"}, ["BF16/m-BF16.gguf"]),
    ({"file": "mmproj-F16.gguf"}, ["mmproj-F16.gguf"]),
    ({"quantisation": "Q4_K_M"}, ["m-Q4_K_M.gguf"]),
    ({"quantisation": "q8_0"}, list(GGUFS[2:4])),
    ({"quantisation": "UD-Q4_K_XL"}, ["m-UD-Q4_K_XL.gguf"]),
    ({"quantisation": "BF16"}, ["BF16/m-BF16.gguf"]),
  ],
)
def test_a_gguf_file_is_chosen_with_the_files_that_belong_to_all(files, asked, chosen):
  found = select(files, **asked)
  assert found.names() == tuple(sorted([*chosen, *OTHERS]))
  assert found.path == f"memory/{chosen[0]}"
  assert found.revision == "abc"


@pytest.mark.parametrize("asked", [{"file": "*Q5*"}, {"quantisation": "Q4_K"}, {"variant": "fp16"}])
def test_none_is_an_error_that_lists_them(files, asked):
  with pytest.raises(CheckpointError) as caught:
    select(files, **asked)
  (problem,) = caught.value.problems
  assert all(name in problem for name in GGUFS if "00002-of" not in name)
  assert "README.md" not in problem


def test_several_are_an_error_that_lists_them(files):
  with pytest.raises(
    CheckpointError, match=r"file '\*Q4\*' names several: choose one of m-Q4_K_M.gguf, m-UD-"
  ):
    select(files, file="*Q4*")


def test_one_choice_is_enough(files):
  with pytest.raises(ConfigError, match="file 'a' and variant 'b' both choose the weights"):
    select(files, file="a", variant="b")


def test_a_whole_name_may_be_that_of_any_file(files):
  files.contents["sha256-1"] = files.contents["sha256-2"] = b"GGUF"
  found = select(files, file="sha256-1")
  assert found.names() == ("sha256-1",)
  assert found.path == "memory/sha256-1"


def test_nothing_asked_changes_nothing(files):
  assert select(files) is files
  assert open_folder(files, ".") is files


def test_variants_are_those_of_transformers(save, save_sharded):
  save({"a": np.zeros(2, np.float32)})
  save({"a": np.ones(2, np.float32)}, "model.fp16.safetensors")
  directory = save({"a": np.ones(3, np.float32)}, "model.fp8-00001-of-00001.safetensors")
  index = {"weight_map": {"a": "model.fp8-00001-of-00001.safetensors"}}
  (directory / "model.safetensors.index.fp8.json").write_text(json.dumps(index))
  files = LocalFiles(str(directory))
  chosen = {variant: read_safetensors(select(files, variant=variant)) for variant in ("fp16", "fp8")}
  assert chosen["fp16"].tensors["a"].file == "model.fp16.safetensors"
  assert chosen["fp8"].tensors["a"].file == "model.fp8-00001-of-00001.safetensors"
  assert read_safetensors(files).tensors["a"].file == "model.safetensors"
  assert chosen["fp16"].notes == chosen["fp8"].notes == ()


def test_an_index_may_be_chosen_before_a_whole_file(save, save_sharded):
  save({"a": np.zeros(2, np.float32)})
  directory = save_sharded({"m-1.safetensors": {"a": np.ones(2, np.float32)}})
  for file in ("model.safetensors.index.json", "m-1.safetensors"):
    assert (
      read_safetensors(select(LocalFiles(str(directory)), file=file)).tensors["a"].file == "m-1.safetensors"
    )


def test_a_folder_is_a_checkpoint_of_its_own():
  files = Memory({"run/5/config.json": b"five", "run/5/x/y": b"", "config.json": b"top"})
  folder = open_folder(files, "run/5/")
  assert folder.names() == ("config.json", "x/y")
  assert (folder.path, folder.revision) == ("memory/run/5", "abc")
  assert folder.read("config.json", 0, 9) == b"five"
  assert folder.size("config.json") == 4
  assert folder.fetch(["config.json"]) == "fetched/run/5"
  assert not isinstance(folder, RangeFiles)


def test_ranges_are_read_through_a_selection():
  files = open_folder(Ranges({"run/a": b"0123"}), "run")
  assert isinstance(files, RangeFiles)
  files.read_into("a", 1, buffer := memoryview(bytearray(2)))
  assert bytes(buffer) == b"12"


@pytest.mark.parametrize("folder", ["checkpoint-50", "..", "../other"])
def test_a_missing_folder_is_an_error_that_lists_them(tmp_path, folder):
  (tmp_path / "here" / "checkpoint-500").mkdir(parents=True)
  (tmp_path / "other").mkdir()
  (tmp_path / "here" / "checkpoint-500" / "config.json").write_text("{}")
  files = LocalFiles(str(tmp_path / "here"))
  with pytest.raises(
    CheckpointError, match=r"there is no folder .*: the folders with a checkpoint are checkpoint-500"
  ):
    open_folder(files, folder)
  assert open_folder(files, "checkpoint-500").names() == ["config.json"]
