"""Which process reads what, on meshes of several processes that are described alone, and what devices exchange."""

import dataclasses
import math
import os
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import SafetensorsCheckpoint
from models_core.formats.tensors import Codec, TensorInfo
from models_core.loading.abstract import AbstractModel, AbstractParameter
from models_core.loading.plan import plan_load
from models_core.loading.process_split import part_to_read, redistribute
from models_core.weights.table import Tied, WeightTable

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Device:
  """A device of a process that does not run: what a mesh and its shardings ask of one."""

  platform = device_kind = "cpu"

  def __init__(self, number, process, this):
    self.id, self.process_index = number, process
    self.client = types.SimpleNamespace(process_index=lambda: this)


def processes(count, shape, names=("fsdp", "tp"), this=0):
  """A mesh whose devices belong in their order to so many processes; the code runs in process `this`."""
  size = math.prod(shape)
  devices = [Device(i, i * count // size, this) for i in range(size)]
  return Mesh(np.array(devices).reshape(shape), names)


def plan_of(mesh, parameters, table, tensors):
  """A plan of shapes and specs; `tensors` are shapes, or TensorInfos."""
  infos = {
    name: t
    if isinstance(t, TensorInfo)
    else TensorInfo(name, F32, t, "model.safetensors", 0, 4 * math.prod(t))
    for name, t in tensors.items()
  }
  abstract = {
    name: AbstractParameter(name, shape, F32, NamedSharding(mesh, spec), "normal", ())
    for name, (shape, spec) in parameters.items()
  }
  checkpoint = SafetensorsCheckpoint(LocalFiles(os.path.dirname(__file__)), infos)
  return plan_load(checkpoint, AbstractModel(abstract, None, {}, None, None), table)


def read_by(plan, process):
  """For each parameter, the elements of its only tensor that a process reads, by their places."""
  found = {}
  for planned in plan.parameters:
    way = part_to_read(planned, plan.checkpoint.tensors)
    shape, run = way.parameter.shape, way.pieces[0].run
    places = np.arange(math.prod(shape)).reshape(shape) + run
    held = [
      places[index].reshape(-1)
      for device, index in way.parameter.sharding.devices_indices_map(shape).items()
      if device.process_index == process
    ]
    found[planned.parameter.name] = set(np.concatenate(held).tolist())
  return found


class TestWays:
  @pytest.mark.parametrize(
    ("shape", "spec", "layout", "expected"),
    [
      # Each process's shards are rows of its own: they are read as they are.
      ((8, 6), P("fsdp"), "v d", (8, 6)),
      ((8, 6), P(("fsdp", "tp")), "v d", (8, 6)),
      # All processes hold all of it, or scattered parts: each reads rows of its own.
      ((8, 6), P(), "v d", (8, 6)),
      ((8, 6), P(None, "fsdp"), "v d", (8, 6)),
      # No rows to split evenly, but elements.
      ((3, 8), P(None, "fsdp"), "v d", (24,)),
      # Neither: as they are.
      ((3, 5), P(), "v d", (3, 5)),
      # Turned tensors are no run, so that only rows can be split.
      ((8, 6), P(None, "fsdp"), "d v -> v d", (8, 6)),
      ((3, 8), P(None, "fsdp"), "d v -> v d", (3, 8)),
    ],
  )
  def test_each_element_is_read_by_as_few_processes_as_can_be(self, shape, spec, layout, expected):
    mesh = processes(2, (2, 2))
    stored = shape if layout == "v d" else shape[::-1]
    plan = plan_of(mesh, {"x": (shape, spec)}, WeightTable(("x", "x", layout)), {"x": stored})
    way = part_to_read(plan.parameters[0], plan.checkpoint.tensors)
    assert way.parameter.shape == expected
    size = math.prod(shape)
    assert way.parameter.sharding.mesh.size == 4
    assert way.dtype == F32
    if layout == "v d" and expected != (3, 5):
      by = [read_by(plan, process)["x"] for process in range(2)]
      assert by[0] | by[1] == set(range(size))
      assert not by[0] & by[1]

  def test_a_way_that_is_no_better_is_not_taken(self):
    """What is exchanged costs: rows that the processes hold anyway stay where they are."""
    mesh = processes(2, (2, 2))
    plan = plan_of(mesh, {"x": ((8, 6), P("fsdp", "tp"))}, WeightTable(("x", "x", "v d")), {"x": (8, 6)})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors) is plan.parameters[0]

  def test_one_process_reads_all_as_it_is(self):
    mesh = processes(1, (2, 2))
    plan = plan_of(mesh, {"x": ((8, 6), P(None, "tp"))}, WeightTable(("x", "x", "v d")), {"x": (8, 6)})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors) is plan.parameters[0]

  def test_one_device_reads_all_as_it_is(self):
    mesh = processes(2, (2, 2))
    plan = plan_of(mesh, {"x": ((8, 6), P())}, WeightTable(("x", "x", "v d")), {"x": (8, 6)})
    parameter = dataclasses.replace(
      plan.parameters[0].parameter, sharding=SingleDeviceSharding(jax.devices()[0])
    )
    planned = dataclasses.replace(plan.parameters[0], parameter=parameter)
    assert part_to_read(planned, plan.checkpoint.tensors) is planned

  @pytest.mark.parametrize("dtype", [F64, np.dtype(np.complex64), np.dtype(np.int64)], ids=str)
  def test_elements_wider_than_jax_s_integers_are_never_exchanged(self, dtype):
    plan = plan_of(processes(2, (2, 2)), {"x": ((8, 6), P())}, WeightTable(("x", "x", "v d")), {"x": (8, 6)})
    planned = dataclasses.replace(plan.parameters[0], dtype=dtype)
    assert part_to_read(planned, plan.checkpoint.tensors) is planned

  @pytest.mark.parametrize(("block", "expected"), [(2, (24,)), (6, (24,)), (4, (3, 8)), (8, (3, 8))])
  def test_blocks_of_a_codec_are_not_cut(self, block, expected):
    """Of 24 elements on four devices each reads 6, where that is whole blocks."""
    codec = Codec("Q", block, block, lambda data: data)
    info = TensorInfo("x", F32, (3, 8), "m.gguf", 0, 24, codec)
    mesh = processes(2, (2, 2))
    plan = plan_of(mesh, {"x": ((3, 8), P(None, "fsdp"))}, WeightTable(("x", "x", "v d")), {"x": info})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors).parameter.shape == expected

  def test_cells_are_no_run(self):
    info = TensorInfo("x", F32, (3, 8), "tree", 0, 96, cell=(3, 4))
    mesh = processes(2, (2, 2))
    plan = plan_of(mesh, {"x": ((3, 8), P(None, "fsdp"))}, WeightTable(("x", "x", "v d")), {"x": info})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors) is plan.parameters[0]

  def test_the_run_of_a_fused_tensor_s_part(self):
    """The second half of a tensor [2, 3, 8] is 24 elements from element 24 on."""
    mesh = processes(2, (2, 2))
    table = WeightTable(("x", "kv", "1/2 v d -> v d"))
    plan = plan_of(mesh, {"x": ((3, 8), P(None, "fsdp"))}, table, {"kv": (2, 3, 8)})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors).parameter.shape == (24,)
    by = [read_by(plan, process)["x"] for process in range(2)]
    assert (by[0], by[1]) == (set(range(24, 36)), set(range(36, 48)))

  @pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "fsdp", "tp"), P("tp")], ids=str)
  def test_stacks_are_split_by_their_members(self, spec):
    mesh = processes(4, (2, 2))
    table = WeightTable(("x", "e.{e}", "f d -> e f d"))
    tensors = {f"e.{e}": (4, 6) for e in range(8)}
    plan = plan_of(mesh, {"x": ((8, 4, 6), spec)}, table, tensors)
    way = part_to_read(plan.parameters[0], plan.checkpoint.tensors)
    assert way.pieces == plan.parameters[0].pieces
    assert way.parameter.sharding.shard_shape((8, 4, 6)) == (2, 4, 6)

  def test_scalars_are_read_by_all(self):
    plan = plan_of(processes(2, (2, 2)), {"x": ((), P())}, WeightTable(("x", "x", "")), {"x": ()})
    assert part_to_read(plan.parameters[0], plan.checkpoint.tensors) is plan.parameters[0]


