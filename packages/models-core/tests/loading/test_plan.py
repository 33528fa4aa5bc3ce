import dataclasses
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError, ModelsError, ShardingError
from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import INDEX, read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.plan import loaded_dtype, plan_load
from models_core.weights.table import Form, Ignored, Tied, WeightTable

BF16 = np.dtype(ml_dtypes.bfloat16)
L = "layers.{i}"


def zeros(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


@pytest.fixture
def plan(toy):
  """A plan for a toy model whose parameters are a table."""

  def make(directory, parameters, table, mesh=None, **options):
    return plan_load(
      read_safetensors(LocalFiles(str(directory))), abstract_model(toy, parameters, mesh), table, **options
    )

  return make


@dataclasses.dataclass
class Recorded:
  """Files that remember what was read of them."""

  files: LocalFiles
  reads: list

  @property
  def path(self):
    return self.files.path

  def names(self):
    return self.files.names()

  def size(self, name):
    return self.files.size(name)

  def read(self, name, start, stop):
    self.reads.append((name, start, stop))
    return self.files.read(name, start, stop)

  def fetch(self, names):
    raise AssertionError("planning fetches no file")


class TestProblems:
  def test_all_kinds_are_one_error_by_name_and_nothing_beyond_the_headers_first_read_is_read(
    self, save_sharded, toy
  ):
    big = 400_000  # Floats: more than the first read of a header takes.
    groups = {
      "m-1.safetensors": {"m.0.w": zeros(big), "m.1.w": zeros(big + 1)},
      "m-2.safetensors": {"m.2.w": zeros(big), "m.2.v": zeros(big), "m.4.w": zeros(big)},
    }
    files = Recorded(LocalFiles(str(save_sharded(groups))), [])
    forms = (Form("m.{i}.w", "d"), Form("m.{i}.v", "d"))
    table = WeightTable((f"{L}.w", forms))
    model = abstract_model(toy, {f"layers.{i}.w": ((big,), P()) for i in range(4)})
    with pytest.raises(CheckpointError) as caught:
      plan_load(read_safetensors(files), model, table)
    missing, extra, shape, doubled = (
      "m.3.w is missing: the parameter layers.3.w (400000,) needs it",
      "m.4.w (400000,) is unexpected: the model has no parameter for it",
      "m.1.w has shape (400001,), but the parameter layers.1.w (400000,) needs (400000,)",
      "layers.2.w occurs twice: the checkpoint holds it as m.2.w and m.2.v; remove one",
    )
    assert len(caught.value.problems) == 4
    for problem in (missing, extra, shape, doubled):
      assert any(found.startswith(problem) for found in caught.value.problems), problem
      assert problem in str(caught.value)
    assert str(files.path) in str(caught.value)
    assert isinstance(caught.value, ModelsError)
    assert isinstance(caught.value, ValueError)
    first_read = 256 * 1024
    assert {name for name, _, _ in files.reads} == {*groups, "model.safetensors.index.json"}
    assert all(stop <= first_read for _, _, stop in files.reads)
    assert all(files.size(name) > 2 * first_read for name in groups)

  def test_problems_of_headers_come_with_the_others(self, save_sharded, plan):
    directory = save_sharded({"m-1.safetensors": {"a": zeros(2)}, "m-2.safetensors": {"b": zeros(2)}})
    (directory / "m-2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
      plan(directory, {"a": ((3,), P()), "b": ((2,), P())}, WeightTable(("a", "a", "d"), ("b", "b", "d")))
    # b is not missing: it is in the broken file.
    broken, shape = caught.value.problems
    assert broken.startswith("m-2.safetensors: not a safetensors file: it has only 0 bytes")
    assert shape.startswith("a has shape (2,)")

  @pytest.mark.parametrize("damage", ["truncated", "absent"])
  def test_one_broken_or_missing_shard_is_one_problem(self, save_sharded, plan, damage):
    names = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    groups = {
      names[0]: {f"m.{i}.w": zeros(2) for i in range(6)},
      names[1]: {f"m.{i}.w": zeros(2) for i in range(6, 12)},
    }
    directory = save_sharded(groups | {names[1]: groups[names[1]] | {"head": zeros(4)}})
    parameters = {f"layers.{i}.w": ((2,), P()) for i in range(12)} | {"emb": ((4,), P())}
    table = WeightTable((f"{L}.w", "m.{i}.w", "d"), ("emb", "embed", "d"), tied=[Tied("head", "embed")])
    if damage == "truncated":
      os.truncate(directory / names[0], os.path.getsize(directory / names[0]) - 1)
    else:
      (directory / names[0]).unlink()
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["embed"] = names[0]
    for has_index in (True, False):
      (directory / INDEX).write_text(json.dumps(index)) if has_index else (directory / INDEX).unlink()
      with pytest.raises(CheckpointError) as caught:
        plan(directory, parameters, table)
      (problem,) = caught.value.problems
      assert problem.startswith(names[0])
      assert ("download it again" if damage == "truncated" else "incomplete") in problem

  def test_a_tensor_that_no_broken_file_should_hold_is_missing(self, save_sharded, plan):
    directory = save_sharded({"m-1.safetensors": {"a": zeros(2)}, "m-2.safetensors": {"b": zeros(2)}})
    (directory / "m-2.safetensors").write_bytes(b"")
    table = WeightTable(*((name, name, "d") for name in "abc"))
    with pytest.raises(CheckpointError) as caught:
      plan(directory, {name: ((2,), P()) for name in "abc"}, table)
    assert [problem.split()[0] for problem in caught.value.problems] == ["m-2.safetensors:", "c"]

  def test_what_many_layers_have_in_common_is_one_problem(self, save, plan):
    tensors = {f"m.{i}.w": zeros(3) for i in range(12)}
    with pytest.raises(CheckpointError) as caught:
      plan(
        save(tensors),
        {f"layers.{i}.w": ((2,), P()) for i in range(12)},
        WeightTable((f"{L}.w", "m.{i}.w", "d")),
      )
    (problem,) = caught.value.problems
    assert problem.startswith("m.0.w has shape (3,), but the parameter layers.0.w (2,) needs (2,)")
    assert problem.endswith("; the same in 11 other layers")

  def test_a_likely_misspelling_is_pointed_out(self, save, plan):
    with pytest.raises(
      CheckpointError, match=r"model.norm.wieght \(2,\) is unexpected.*similar to model.norm.weight"
    ):
      plan(
        save({"model.norm.wieght": zeros(2)}),
        {"a": ((2,), P())},
        WeightTable(("a", "model.norm.weight", "d")),
      )

  def test_a_long_list_of_problems_is_cut_and_counted(self, save, plan):
    tensors = {f"t{i}": zeros(1) for i in range(100)}
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors), {}, WeightTable())
    assert len(caught.value.problems) == 41
    assert caught.value.problems[-1] == "and 60 more"

  def test_a_stack_that_lacks_tensors_names_the_first_and_counts_the_rest(self, save, plan):
    with pytest.raises(CheckpointError, match=r"e\.1\.w and 2 more are missing"):
      plan(save({"e.0.w": zeros(2)}), {"a": ((4, 2), P())}, WeightTable(("a", "e.{e}.w", "d -> e d")))

  def test_layer_numbers_that_are_no_number_are_unexpected(self, save, plan):
    tensors = {"m.0.w": zeros(2), "m.00.w": zeros(2), "m.0x.w": zeros(2), "x.m.0.w": zeros(2)}
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors), {"layers.0.w": ((2,), P())}, WeightTable((f"{L}.w", "m.{i}.w", "d")))
    assert [problem.split()[0] for problem in caught.value.problems] == ["m.00.w", "m.0x.w", "x.m.0.w"]

  @pytest.mark.parametrize(
    ("rows", "message"),
    [
      ([("b", "b", "d")], "no row for the parameter a"),
      ([("a", "a", "d"), ("a", "b", "d")], "2 rows for the parameter a"),
    ],
  )
  def test_a_parameter_without_exactly_one_row_is_a_fault_of_the_table(self, save, plan, rows, message):
    with pytest.raises(TypeError, match=message):
      plan(save({"a": zeros(2)}), {"a": ((2,), P())}, WeightTable(*rows))


