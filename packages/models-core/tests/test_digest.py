import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models_core.digest import Digest, _sum_elements, _sum_shards, digest, digest_arrays, digest_plan
from models_core.errors import ModelsError
from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import read_safetensors
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load
from models_core.loading.plan import plan_load
from models_core.weights.table import Form, WeightTable

TABLE = WeightTable(
  ("embed", "embed.weight", "v d"),
  ("layers.{i}.w", "l.{i}.weight", "(n h) d -> n h d"),
  ("layers.{i}.t", "t.{i}.weight", "d f -> f d"),
  (
    "layers.{i}.x",
    (Form("x.{i}.{e}.weight", "f d -> e f d"), Form("x.{i}.fused", "e (1/2 f) d -> e f d")),
  ),
)
SHAPES = {
  "embed": ((10, 6), PartitionSpec("fsdp", "tp")),
  **{f"layers.{i}.w": ((4, 2, 6), PartitionSpec("tp", None, "fsdp")) for i in range(2)},
  **{f"layers.{i}.t": ((5, 6), PartitionSpec("fsdp")) for i in range(2)},
  **{f"layers.{i}.x": ((2, 4, 6), PartitionSpec(None, ("fsdp", "tp"))) for i in range(2)},
}


def tensors(rng, *, fused=False):
  found = {"embed.weight": rng.normal(size=(10, 6)).astype(np.float32)}
  for i in range(2):
    found[f"l.{i}.weight"] = rng.normal(size=(8, 6)).astype(jnp.bfloat16)
    found[f"t.{i}.weight"] = rng.normal(size=(6, 5)).astype(np.float16)
    experts = rng.normal(size=(2, 4, 6)).astype(np.float32)
    if fused:
      found[f"x.{i}.fused"] = np.concatenate([experts * 0, experts], axis=1)
    else:
      found |= {f"x.{i}.{e}.weight": experts[e] for e in range(2)}
  return found


def plan_of(toy, directory, mesh=None, dtype=None):
  model = abstract_model(toy, SHAPES, mesh)
  return plan_load(read_safetensors(LocalFiles(str(directory))), model, TABLE, dtype=dtype)


def one(array):
  return one_named("a", array)


def one_named(name, array):
  return digest_arrays({name: jnp.asarray(array)}).parameters[name]


def test_a_model_has_the_digest_of_its_checkpoint_on_every_mesh(toy, save, rng, meshes, monkeypatch):
  directory = save(tensors(rng))
  expected = digest_plan(plan_of(toy, directory))
  assert set(expected.parameters) == set(SHAPES)
  for kind in ("explicit", "auto"):
    for shape in ((2, 2), (1, 4), (4, 1)):
      mesh = meshes(kind, shape, ("fsdp", "tp"))
      assert digest(load(plan_of(toy, directory, mesh))) == expected
      with jax.set_mesh(mesh):
        assert digest(load(plan_of(toy, directory, mesh))) == expected
  # One parameter at a time.
  monkeypatch.setattr("models_core.digest._GROUP", 1)
  assert digest_plan(plan_of(toy, directory, mesh)) == expected


def test_the_form_in_which_a_checkpoint_holds_a_parameter_does_not_count(toy, save, rng):
  split = digest_plan(plan_of(toy, save(tensors(rng), folder="split")))
  fused = digest_plan(plan_of(toy, save(tensors(np.random.default_rng(0), fused=True), folder="fused")))
  assert split == fused


def test_the_dtype_counts(toy, save, rng):
  directory = save(tensors(rng))
  whole, half = (digest_plan(plan_of(toy, directory, dtype=dtype)) for dtype in (None, np.dtype("float16")))
  assert whole.differences(half) == sorted(name for name in SHAPES if not name.endswith("t"))
  assert digest(load(plan_of(toy, directory, dtype=np.dtype("float16")))) == half


KINDS = """bool int8 uint8 int16 uint16 int32 uint32 float16 bfloat16 float32 complex64
  float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"""


@pytest.mark.parametrize("dtype", KINDS.split())
def test_every_flipped_bit_changes_it(dtype, rng):
  kind = jnp.dtype(dtype)
  bits = rng.integers(0, 2 if dtype == "bool" else 256, 6 * kind.itemsize).astype(np.uint8)
  array = bits.view(kind).reshape(2, 3)
  numbers = {one(array)}
  flips = [(byte, bit) for byte in range(bits.size) for bit in range(1 if dtype == "bool" else 8)]
  for byte, bit in flips:
    flipped = bits.copy()
    flipped[byte] ^= 1 << bit
    numbers.add(one(flipped.view(kind).reshape(2, 3)))
  assert len(numbers) == 1 + len(flips)


