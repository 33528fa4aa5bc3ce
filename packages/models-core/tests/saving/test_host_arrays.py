"""Parameters in host memory: the parts that devices hold, tensors put together from them, and when they are let go."""

import itertools
import math
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.saving.host_arrays import HostArray, assemble, whole, with_arrays
from models_core.saving.plan import SavedTensor, plan_save
from models_core.weights.table import Conversion, WeightTable

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
SHAPE = (4, 6, 8)
SPECS = (
  P(),
  P("fsdp"),
  P(None, "tp"),
  P("tp", None, "fsdp"),
  P(("fsdp", "tp")),
  P(None, None, ("tp", "fsdp")),
)


@pytest.fixture
def values(rng):
  return rng.normal(size=SHAPE).astype(np.float32)


def fetched(array):
  host = HostArray(array)
  host.fetch()
  return host


def index_of(*bounds):
  return tuple(slice(*bound) for bound in bounds)


class TestHostArray:
  @pytest.mark.parametrize("spec", SPECS, ids=str)
  def test_each_part_is_held_once(self, spec, values, mesh):
    host = fetched(jax.device_put(values, NamedSharding(mesh, spec)))
    assert (host.shape, host.dtype) == (SHAPE, F32)
    assert sum(data.size for _, data in host.parts) == values.size
    for bounds, data in host.parts:
      np.testing.assert_array_equal(data, values[bounds])

  @pytest.mark.parametrize("spec", SPECS, ids=str)
  def test_any_region_is_put_together(self, spec, values, mesh):
    host = fetched(jax.device_put(values, NamedSharding(mesh, spec)))
    for bounds in itertools.product([(0, 4), (1, 3), (2, 3)], [(0, 6), (2, 5)], [(0, 8), (3, 5), (7, 8)]):
      index = index_of(*bounds)
      np.testing.assert_array_equal(host.region(index), values[index])

  def test_a_region_within_a_shard_is_that_memory(self, values, mesh):
    array = jax.device_put(values, NamedSharding(mesh, P("fsdp")))
    host = fetched(array)
    inside = host.region(index_of((2, 4), (1, 5), (0, 8)))
    assert any(np.shares_memory(inside, data) for _, data in host.parts)
    # On a CPU that is the memory of the device itself.
    pointers = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    assert {data.ctypes.data for _, data in host.parts} <= set(pointers)

  @pytest.mark.parametrize(
    "value", [np.float32(3), np.zeros((0, 4), np.int8), np.arange(6).reshape(2, 3)], ids=str
  )
  def test_arrays_of_numpy_are_one_part(self, value):
    host = fetched(value)
    (found,) = host.parts
    assert found[0] == tuple(slice(0, size) for size in np.shape(value))
    np.testing.assert_array_equal(host.region(found[0]), value)

  @pytest.mark.parametrize("spec", [P(), P("fsdp"), P("fsdp", "tp")], ids=str)
  def test_the_whole(self, spec, values, mesh):
    np.testing.assert_array_equal(whole(jax.device_put(values, NamedSharding(mesh, spec))), values)
    np.testing.assert_array_equal(whole(values), values)