class TestForms:
  TABLE = WeightTable(
    ("gate", (Form("e.{e}.gate", "f d -> e f d"), Form("fused", "e (0/2 f) d -> e f d"))),
    ("up", (Form("e.{e}.up", "f d -> e f d"), Form("fused", "e (1/2 f) d -> e f d"))),
  )
  PARAMETERS = {"gate": ((2, 3, 4), P()), "up": ((2, 3, 4), P())}
  SPLIT = {f"e.{e}.{name}": zeros(3, 4) for e in range(2) for name in ("gate", "up")}

  def tensors_of(self, plan):
    return [[piece.tensor for piece in planned.pieces] for planned in plan.parameters]

  def test_the_form_that_is_there_is_chosen(self, save, plan):
    split = plan(save(self.SPLIT), self.PARAMETERS, self.TABLE)
    assert self.tensors_of(split) == [["e.0.gate", "e.1.gate"], ["e.0.up", "e.1.up"]]
    fused = plan(save({"fused": zeros(2, 6, 4)}), self.PARAMETERS, self.TABLE)
    assert self.tensors_of(fused) == [["fused"], ["fused"]]

  def test_two_complete_forms_are_duplicates(self, save, plan):
    with pytest.raises(CheckpointError) as caught:
      plan(save(self.SPLIT | {"fused": zeros(2, 6, 4)}), self.PARAMETERS, self.TABLE)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
      "gate occurs twice",
      "up occurs twice",
    ]

  def test_remains_of_another_form_are_unexpected(self, save, plan):
    with pytest.raises(CheckpointError) as caught:
      plan(save({"fused": zeros(2, 6, 4), "e.1.up": zeros(3, 4)}), self.PARAMETERS, self.TABLE)
    (problem,) = caught.value.problems
    assert problem.startswith("e.1.up (3, 4) is unexpected")

  def test_an_incomplete_form_is_reported_by_what_it_lacks(self, save, plan):
    tensors = {name: tensor for name, tensor in self.SPLIT.items() if name != "e.1.up"}
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors), self.PARAMETERS, self.TABLE)
    (problem,) = caught.value.problems
    assert problem.startswith("e.1.up is missing")