class TestFiles:
  TABLE = WeightTable(
    ("rows", "rows", "v d"),
    ("stack", "e.{e}", "d -> e d"),
    ("small", "small", "d"),
    tied=[Tied("head", "rows")],
  )
  PARAMETERS = {"rows": ((8, 6), P()), "stack": ((4, 6), P("fsdp")), "small": ((3,), P())}

  def plan(self, this, head=False):
    shapes = {"rows": (8, 6), "small": (3,)} | {f"e.{e}": (6,) for e in range(4)}
    shapes |= {"head": (8, 6)} if head else {}
    tensors = {n: TensorInfo(n, F32, s, f"{n}.safetensors", 0, 4 * math.prod(s)) for n, s in shapes.items()}
    return plan_of(processes(2, (2, 2), this=this), self.PARAMETERS, self.TABLE, tensors)

  @pytest.mark.parametrize("this", [0, 1])
  def test_a_process_opens_the_files_that_it_reads_something_of(self, this):
    experts = [["e.0.safetensors", "e.1.safetensors"], ["e.2.safetensors", "e.3.safetensors"]]
    expected = sorted([*experts[this], "rows.safetensors", "small.safetensors"])
    assert list(self.plan(this).files_of_process) == expected

  def test_all_compare_a_part_of_tied_tensors(self):
    for this in range(2):
      assert "head.safetensors" in self.plan(this, head=True).files_of_process

  def test_shared_files_are_everybody_s(self):
    plan = self.plan(0)
    shared = dataclasses.replace(plan.checkpoint, shared_files=("manifest",))
    assert "manifest" in dataclasses.replace(plan, checkpoint=shared).files_of_process

  def test_a_process_alone_opens_all(self):
    tensors = {"rows": (8, 6), "small": (3,)} | {f"e.{e}": (6,) for e in range(4)}
    plan = plan_of(processes(1, (2, 2)), self.PARAMETERS, self.TABLE, tensors)
    assert plan.files_of_process == plan.files