def test_how_arrays_share_programs_does_not_count(rng, monkeypatch):
  arrays = {"a": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32), "b": jnp.arange(11), "c": jnp.ones(())}
  alone = {name: one_named(name, array) for name, array in arrays.items()}
  assert digest_arrays(arrays).parameters == alone
  monkeypatch.setattr("models_core.digest._MOST", 2)
  assert digest_arrays(arrays).parameters == alone


def test_all_layers_and_all_devices_share_one_program(rng, meshes):
  mesh = meshes("explicit", (2, 2), ("fsdp", "tp"))
  by_both = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
  arrays = {
    f"{i}.layers.{j}.{name}": jax.device_put(rng.normal(size=(6, width)).astype(np.float32), by_both)
    for i in "xy"
    for j in range(5)
    for name, width in (("p", 8), ("q", 12))
  }
  before = _sum_shards._cache_size()
  found = digest_arrays(arrays)
  assert _sum_shards._cache_size() == before + 1
  assert found.parameters == {name: one_named(name, np.asarray(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
def test_all_values_of_4_bits_are_told_apart(dtype):
  values = np.arange(16, dtype=np.uint8).view(jnp.dtype(dtype))
  assert len({one(values[i : i + 1]) for i in range(16)}) == 16


def test_weights_in_the_host_s_memory_have_the_same(meshes, rng):
  on_devices = NamedSharding(meshes("explicit", (2, 2), ("fsdp", "tp")), PartitionSpec("fsdp"))
  array = jax.device_put(rng.normal(size=(4, 6)).astype(np.float32), on_devices)
  assert one(jax.device_put(array, on_devices.with_memory_kind("pinned_host"))) == one(array)


@pytest.mark.parametrize("dtype", ["int64", "float64", "complex128"])
def test_64_bits_count_in_full(dtype, rng):
  with jax.enable_x64(True):
    array = rng.normal(size=(4, 2)).astype(dtype)
    numbers = {one(array)}
    for byte in range(array.nbytes):
      flipped = array.copy()
      flipped.view(np.uint8).reshape(-1)[byte] ^= 1
      numbers.add(one(flipped))
  assert len(numbers) == 1 + array.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_swap_of_elements_rows_and_columns_changes_it(dtype, rng):
  # Numbers of both signs, of which halves are equal but for it: what wrapping sums are weakest at.
  array = (rng.permutation(np.arange(-32, 32)).reshape(8, 8)).astype(dtype)
  flat, numbers = array.reshape(-1), {one(array)}
  pairs = [(a, b) for a in range(0, 64, 5) for b in range(a)]
  for a, b in pairs:
    swapped = flat.copy()
    swapped[[a, b]] = swapped[[b, a]]
    numbers.add(one(swapped.reshape(8, 8)))
  rows = [(a, b) for a in range(8) for b in range(a)]
  for a, b in rows:
    order = np.arange(8)
    order[[a, b]] = [b, a]
    numbers |= {one(array[order]), one(array[:, order])}
  assert len(numbers) == 1 + len(pairs) + 2 * len(rows)


def test_a_swap_of_two_parameters_changes_both_and_the_total(rng):
  a, b = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
  first, second = digest_arrays({"a": a, "b": b}), digest_arrays({"a": b, "b": a})
  assert first.differences(second) == ["a", "b"]
  assert first.total != second.total
  assert digest_arrays({"b": b, "a": a}).total == first.total


def test_shape_name_and_presence_count(rng):
  a = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
  variants = [a, a.reshape(4, 3), a.reshape(12), a[:, :0], a[0, 0]]
  totals = {digest_arrays({"a": x}).total for x in variants} | {digest_arrays({"b": a}).total}
  assert len(totals) == 6
  assert digest_arrays({"a": a}).differences(digest_arrays({"a": a, "b": a})) == ["b"]


def test_elements_that_32_bits_cannot_number_are_told_apart(rng):
  """A part of an array of 2^34 elements, at its first row and 2^32 elements later."""
  part = jnp.asarray(rng.integers(0, 256, (1, 1, 4)), jnp.uint8)
  shape = (4, 1 << 16, 1 << 16)
  places = [np.array([i, 0, 0], np.uint32) for i in range(4)]
  sums = [tuple(map(int, _sum_elements(part, place, shape))) for place in places]
  assert len(set(sums)) == 4


def test_a_model_without_numbers_is_refused_by_name(toy):
  with pytest.raises(ModelsError, match=r"embed is a ShapeDtypeStruct, expected a jax\.Array"):
    digest(nnx.eval_shape(lambda: toy(SHAPES, rngs=None)))


def test_it_prints_as_one_number():
  assert str(Digest({})) == f"{Digest({}).total:016x}"
  assert dataclasses.replace(Digest({}), parameters={"a": 1}).total != Digest({}).total