class TestLeftovers:
  TABLE = WeightTable(
    ("emb", "embed.weight", "v d"),
    (f"{L}.w", "m.{i}.w", "d"),
    ("head", "head.weight", "v d"),
    ignored=[Ignored("m.{i}.inv_freq", "follows from the configuration"), Ignored("scale", "unused")],
    tied=[Tied("head.weight", "embed.weight")],
  )
  PARAMETERS = {"emb": ((4, 2), P()), "layers.0.w": ((2,), P()), "layers.1.w": ((2,), P())}
  TENSORS = {"embed.weight": zeros(4, 2), "m.0.w": zeros(2), "m.1.w": zeros(2)}

  def test_ignored_tensors_are_listed_with_their_reason(self, save, plan):
    extra = {"m.0.inv_freq": zeros(1), "m.1.inv_freq": zeros(1), "scale": zeros(1)}
    made = plan(save(self.TENSORS | extra), self.PARAMETERS, self.TABLE)
    reason = "follows from the configuration"
    assert made.ignored == (("m.0.inv_freq", reason), ("m.1.inv_freq", reason), ("scale", "unused"))
    assert f"2 tensors not loaded: {reason}\n1 tensor not loaded: unused" in str(made)

  @pytest.mark.parametrize("name", ["m.0.inv_freq.x", "x.m.0.inv_freq", "m.01.inv_freq", "scales"])
  def test_an_ignored_pattern_matches_whole_names_only(self, save, plan, name):
    with pytest.raises(CheckpointError, match="unexpected"):
      plan(save(self.TENSORS | {name: zeros(1)}), self.PARAMETERS, self.TABLE)

  def test_a_cut_leaves_out_the_layers_beyond_it_and_nothing_else(self, save, plan):
    table = WeightTable(("emb", "embed", "d"), (f"{L}.w", "m.{i}.w", "d"), (f"{L}.bias", "m.{i}.bias", "d"))
    tensors = {"embed": zeros(2)} | {f"m.{i}.w": zeros(2) for i in range(4)}
    parameters = {"emb": ((2,), P())} | {f"layers.{i}.w": ((2,), P()) for i in range(2)}
    made = plan(save(tensors), parameters, table, layers=2)
    reason = "layers from 2 on, which were not requested"
    assert made.ignored == (("m.2.w", reason), ("m.3.w", reason))
    assert f"2 tensors not loaded: {reason}" in made.notes()
    assert made.stored_nbytes == 3 * 8
    # Within the cut a tensor must be the model's, as it must without a cut.
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors | {"m.1.bias": zeros(2)}), parameters, table, layers=2)
    assert [problem.split()[0] for problem in caught.value.problems] == ["m.1.bias"]
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors), parameters, table)
    assert [problem.split()[0] for problem in caught.value.problems] == ["m.2.w", "m.3.w"]

  def test_a_tied_head_in_the_file_is_a_promise_to_check(self, save, plan):
    made = plan(save(self.TENSORS | {"head.weight": zeros(4, 2)}), self.PARAMETERS, self.TABLE)
    assert made.ties == (Tied("head.weight", "embed.weight"),)
    assert made.ignored == ()
    assert "head.weight must equal embed.weight" in str(made)

  def test_a_head_that_the_model_has_is_no_tie(self, save, plan):
    parameters = self.PARAMETERS | {"head": ((4, 2), P())}
    made = plan(save(self.TENSORS | {"head.weight": zeros(4, 2)}), parameters, self.TABLE)
    assert made.ties == ()

  def test_a_head_that_stands_for_the_embedding_must_have_its_shape(self, save, plan):
    tensors = {name: tensor for name, tensor in self.TENSORS.items() if name != "embed.weight"}
    with pytest.raises(CheckpointError) as caught:
      plan(save(tensors | {"head.weight": zeros(5, 2)}), self.PARAMETERS, self.TABLE)
    (problem,) = caught.value.problems
    assert problem.startswith("head.weight has shape (5, 2), but the parameter ")


