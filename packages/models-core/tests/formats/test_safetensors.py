import json
import math
import os
import random
import struct

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles, as_files
from models_core.formats.json_files import parse_json
from models_core.formats.safetensors import DTYPES, INDEX, is_inside, read_safetensors, read_safetensors_file


def raw(header, data=b"", length=None):
  """A file whose header may say anything."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def problems(directory):
  """All problems of a checkpoint: those of its headers, or the error if it cannot be read at all."""
  try:
    return read_safetensors(LocalFiles(str(directory))).problems
  except CheckpointError as error:
    return error.problems if error.where == str(directory) else ()


@pytest.fixture
def broken(tmp_path):
  """Writes a file and returns its only problem."""

  def write(content):
    (tmp_path / "model.safetensors").write_bytes(content)
    (problem,) = problems(tmp_path)
    return problem

  return write


def test_every_dtype_of_the_format_that_jax_has_is_read(save, kinds):
  assert {kind: dtype for dtype, kind in kinds.items()} == DTYPES
  tensors = {kind: np.zeros((2, 3), dtype) for dtype, kind in kinds.items()}
  directory = save(tensors)
  checkpoint = read_safetensors(LocalFiles(str(directory)))
  content = (directory / "model.safetensors").read_bytes()
  assert checkpoint.problems == ()
  assert checkpoint.format.naming == "huggingface"
  for kind, info in checkpoint.tensors.items():
    assert (info.name, info.dtype, info.shape, info.file) == (kind, DTYPES[kind], (2, 3), "model.safetensors")
    assert content[info.start : info.stop] == tensors[kind].tobytes()


def test_what_the_safetensors_library_writes_is_read(tmp_path, rng):
  kinds = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
  tensors = {kind: rng.integers(0, 2, (3, 2)).astype(kind) for kind in kinds}
  tensors |= {"scalar": np.array(1.5, np.float32), "empty": np.zeros((0, 4), np.float32)}
  safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
  checkpoint = read_safetensors(LocalFiles(str(tmp_path)))
  content = (tmp_path / "model.safetensors").read_bytes()
  assert checkpoint.metadata == {"format": "np"}
  assert set(checkpoint.tensors) == set(tensors)
  for name, tensor in tensors.items():
    info = checkpoint.tensors[name]
    assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
    np.testing.assert_array_equal(
      np.frombuffer(content[info.start : info.stop], tensor.dtype), tensor.reshape(-1)
    )


def test_a_header_longer_than_the_first_read_is_read_whole(save):
  tensors = {f"a.long.name.of.a.tensor.{i}": np.full(1, i, np.float32) for i in range(4000)}
  directory = save(tensors)
  assert os.path.getsize(directory / "model.safetensors") > 256 * 1024
  checkpoint = read_safetensors(LocalFiles(str(directory)))
  assert checkpoint.problems == ()
  assert len(checkpoint.tensors) == 4000


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_metadata_is_optional(save, metadata):
  checkpoint = read_safetensors(LocalFiles(str(save({"a": np.zeros(2, np.float32)}, metadata=metadata))))
  assert checkpoint.metadata == (metadata or {})
  assert list(checkpoint.tensors) == ["a"]


def test_one_file_is_a_checkpoint_whatever_its_name(save):
  directory = save({"a": np.zeros(2, np.float32)}, "any name.safetensors")
  for place in (directory, directory / "any name.safetensors"):
    assert list(read_safetensors(as_files(place)).tensors) == ["a"]


def test_without_an_index_model_safetensors_counts_alone(save):
  save({"a": np.zeros(2, np.float32)})
  directory = save({"a": np.zeros(2, np.float32)}, "consolidated.safetensors")
  checkpoint = read_safetensors(LocalFiles(str(directory)))
  assert checkpoint.problems == ()
  assert checkpoint.tensors["a"].file == "model.safetensors"


def test_without_either_all_files_count_and_duplicates_are_named(save):
  save({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, "x-1.safetensors")
  directory = save({"b": np.zeros(2, np.float32), "c": np.zeros(2, np.float32)}, "x-2.safetensors")
  (problem,) = problems(directory)
  assert problem == "b occurs twice: in x-1.safetensors and in x-2.safetensors; remove one"


def test_a_missing_shard_is_named(save_sharded):
  directory = save_sharded({"m-1.safetensors": {"a": np.zeros(2, np.float32)}, "m-2.safetensors": {}})
  (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-3.safetensors"}}))
  (problem,) = problems(directory)
  assert "m-3.safetensors is missing" in problem
  assert "incomplete" in problem


def test_a_broken_shard_is_one_problem_not_one_for_each_of_its_tensors(save_sharded):
  one, two = {"a": np.zeros(2, np.float32)}, {f"b{i}": np.zeros(2, np.float32) for i in range(9)}
  directory = save_sharded({"m-1.safetensors": one, "m-2.safetensors": two})
  os.truncate(directory / "m-2.safetensors", os.path.getsize(directory / "m-2.safetensors") - 1)
  (problem,) = problems(directory)
  assert problem.startswith("m-2.safetensors: ")


def test_all_broken_shards_are_named_at_once(save_sharded):
  directory = save_sharded({f"m-{i}.safetensors": {f"t{i}": np.zeros(2, np.float32)} for i in range(3)})
  for i in (0, 2):
    (directory / f"m-{i}.safetensors").write_bytes(b"")
  assert [problem.split(":")[0] for problem in problems(directory)] == ["m-0.safetensors", "m-2.safetensors"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is not valid JSON"),
    ("[]", "type list, expected a JSON object"),
    ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": []}', "no weight_map"),
    ('{"weight_map": {"a": 1}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "../m.safetensors"}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "x/../../m.safetensors"}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "..\\\\m.safetensors"}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "m\\u0000.safetensors"}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": ""}}', "which is not a file name within the directory"),
    ('{"weight_map": {"a": "m", "a": "n"}}', "the key 'a' occurs twice"),
    ("[" * 100_000, "is not valid JSON"),
    ("{}" + " " * (16 << 20), "it has 16777218 bytes, but at most 16777216 are read"),
  ],
)
def test_an_index_that_cannot_be_trusted_is_one_problem(tmp_path, content, message):
  (tmp_path / INDEX).write_text(content)
  (problem,) = problems(tmp_path)
  assert INDEX in problem
  assert message in problem


def test_an_index_that_is_not_utf8_is_one_problem(tmp_path):
  (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": "m"}}')
  (problem,) = problems(tmp_path)
  assert INDEX in problem


@pytest.mark.parametrize("name", ["a", "a.safetensors", "a/b", "./a", "a/../b"])
def test_a_name_inside_of_the_directory_is_inside(name):
  assert is_inside(name)


@pytest.mark.parametrize("name", ["", "..", "../a", "a/../../b", "/a", "\\a", "a\\b", "a\0"])
def test_a_name_outside_of_the_directory_is_not_inside(name):
  assert not is_inside(name)


def test_an_empty_directory_says_so(tmp_path):
  assert problems(tmp_path) == ("no safetensors file: the directory is empty",)


def test_a_directory_of_other_files_lists_them(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  assert problems(tmp_path) == ("no safetensors file among config.json",)


def test_a_missing_directory_says_so(tmp_path):
  assert problems(tmp_path / "nowhere") == ("there is no such file or directory",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
  (tmp_path / name).write_bytes(b"x")
  (problem,) = problems(tmp_path)
  assert name in problem
  assert "convert them to safetensors" in problem


def test_an_adapter_is_refused_as_one(tmp_path):
  (tmp_path / "adapter_config.json").write_text("{}")
  (tmp_path / "adapter_model.bin").write_bytes(b"x")
  (problem,) = problems(tmp_path)
  assert "adapter" in problem


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "not a safetensors file: it has only 0 bytes"),
    (b"1234567", "not a safetensors file: it has only 7 bytes"),
    (raw({}, length=2**63), "truncated"),
    (raw({}, length=2**64 - 1), "truncated"),
    (raw({}, length=100_000_001), "truncated"),
    (raw(b" " * ((16 << 20) + 1)), "the header has 16777217 bytes, but at most 16777216 are read"),
    (raw({}, length=3), "truncated"),
    (raw(b"{"), "not valid"),
    (raw(b""), "not valid"),
    (raw(b'{"a": \xff}'), "not valid"),
    (raw(b"[" * 100_000), "not valid"),
    (raw(b'{"a": ' + b"1" * 5000 + b"}"), "not valid"),
    (raw(b'{"a": 1, "a": 2}'), "the key 'a' occurs twice"),
    (raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "the key 'dtype' occurs twice"),
    (raw([]), "type list, expected a JSON object"),
    (raw(None), "type NoneType, expected a JSON object"),
    (raw({"__metadata__": [1]}), "__metadata__ in the header is not a JSON object"),
    (raw({"a": 1}), "a: its header entry is not a JSON object"),
    (raw({"a": {}}), "a: its header entry lacks dtype, shape, data_offsets"),
    (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "a: its header entry lacks data_offsets"),
    (raw({"a": entry("F4")}, bytes(8)), "'F4' is not one of"),
    (raw({"a": entry("f32")}, bytes(8)), "'f32' is not one of"),
    (raw({"a": entry(["F32"])}, bytes(8)), "a: its dtype ['F32'] is not one of"),
    (raw({"a": entry(None)}, bytes(8)), "None is not one of"),
    (raw({"a": entry(shape=[3])}, bytes(8)), "its data_offsets span 8 bytes, which does not fit"),
    (raw({"a": entry("BF16")}, bytes(8)), "its data_offsets span 8 bytes, which does not fit"),
    (raw({"a": entry(shape=[-2])}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry(shape=[-1, -2])}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry(shape=[2.0])}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry("U8", [True], [0, 1])}, bytes(1)), "expected a list of whole numbers"),
    (raw({"a": entry(shape=["2"])}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry(shape=[2**64])}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "its data_offsets span 8 bytes, which does not fit"),
    (raw({"a": entry() | {"shape": 2}}, bytes(8)), "expected a list of whole numbers"),
    (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "its data_offsets span -8 bytes, which does not fit"),
    (raw({"a": entry(offsets=[0])}, bytes(8)), "a: its data_offsets is [0], expected two numbers"),
    (
      raw({"a": entry(offsets=[0, 8, 8])}, bytes(8)),
      "a: its data_offsets is [0, 8, 8], expected two numbers",
    ),
    (
      raw({"a": entry(offsets=[-8, 0])}, bytes(8)),
      "its data_offsets is [-8, 0], expected a list of whole numbers",
    ),
    (raw({"a": entry()}, bytes(7)), "truncated or overwritten"),
    (raw({"a": entry()}, bytes(9)), "truncated or overwritten"),
    (raw({}, bytes(1)), "truncated or overwritten"),
    (
      raw({"a": entry(offsets=[4, 12])}, bytes(12)),
      "a: its data starts at byte 74 and leaves a gap after what precedes it, which ends at byte 70",
    ),
    (
      raw({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
      "b: its data starts at byte 144 and leaves a gap",
    ),
    (
      raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
      "b: its data starts at byte 135 and overlaps",
    ),
    (raw({"a": entry(), "b": entry()}, bytes(8)), "b: its data starts at byte 130 and overlaps"),
  ],
  ids=range(45),
)
def test_a_broken_file_is_one_problem_that_names_it(broken, content, message):
  problem = broken(content)
  assert problem.startswith("model.safetensors: ")
  assert message in problem


def test_all_broken_entries_of_a_header_are_named(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(raw({"a": 1, "b": entry("X"), "c": entry()}, bytes(8)))
  assert [problem.split(": ")[1] for problem in problems(tmp_path)] == ["a", "b"]


def test_tensors_may_be_empty_scalar_and_in_any_order(tmp_path):
  header = {
    "later": entry(shape=[], offsets=[8, 12]),
    "empty": entry(shape=[0, 7], offsets=[8, 8]),
    "first": entry(),
    "none": entry(shape=[0], offsets=[0, 0]),
  }
  (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(12)))
  checkpoint = read_safetensors_file(LocalFiles(str(tmp_path)), "model.safetensors")
  assert list(checkpoint.tensors) == ["none", "first", "empty", "later"]


@pytest.mark.parametrize("text", [b'{"a": 1, "b": {"a": 1}}', b"[1]", b"null"])
def test_json_without_duplicate_keys_is_what_json_says(text):
  assert parse_json(text) == json.loads(text)


def test_a_mutated_file_is_read_consistently_or_refused_as_a_checkpoint_error(save, tmp_path):
  tensors = {
    "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "c": np.zeros((), np.int8),
    "d": np.ones(5, "u2"),
  }
  good = (save(tensors, metadata={"format": "pt"}) / "model.safetensors").read_bytes()
  header = len(good) - sum(tensor.nbytes for tensor in tensors.values())
  rnd = random.Random(0)

  class Memory:
    path = "memory"

    def names(self):
      return ["model.safetensors"]

    def size(self, name):
      return len(content)

    def read(self, name, start, stop):
      return content[start:stop]

  accepted = refused = 0
  for _ in range(trials := 4000):
    mutant = bytearray(good)
    for _ in range(rnd.choice([1, 1, 2, 5])):
      at = rnd.randrange(8, header)
      match rnd.randrange(4):
        case 0:
          mutant[at] = rnd.randrange(256)
        case 1:
          mutant[at] = rnd.choice(b'0123456789-.,:[]{}"')
        case 2:
          del mutant[at : at + rnd.randrange(1, 9)]
        case 3:
          mutant[at:at] = rnd.choice([b"0", b"9", b"-", b"e9", b",1", b"null", mutant[at : at + 20]])
    if rnd.random() < 0.7:  # Otherwise the length is wrong, and nothing else is checked.
      mutant[:8] = struct.pack("<Q", len(mutant) - 8 - (len(good) - header))
    content = bytes(mutant)
    try:
      infos = read_safetensors_file(Memory(), "model.safetensors").tensors.values()
    except CheckpointError as error:
      refused += error.where == "memory/model.safetensors"
      continue
    accepted += 1
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for info in infos:
      assert info.start == end
      assert info.stop - info.start == math.prod(info.shape) * info.dtype.itemsize
      end = info.stop
    assert end == len(content)
  assert accepted + refused == trials
  assert accepted > 50