# A parameter of each kind of layout: how its tensors come of it.
E, F, D = SHAPE
LAYOUTS = {
  "as it is": (WeightTable(("x", "x", "e f d")), lambda x: {"x": x}),
  "fused axes": (WeightTable(("x", "x", "(e f) d -> e f d")), lambda x: {"x": x.reshape(E * F, D)}),
  "turned": (WeightTable(("x", "x", "d f e -> e f d")), lambda x: {"x": x.transpose(2, 1, 0)}),
  "turned within rows": (WeightTable(("x", "x", "e d f -> e f d")), lambda x: {"x": x.swapaxes(1, 2)}),
  "stacked": (WeightTable(("x", "x.{e}", "f d -> e f d")), lambda x: {f"x.{e}": x[e] for e in range(E)}),
  "stacked and turned": (
    WeightTable(("x", "x.{e}", "d f -> e f d")),
    lambda x: {f"x.{e}": x[e].T for e in range(E)},
  ),
  "other numbers": (
    WeightTable(("x", "x", "e f d", Conversion(lambda y: y - 1, lambda x: x + 1))),
    lambda x: {"x": x + 1},
  ),
  "pairs": (
    WeightTable(("x", "x", "e (f 2) d -> e (2 f) d")),
    lambda x: {"x": x.reshape(E, 2, F // 2, D).swapaxes(1, 2).reshape(SHAPE)},
  ),
}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("table", "expected"), LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_are_put_together_in_the_dtype_of_the_file(table, expected, dtype, spec, values, mesh):
  array = jax.device_put(values, NamedSharding(mesh, spec))
  tensors = plan_save({"x": array}, table, dtype=dtype)
  found = {}
  for tensor, held in with_arrays(tensors, {"x": array}.__getitem__):
    sources = [(held[name], piece) for name, piece in tensor.parts]
    for host, _ in sources:
      host.fetch()
    data = assemble(tensor, sources, None)
    assert (data.dtype, data.size) == (dtype, math.prod(tensor.shape))
    assert data.flags.c_contiguous
    found[tensor.name] = data.reshape(tensor.shape)
  assert found.keys() == expected(values).keys()
  for name, tensor in expected(values).items():
    np.testing.assert_array_equal(found[name], tensor.astype(dtype))


def test_rows_of_a_tensor(values, mesh):
  """Of a tensor that two parameters share, in any steps."""
  table = WeightTable(("up", "both", "e (0/2 f) d -> e f d"), ("gate", "both", "e (1/2 f) d -> e f d"))
  parameters = {
    "up": jax.device_put(values, NamedSharding(mesh, P("tp", "fsdp"))),
    "gate": jax.device_put((-values).astype(BF16), NamedSharding(mesh, P(None, "fsdp"))),
  }
  (tensor,) = plan_save(parameters, table)
  assert tensor.dtype == F32
  expected = np.concatenate([values, (-values).astype(BF16).astype(F32)], axis=1)
  sources = [(fetched(parameters[name]), piece) for name, piece in tensor.parts]
  for step in (1, 3, 4):
    rows = [slice(start, min(start + step, E)) for start in range(0, E, step)]
    parts = [assemble(tensor, sources, part).reshape(-1, 2 * F, D) for part in rows]
    np.testing.assert_array_equal(np.concatenate(parts), expected)


class TestHolding:
  """Of parameters that are made when they are asked for: no more are in memory than the next tensor needs."""

  @staticmethod
  def held_at_a_time(table, parameters):
    """Names of the parameters in memory at each tensor, and those that were asked for, in this order."""
    asked, alive = [], {}

    class Made(np.ndarray):
      pass

    def get(name):
      asked.append(name)
      array = np.zeros(parameters[name].shape, np.float32).view(Made)
      alive[name] = weakref.ref(array)
      return array

    seen = []
    for tensor, held in with_arrays(plan_save(parameters, table), get):
      for name, _ in tensor.parts:
        held[name].fetch()
      seen.append((tensor.name, sorted(name for name, ref in alive.items() if ref() is not None)))
      del held
    assert not [name for name, ref in alive.items() if ref() is not None]
    return seen, asked

  def test_one_parameter_of_one_tensor_at_a_time(self):
    table = WeightTable(("layers.{i}", "m.{i}", "d"))
    seen, asked = self.held_at_a_time(table, {f"layers.{i}": np.zeros(2, np.float32) for i in range(4)})
    assert seen == [(f"m.{i}", [f"layers.{i}"]) for i in range(4)]
    assert asked == [f"layers.{i}" for i in range(4)]

  def test_a_stack_is_held_until_its_last_tensor_is_written(self):
    table = WeightTable(("x", "x.{e}", "d -> e d"), ("y", "y", "d"))
    seen, asked = self.held_at_a_time(
      table, {"x": np.zeros((3, 2), np.float32), "y": np.zeros(2, np.float32)}
    )
    assert seen == [("x.0", ["x"]), ("x.1", ["x"]), ("x.2", ["x"]), ("y", ["y"])]
    assert asked == ["x", "y"]

  def test_halves_of_a_fused_tensor_are_held_together(self):
    table = WeightTable(
      ("layers.{i}.up", "m.{i}", "(0/2 f) d -> f d"), ("layers.{i}.gate", "m.{i}", "(1/2 f) d -> f d")
    )
    parameters = {
      f"layers.{i}.{half}": np.zeros((2, 3), np.float32) for i in range(2) for half in ("up", "gate")
    }
    seen, asked = self.held_at_a_time(table, parameters)
    assert seen == [(f"m.{i}", [f"layers.{i}.gate", f"layers.{i}.up"]) for i in range(2)]
    assert sorted(asked) == sorted(parameters)

  def test_a_copied_tensor_asks_for_nothing(self):
    tensor = SavedTensor("x", F32, (3,))
    asked = []
    assert [(found.name, dict(held)) for found, held in with_arrays([tensor], asked.append)] == [("x", {})]
    assert asked == []