class TestRedistribution:
  """On this process's own devices."""

  DTYPES = (np.bool_, np.int8, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32)

  def split(self, values):
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))
    return jax.device_put(values, NamedSharding(mesh, P("devices")))

  @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
  def test_every_bit_arrives(self, dtype, mesh):
    """NaNs and signs of zeros, too."""
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(0).integers(0, 256, (16, 12 * dtype.itemsize), np.uint8)
    values = raw % 2 == 1 if dtype == np.bool_ else raw.view(dtype)
    target = NamedSharding(mesh, P(None, "tp"))
    array = redistribute(self.split(values), values.shape, target)
    assert (array.sharding, array.dtype, array.shape) == (target, dtype, values.shape)
    for shard in array.addressable_shards:
      assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(values[shard.index]).tobytes()

  @pytest.mark.parametrize(
    "spec",
    [P(), P("fsdp"), P(None, "fsdp"), P("tp", "fsdp"), P(("fsdp", "tp")), P(None, ("tp", "fsdp"))],
    ids=str,
  )
  @pytest.mark.parametrize("shape", [(8, 12), (4, 24)])
  def test_elements_in_one_row_become_any_sharding(self, shape, spec, mesh):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    target = NamedSharding(mesh, spec)
    array = redistribute(self.split(values.reshape(-1)), shape, target)
    assert array.sharding == target
    np.testing.assert_array_equal(array, values)

  def test_what_lies_right_is_handed_on(self, mesh):
    target = NamedSharding(mesh, P("fsdp"))
    array = jax.device_put(np.zeros((8, 6), np.float32), target)
    assert redistribute(array, (8, 6), target) is array