class TestCosts:
  TABLE = WeightTable(("a", "a", "v d"), ("b", "b", "d"), ("c", "c.{e}", "d -> e d"))
  PARAMETERS = {
    "a": ((8, 4), P("fsdp", "tp")),
    "b": ((4,), P()),
    "c": ((2, 4), P(None, ("fsdp", "tp")), np.int8),
  }
  TENSORS = {
    "a": zeros(8, 4, dtype=BF16),
    "b": zeros(4),
    "c.0": zeros(4, dtype=np.int8),
    "c.1": zeros(4, dtype=np.int8),
  }

  def test_bytes_are_counted_as_stored_and_as_held(self, save, plan, mesh):
    made = plan(save(self.TENSORS), self.PARAMETERS, self.TABLE, mesh, dtype=np.dtype(np.float32))
    assert made.num_parameters == 32 + 4 + 8
    assert made.stored_nbytes == 64 + 16 + 8
    # A quarter of a, all of b, a quarter of c, which is of integers and stays so.
    assert made.bytes_per_device() == dict.fromkeys(mesh.devices.flat, 32 + 16 + 2)
    assert made.casts() == {("bfloat16", "float32"): 1}
    assert made.files == ("model.safetensors",)
    assert [planned.nbytes for planned in made.parameters] == [128, 16, 8]

  def test_a_plan_prints_what_it_will_do(self, save, plan, mesh):
    directory = save(self.TENSORS)
    made = plan(directory, self.PARAMETERS, self.TABLE, mesh, dtype=BF16)
    assert str(made).splitlines() == [
      f"44 parameters, 0.0 MiB to read from 1 file of {directory}",
      "4 devices, each holding 0.0 MiB",
      "1 tensor: float32 -> bfloat16",
    ]

  def test_without_a_mesh_one_device_holds_all(self, save, plan):
    made = plan(save(self.TENSORS), self.PARAMETERS, self.TABLE)
    assert list(made.bytes_per_device().values()) == [64 + 16 + 8]
    assert made.casts() == {}

  def test_misfits_are_said_once_for_all_layers(self, save, plan, mesh):
    tensors = {f"m.{i}.w": zeros(3, 4) for i in range(12)}
    parameters = {f"layers.{i}.w": ((3, 4), P("tp", "pp")) for i in range(12)}
    made = plan(save(tensors), parameters, WeightTable((f"{L}.w", "m.{i}.w", "v d")), mesh)
    notes = made.replicated()
    assert len(notes) == 2
    assert notes[0].startswith("layers.*.w, axis 0: replicated, since 3 is not divisible by tp=2")
    assert notes[1].startswith("layers.*.w, axis 1: replicated, since the mesh has no axis 'pp'")
    assert str(made).endswith("\n".join(notes))

  def test_strict_sharding_lists_all_misfits(self, toy, mesh):
    parameters = {f"layers.{i}.w": ((3, 6), P("tp", "pp")) for i in range(2)}
    with pytest.raises(ShardingError) as caught:
      abstract_model(toy, parameters, mesh, strict=True)
    assert "3 is not divisible by tp=2 (sizes that divide it: 1, 3)" in str(caught.value)
    assert "no axis 'pp'" in str(caught.value)
    abstract_model(toy, {"a": ((4, 6), P("tp", "fsdp"))}, mesh, strict=True)


@pytest.mark.parametrize(
  ("stored", "dtype", "loaded"),
  [
    (["float32"], None, "float32"),
    (["bfloat16"], None, "bfloat16"),
    (["bfloat16"], "float32", "float32"),
    (["int8"], "float32", "int8"),
    (["bool"], "bfloat16", "bool"),
    (["complex64"], "bfloat16", "complex64"),
    (["float8_e4m3fn"], "bfloat16", "bfloat16"),
    (["float8_e8m0fnu"], None, "float8_e8m0fnu"),
    (["bfloat16", "float32"], None, "float32"),
    (["bfloat16", "float16"], None, "float32"),
    (["float8_e4m3fn", "bfloat16"], None, "bfloat16"),
    (["int32", "bfloat16"], None, "bfloat16"),
    (["int32", "bfloat16"], "float32", "float32"),
    (["float64"], None, "float32"),
    (["int64"], None, "int32"),
    (["uint64"], None, "uint32"),
    (["float32"], "float64", "float32"),
  ],
)
def test_a_parameters_dtype_holds_all_of_its_tensors(stored, dtype, loaded):
  dtypes = [jnp.dtype(name) for name in stored]
  for order in (dtypes, dtypes[::-1]):
    assert loaded_dtype(order, dtype and jnp.dtype(dtype)) == jnp.dtype(loaded)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_parameters_are_not_cast_to_what_is_no_float(dtype):
  with pytest.raises(TypeError, match="floating-point"):
    loaded_dtype([np.dtype(np.float32)], np.dtype(dtype))
