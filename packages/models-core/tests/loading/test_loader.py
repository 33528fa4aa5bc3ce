import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import threading
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from models_core.casting import cast_into
from models_core.errors import CheckpointError
from models_core.formats import byte_reader
from models_core.formats.files import LocalFiles
from models_core.formats.memory import aligned_empty
from models_core.formats.safetensors import DTYPES, read_safetensors
from models_core.loading import fill
from models_core.loading import opened as opened_plan
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load, load_arrays
from models_core.loading.plan import plan_load
from models_core.loading.ties import are_equal
from models_core.weights.table import Conversion, Ignored, Tied, WeightTable

BF16 = np.dtype(ml_dtypes.bfloat16)
WIDE = {"F64": np.float32, "I64": np.int32, "U64": np.uint32}


def bits(array):
  array = np.asarray(array)
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(array, expected):
  """Equal in dtype, shape and every bit, on every device."""
  assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(bits(shard.data), bits(expected[shard.index]))


def anonymous():
  """Bytes of this process's memory that are no file's."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture
def plan(toy):
  def make(directory, parameters, table, mesh=None, **options):
    files = directory if hasattr(directory, "fetch") else LocalFiles(str(directory))
    return plan_load(read_safetensors(files), abstract_model(toy, parameters, mesh), table, **options)

  return make


@pytest.fixture
def tiny_chunks(monkeypatch):
  """Every tensor takes several chunks and several tasks."""
  monkeypatch.setattr(byte_reader.LocalReader, "chunk", 64)
  monkeypatch.setattr(fill, "_TASK", 256)


def random_bits(rng, shape, dtype):
  if dtype == np.bool_:
    return rng.integers(0, 2, shape).astype(bool)
  raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
  return raw.view(dtype).reshape(shape)


class TestValues:
  @pytest.mark.parametrize("kind", DTYPES)
  def test_every_dtype_is_loaded_bit_by_bit(self, kind, save, plan, rng, mesh):
    dtype = DTYPES[kind]
    x = rng.integers(0, 100, (6, 4)).astype(dtype) if kind in WIDE else random_bits(rng, (6, 4), dtype)
    specs = {"rows": P("fsdp"), "columns": P(None, "tp"), "one": P()}
    parameters = {name: ((6, 4), spec, WIDE.get(kind, dtype)) for name, spec in specs.items()}
    table = WeightTable(*((name, name, "v d") for name in parameters))
    arrays = load_arrays(plan(save(dict.fromkeys(parameters, x)), parameters, table, mesh))
    for name in parameters:
      assert_same(arrays[name], x.astype(WIDE.get(kind, dtype)))

  SPECS = (
    P(),
    P("fsdp"),
    P("fsdp", None),
    P(None, "tp"),
    P("fsdp", "tp"),
    P("tp", "fsdp"),
    P(
      ("fsdp", "tp"),
    ),
    P(("tp", "fsdp"), None),
    P(None, ("fsdp", "tp")),
  )

  @pytest.mark.parametrize("dtype", [None, BF16])
  @pytest.mark.parametrize("chunks", ["one chunk", "many chunks"])
  def test_every_sharding_gets_its_values(self, dtype, chunks, request, save, plan, rng, mesh):
    if chunks == "many chunks":
      request.getfixturevalue("tiny_chunks")
    x = rng.normal(size=(12, 32)).astype(np.float32)
    parameters = {str(spec): ((12, 32), spec) for spec in self.SPECS}
    tensors = {"odd": np.zeros(3, np.int8)} | dict.fromkeys(parameters, x)
    table = WeightTable(("odd", "odd", "d"), *((name, name, "v d") for name in parameters))
    made = plan(save(tensors), parameters | {"odd": ((3,), P(), np.int8)}, table, mesh, dtype=dtype)
    arrays = load_arrays(made)
    for name, (_, spec) in parameters.items():
      assert arrays[name].sharding == NamedSharding(mesh, spec)
      assert_same(arrays[name], x if dtype is None else x.astype(dtype))

  @pytest.mark.parametrize(
    ("layout", "shape", "reference"),
    [
      ("(n h) d -> n h d", (12, 32), lambda x: x.reshape(4, 3, 32)),
      ("d (n h) -> n h d", (32, 12), lambda x: x.reshape(32, 4, 3).transpose(1, 2, 0)),
      ("(n h) d -> h n d", (12, 32), lambda x: x.reshape(3, 4, 32).swapaxes(0, 1)),
    ],
  )
  def test_every_layout_goes_with_every_sharding(
    self, layout, shape, reference, save, plan, rng, mesh, tiny_chunks
  ):
    x = rng.normal(size=shape).astype(np.float32)
    expected = np.ascontiguousarray(reference(x))
    specs = {str(spec): P(spec[0] if spec else None, None, *spec[1:]) for spec in self.SPECS}
    parameters = {name: (expected.shape, spec) for name, spec in specs.items()}
    table = WeightTable(*((name, "x", layout) for name in specs))
    arrays = load_arrays(plan(save({"x": x}), parameters, table, mesh))
    for name, spec in specs.items():
      assert arrays[name].sharding == NamedSharding(mesh, spec)
      assert_same(arrays[name], expected)

  @pytest.mark.parametrize(
    ("kind", "shape", "names", "spec"),
    [
      ("explicit", (1, 4), ("fsdp", "tp"), P("fsdp", "tp")),
      ("auto", (4, 1), ("fsdp", "tp"), P("fsdp", "tp")),
      ("explicit", (1, 1), ("fsdp", "tp"), P("fsdp", "tp")),
      ("auto", (1,), ("x",), P("x")),
      ("auto", (2, 1, 2), ("data", "fsdp", "tp"), P(("data", "fsdp"), "tp")),
      ("explicit", (2, 1, 2), ("data", "fsdp", "tp"), P(("tp", "fsdp"), "data")),
    ],
  )
  def test_every_shape_of_mesh_gets_its_values(self, kind, shape, names, spec, save, plan, rng, meshes):
    x = rng.normal(size=(8, 12)).astype(np.float32)
    mesh = meshes(kind, shape, names)
    array = load_arrays(plan(save({"x": x}), {"x": ((8, 12), spec)}, WeightTable(("x", "x", "v d")), mesh))[
      "x"
    ]
    assert array.sharding == NamedSharding(mesh, spec)
    assert_same(array, x)

  def test_without_a_mesh_arrays_lie_on_the_default_device(self, save, plan, rng):
    x = rng.normal(size=(8, 12)).astype(np.float32)
    made = plan(save({"x": x}), {"x": ((8, 12), P("fsdp"))}, WeightTable(("x", "x", "v d")))
    assert load_arrays(made)["x"].sharding == SingleDeviceSharding(jax.local_devices()[0])
    with jax.default_device(jax.devices()[2]):
      made = plan(save({"x": x}), {"x": ((8, 12), P("fsdp"))}, WeightTable(("x", "x", "v d")))
    array = load_arrays(made)["x"]
    assert array.sharding == SingleDeviceSharding(jax.devices()[2])
    assert_same(array, x)

  @pytest.mark.parametrize("place", ["one device", "mesh"])
  def test_scalars_and_stacks_of_scalars(self, place, save, plan, mesh):
    tensors = {"x": np.array(7, np.float32)} | {f"e.{e}": np.array(e, BF16) for e in range(4)}
    parameters = {"x": ((), P()), "e": ((4,), P("tp"))}
    table = WeightTable(("x", "x", ""), ("e", "e.{e}", "-> e"))
    directory = save(tensors)
    for dtype in (None, BF16):
      made = plan(directory, parameters, table, mesh if place == "mesh" else None, dtype=dtype)
      arrays = load_arrays(made)
      assert_same(arrays["x"], np.array(7, dtype or np.float32))
      assert_same(arrays["e"], np.arange(4).astype(BF16))

  @pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 4)])
  def test_parameters_without_elements(self, shape, save, plan, mesh):
    x = np.zeros(shape, np.float32)
    letters = "abc"[: len(shape)]
    table = WeightTable(("x", "x", " ".join(letters)), ("y", "x", " ".join([*letters, "->", *letters[::-1]])))
    made = plan(save({"x": x}), {"x": (shape, P("tp")), "y": (shape[::-1], P())}, table, mesh)
    arrays = load_arrays(made)
    assert_same(arrays["x"], x)
    assert_same(arrays["y"], x.T)

  @pytest.mark.parametrize(
    "spec", [P(), P("fsdp", None, "tp"), P(None, "tp"), P(("tp", "fsdp")), P(None, "fsdp", "tp")]
  )
  def test_stacks_and_fused_tensors_are_sharded_over_any_axis(self, spec, save, plan, rng, mesh, tiny_chunks):
    tensors = {f"e.{e}.w": rng.normal(size=(6, 16)).astype(np.float32) for e in range(4)}
    tensors |= {"fused": rng.normal(size=(4, 12, 16)).astype(np.float32)}
    tensors |= {"leading": rng.normal(size=(2, 4, 6, 16)).astype(np.float32)}
    tensors |= {f"t.{e}.w": rng.normal(size=(16, 6)).astype(np.float32) for e in range(4)}
    table = WeightTable(
      ("stacked", "e.{e}.w", "f d -> e f d"),
      ("gate", "fused", "e (0/2 f) d -> e f d"),
      ("up", "fused", "e (1/2 f) d -> e f d"),
      ("k", "leading", "0/2 e f d -> e f d"),
      ("v", "leading", "1/2 e f d -> e f d"),
      ("turned", "t.{e}.w", "d f -> e f d"),
    )
    arrays = load_arrays(
      plan(save(tensors), {row.ours: ((4, 6, 16), spec) for row in table.rows}, table, mesh)
    )
    assert_same(arrays["stacked"], np.stack([tensors[f"e.{e}.w"] for e in range(4)]))
    assert_same(arrays["gate"], tensors["fused"][:, :6])
    assert_same(arrays["up"], tensors["fused"][:, 6:])
    assert_same(arrays["k"], tensors["leading"][0])
    assert_same(arrays["v"], tensors["leading"][1])
    assert_same(arrays["turned"], np.stack([tensors[f"t.{e}.w"].T for e in range(4)]))

  def test_a_row_may_be_larger_than_a_chunk(self, save, plan, rng, mesh, tiny_chunks):
    x = rng.normal(size=(3, 200)).astype(np.float32)
    for spec in (P(), P(None, "tp"), P(None, ("fsdp", "tp"))):
      made = plan(save({"x": x}), {"x": ((3, 200), spec)}, WeightTable(("x", "x", "v d")), mesh, dtype=BF16)
      assert_same(load_arrays(made)["x"], x.astype(BF16))

  def test_values_of_a_row_are_applied(self, save, plan, rng, mesh):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    table = WeightTable(("x", "x", "d v -> v d", Conversion(lambda w: w - 1, lambda w: w + 1)))
    assert_same(load_arrays(plan(save({"x": x}), {"x": ((6, 4), P("tp"))}, table, mesh))["x"], (x - 1).T)

  def test_tensors_of_two_dtypes_meet_in_one_that_holds_both(self, save, plan):
    tensors = {"e.0": np.array([1e30, 1], BF16), "e.1": np.array([1.0009765625, 2], np.float16)}
    made = plan(save(tensors), {"e": ((2, 2), P())}, WeightTable(("e", "e.{e}", "d -> e d")))
    expected = np.stack([x.astype(np.float32) for x in tensors.values()])
    assert_same(load_arrays(made)["e"], expected)


class TestCasts:
  # Zeros, denormals, ties of rounding, the largest, infinities, quiet and signalling NaNs.
  EDGES = np.frombuffer(
    bytes.fromhex(
      "00000000 80000000 00000001 007fffff 00800000 3f808000 3f818000 3f80c000 3f807fff 7f7fffff 7f7f7fff"
      "7f800000 ff800000 7fc00000 ffc00001 7f800001 7f80ffff 47800000 33000000 387fc000"
    ),
    ">f4",
  ).astype("<f4")

  @pytest.mark.parametrize("kind", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
  @pytest.mark.parametrize("chunks", ["one chunk", "many chunks"])
  def test_rounding_is_that_of_ml_dtypes(self, kind, chunks, request, save, plan, rng, mesh):
    if chunks == "many chunks":
      request.getfixturevalue("tiny_chunks")
    x = np.concatenate([self.EDGES, random_bits(rng, (4076,), np.dtype(np.float32))]).reshape(64, 64)
    with np.errstate(all="ignore"):
      # A number that does not fit is an error, another test's.
      x[np.isfinite(x) & ~np.isfinite(x.astype(DTYPES[kind]))] = 1
      expected = x.astype(DTYPES[kind])
    parameters = {"rows": ((64, 64), P("fsdp")), "columns": ((64, 64), P(None, "tp"))}
    table = WeightTable(*((name, "x", "v d") for name in parameters))
    made = plan(save({"x": x}), parameters, table, mesh, dtype=DTYPES[kind])
    arrays = load_arrays(made)
    for array in arrays.values():
      assert array.dtype == expected.dtype
      np.testing.assert_array_equal(bits(array), bits(expected))

  @pytest.mark.parametrize(
    "kind", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"]
  )
  def test_every_narrow_float_becomes_its_float32(self, kind, save, plan, mesh):
    dtype = DTYPES[kind]
    every = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype).reshape(16, -1)
    parameters = {"rows": (every.shape, P("fsdp")), "columns": (every.shape, P(None, "tp"))}
    table = WeightTable(*((name, "x", "v d") for name in parameters))
    arrays = load_arrays(plan(save({"x": every}), parameters, table, mesh, dtype=np.dtype(np.float32)))
    for array in arrays.values():
      got, expected = np.asarray(array), every.astype(np.float32)
      nan = np.isnan(expected)
      np.testing.assert_array_equal(np.isnan(got), nan)
      np.testing.assert_array_equal(bits(got[~nan]), bits(expected[~nan]))

  @pytest.mark.parametrize("contiguous", [True, False])
  def test_the_quick_way_from_bfloat16_is_the_slow_way(self, contiguous):
    source = np.arange(2**16, dtype=np.uint16).view(BF16).reshape(256, 256)[:, ::2]
    target = np.zeros((256, 128 if contiguous else 256), np.float32)
    target = target if contiguous else target[:, ::2]
    cast_into(target, source)
    nan = np.isnan(source.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(target), nan)
    np.testing.assert_array_equal(target[~nan], source.astype(np.float32)[~nan])


class TestFiles:
  TABLE = WeightTable(("a", "a", "v d"), ("b", "b", "v d"))
  PARAMETERS = {"a": ((4, 6), P("fsdp")), "b": ((4, 6), P(None, "tp"))}

  @pytest.fixture
  def tensors(self, rng):
    return {name: rng.normal(size=(4, 6)).astype(np.float32) for name in "ab"}

  @pytest.fixture
  def made(self, save, plan, tensors, mesh):
    return plan(save(tensors), self.PARAMETERS, self.TABLE, mesh)

  def test_shards_of_a_checkpoint_are_read_from_their_files(self, save_sharded, plan, tensors, mesh):
    directory = save_sharded({f"m-{name}.safetensors": {name: x} for name, x in tensors.items()})
    made = plan(directory, self.PARAMETERS, self.TABLE, mesh)
    assert made.files == ("m-a.safetensors", "m-b.safetensors")
    for name, array in load_arrays(made).items():
      assert_same(array, tensors[name])

  def test_files_without_a_tensor_of_the_plan_are_not_opened(self, save_sharded, plan, toy, tensors):
    directory = save_sharded({f"m-{name}.safetensors": {name: x} for name, x in tensors.items()})
    checkpoint = read_safetensors(LocalFiles(str(directory)))
    table = WeightTable(("a", "a", "v d"))
    only = dataclasses.replace(checkpoint, tensors={"a": checkpoint.tensors["a"]})
    os.remove(directory / "m-b.safetensors")
    made = plan_load(only, abstract_model(toy, {"a": ((4, 6), P())}), table)
    assert_same(load_arrays(made)["a"], tensors["a"])

  def test_a_truncated_file_is_an_error(self, made):
    path = os.path.join(made.checkpoint.files.path, "model.safetensors")
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(
      CheckpointError, match=r"model\.safetensors.*\n.*has changed since its header was read"
    ):
      load(made)

  def test_a_file_that_shrinks_while_it_is_read_is_an_error(self, made):
    path = os.path.join(made.checkpoint.files.path, "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*\n.*the file ends within"):
      load(made, on_bytes=lambda count: os.truncate(path, 8))

  @pytest.mark.parametrize("change", ["renamed", "reordered", "reshaped", "retyped", "longer header"])
  def test_a_file_that_was_replaced_by_another_is_an_error(self, change, made, save, tensors):
    a, b = tensors.values()
    save(
      *{
        "renamed": [{"x": a, "b": b}],
        "reordered": [{"b": b, "a": a}],
        "reshaped": [{"a": a.reshape(6, 4), "b": b}],
        "retyped": [{"a": a.view(np.int32), "b": b}],
        "longer header": [{"a": a, "b": b, "c": a}],
      }[change]
    )
    with pytest.raises(
      CheckpointError, match=r"model\.safetensors.*\n.*has changed since its header was read"
    ):
      load(made)

  def test_a_file_that_is_gone_is_an_error_that_names_it(self, made):
    os.remove(os.path.join(made.checkpoint.files.path, "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*\n.*removed after its header was read"):
      load(made)

  def test_every_stored_byte_is_counted_once(self, save, plan, tensors, mesh, tiny_chunks):
    counts, lock = [], threading.Lock()

    def on_bytes(count):
      with lock:
        counts.append(count)

    tensors["c"] = tensors["a"].astype(BF16)
    table = WeightTable(*((name, name, "v d") for name in "ab"), ("c", "c", "d v -> v d"))
    made = plan(
      save(tensors), self.PARAMETERS | {"c": ((6, 4), P("tp"))}, table, mesh, dtype=np.dtype(np.float16)
    )
    load(made, on_bytes=on_bytes)
    assert sum(counts) == made.stored_nbytes == sum(x.nbytes for x in tensors.values())
    assert min(counts) > 0

  def test_an_error_of_the_callback_ends_the_load(self, made):
    def on_bytes(count):
      raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
      load(made, on_bytes=on_bytes)

  def test_a_plan_may_be_loaded_twice_and_by_many_threads(self, made, tensors):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      loads = list(pool.map(lambda _: load_arrays(made), range(16)))
    for arrays in loads:
      for name, array in arrays.items():
        assert_same(array, tensors[name])

  def test_no_file_stays_open_also_after_errors(self, save, plan, tensors, mesh, tiny_chunks):
    made = plan(save(tensors), self.PARAMETERS, self.TABLE, mesh)

    def fail(count):
      raise ZeroDivisionError

    load(made)  # What JAX opens once and for all.
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
      load(made)
      with pytest.raises(ZeroDivisionError):
        load(made, on_bytes=fail)
    assert len(os.listdir("/proc/self/fd")) == before
    os.truncate(os.path.join(made.checkpoint.files.path, "model.safetensors"), 100)
    for _ in range(5):
      with pytest.raises(CheckpointError):
        load(made)
    assert len(os.listdir("/proc/self/fd")) == before

  def test_files_are_closed_only_after_the_last_read(self, save, plan, rng, monkeypatch, tiny_chunks):
    closed, reads_after = [], []
    preadv, close = os.preadv, os.close
    x = rng.normal(size=(200, 32)).astype(np.float32)
    made = plan(save({"x": x}), {"x": ((200, 32), P())}, WeightTable(("x", "x", "v d")))

    def slow_preadv(descriptor, *args):
      threading.Event().wait(0.002)
      if descriptor in closed:
        reads_after.append(descriptor)
      return preadv(descriptor, *args)

    def fail(count):
      raise ZeroDivisionError

    monkeypatch.setattr(byte_reader.os, "preadv", slow_preadv)
    monkeypatch.setattr(
      byte_reader.os, "close", lambda descriptor: (closed.append(descriptor), close(descriptor))
    )
    with pytest.raises(ZeroDivisionError):
      load(made, on_bytes=fail)
    assert closed
    assert not reads_after


class TestMemory:
  def test_arrays_alias_aligned_memory_and_outlive_the_plan(self, save, plan, rng, mesh):
    x = rng.normal(size=(64, 64)).astype(np.float32)
    directory = save({"x": x, "y": x})
    parameters = {"x": ((64, 64), P("fsdp", "tp")), "y": ((64, 64), P())}
    made = plan(directory, parameters, WeightTable(("x", "x", "v d"), ("y", "y", "v d")), mesh)
    model = load(made)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in model.x[...].addressable_shards]
    assert all(pointer % 64 == 0 for pointer in pointers)
    # One host copy serves all devices that hold the same part.
    assert len({shard.data.unsafe_buffer_pointer() for shard in model.y[...].addressable_shards}) == 1
    os.remove(directory / "model.safetensors")
    del made
    gc.collect()
    clutter = [np.full((64, 64), np.nan, np.float32) for _ in range(50)]
    assert_same(model.x[...], x)
    assert_same(model.y[...], x)
    assert len(clutter) == 50

  @pytest.mark.parametrize("data_start", [0, 8, 32])
  @pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "tp"), P("fsdp", "tp")], ids=str)
  def test_only_aligned_runs_of_the_file_are_mapped(self, save, plan, rng, mesh, spec, data_start):
    x = rng.normal(size=(16, 32)).astype(np.float32)
    directory = save({"x": x}, data_start=data_start)
    array = load(plan(directory, {"x": (x.shape, spec)}, WeightTable(("x", "x", "v d")), mesh)).x[...]
    assert_same(array, x)
    whole_rows = "tp" not in spec
    where = f"{directory.name}/model.safetensors"
    maps = [
      line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if where in line
    ]
    bounds = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for shard in array.addressable_shards:
      pointer = shard.data.unsafe_buffer_pointer()
      assert any(low <= pointer < high for low, high in bounds) == (whole_rows and data_start == 0)

  def test_a_mapped_file_may_be_removed_and_its_arrays_donated(self, save, plan, rng, mesh):
    x = rng.normal(size=(16, 32)).astype(np.float32)
    directory = save({"x": x}, data_start=0)
    before = (directory / "model.safetensors").read_bytes()
    made = plan(directory, {"x": (x.shape, P("fsdp"))}, WeightTable(("x", "x", "v d")), mesh)
    array, kept = load(made).x[...], load(made).x[...]
    doubled = jax.jit(lambda a: a * 2, donate_argnums=0)(array)
    np.testing.assert_array_equal(doubled, 2 * x)
    assert (directory / "model.safetensors").read_bytes() == before
    (directory / "model.safetensors").unlink()
    gc.collect()
    assert_same(kept, x)

  @pytest.mark.parametrize("dtype", [None, np.dtype(np.float16)], ids=["as stored", "cast"])
  def test_a_cast_never_maps(self, save, plan, rng, dtype):
    x = rng.normal(size=(4, 16)).astype(np.float32)
    directory = save({"x": x}, data_start=0)
    array = load(plan(directory, {"x": (x.shape, P())}, WeightTable(("x", "x", "v d")), dtype=dtype)).x[...]
    np.testing.assert_array_equal(array, x if dtype is None else x.astype(dtype))

  @pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
  def test_aligned_memory_is_aligned(self, shape):
    for dtype in DTYPES.values():
      memory = aligned_empty(shape, dtype)
      assert (memory.shape, memory.dtype) == (shape, dtype)
      assert memory.ctypes.data % 64 == 0 if memory.size else True
      assert memory.flags.c_contiguous

  @pytest.mark.parametrize("dtype", [None, np.dtype(np.float32)], ids=["as stored", "cast"])
  def test_memory_returns_when_half_of_the_parameters_are_dropped(self, dtype, save, plan, rng):
    x = rng.normal(size=(3 << 9, 1 << 10)).astype(BF16)
    tensors = {f"x{i}": x for i in range(16)}
    table = WeightTable(*((name, name, "v d") for name in tensors))
    made = plan(save(tensors, data_start=8), dict.fromkeys(tensors, (x.shape, P())), table, dtype=dtype)
    before = anonymous()
    arrays = jax.block_until_ready(load_arrays(made))
    size = sum(array.nbytes for array in arrays.values())
    assert anonymous() - before < size + (10 << 20)
    for name in list(tensors)[::2]:
      del arrays[name]
    gc.collect()
    assert anonymous() - before < size / 2 + (10 << 20)
    for array in arrays.values():
      np.testing.assert_array_equal(array, x.astype(array.dtype))

  def test_loaded_parameters_may_be_donated(self, save, plan, rng, mesh):
    x = rng.normal(size=(8, 8)).astype(np.float32)
    made = plan(save({"x": x}), {"x": ((8, 8), P())}, WeightTable(("x", "x", "v d")), mesh)
    first, second = load(made), load(made)
    graphdef, state = nnx.split(first)
    step = jax.jit(lambda state: jax.tree.map(lambda w: w * 2 + 1, state), donate_argnums=0)
    for _ in range(3):
      state = step(state)
    np.testing.assert_allclose(nnx.merge(graphdef, state).x[...], x * 8 + 7, rtol=1e-6)
    assert_same(second.x[...], x)


class Transferred:
  """An array whose bytes leave host memory while somebody waits for it, as those of an accelerator do."""

  def __init__(self, shape, sharding, parts):
    self.sharding, self._shape, self._host, self._values = sharding, shape, parts, None

  def block_until_ready(self):
    if self._values is None:
      self._values = np.empty(self._shape, self._host[0].dtype)
      for buffer, index in zip(
        self._host, self.sharding.devices_indices_map(self._shape).values(), strict=True
      ):
        self._values[index] = buffer
      self._host = None
    return self

  def values(self):
    assert self._values is not None, "nobody waited for the transfer"
    return self._values


@pytest.fixture
def accelerator(monkeypatch):
  """Devices that are no CPUs to the loader. Returns the bytes of host memory after each change."""
  levels, lock = [0], threading.Lock()

  def count(nbytes):
    with lock:
      levels.append(levels[-1] + nbytes)

  def counted_empty(shape, dtype):
    buffer = aligned_empty(shape, dtype)
    count(buffer.nbytes)
    weakref.finalize(buffer.base, count, -buffer.nbytes)
    return buffer

  def transfer(shape, sharding, get, dtype):
    parts = [get(index) for index in sharding.devices_indices_map(shape).values()]
    assert all(buffer.dtype == dtype for buffer in parts)
    return Transferred(shape, sharding, parts)

  monkeypatch.setattr(opened_plan, "_is_cpu", lambda plan: False)
  monkeypatch.setattr(fill, "aligned_empty", counted_empty)
  monkeypatch.setattr(jax, "make_array_from_callback", transfer)
  return levels


class TestTransfers:
  """Loading to devices that do not share the host's memory."""

  COUNT, SHAPE, NBYTES = 24, (16, 32), 16 * 32 * 4

  @pytest.fixture
  def tensors(self, rng):
    return {f"x{i}": rng.normal(size=self.SHAPE).astype(np.float32) for i in range(self.COUNT)}

  @pytest.fixture
  def made(self, save, plan, tensors, mesh):
    parameters = dict.fromkeys(tensors, (self.SHAPE, P("fsdp", "tp")))
    # Aligned in the file: a CPU would map it.
    return plan(
      save(tensors, data_start=0), parameters, WeightTable(*((name, name, "v d") for name in tensors)), mesh
    )

  @pytest.mark.parametrize("parameters", [1, 3, 1000])
  def test_host_memory_of_transfers_is_bounded(self, parameters, made, tensors, accelerator, monkeypatch):
    monkeypatch.setattr(opened_plan, "_IN_FLIGHT", parameters * self.NBYTES)
    monkeypatch.setattr(opened_plan, "_WINDOW", 1)
    arrays = load_arrays(made)
    for name, array in arrays.items():
      np.testing.assert_array_equal(array.values(), tensors[name])
    # The next parameter's memory is reserved while the first one's is waited for, and no more are waited for than
    # must be. In the end none is left.
    most = min(parameters + 1, self.COUNT) * self.NBYTES
    assert max(accelerator) == most
    assert accelerator.count(most) == max(1, self.COUNT - parameters)
    assert accelerator[-1] == 0

  def test_a_parameter_that_is_larger_than_the_bound_is_loaded_alone(
    self, made, tensors, accelerator, monkeypatch
  ):
    monkeypatch.setattr(opened_plan, "_IN_FLIGHT", self.NBYTES - 1)
    monkeypatch.setattr(opened_plan, "_WINDOW", 1)
    for name, array in load_arrays(made).items():
      np.testing.assert_array_equal(array.values(), tensors[name])
    assert max(accelerator) == 2 * self.NBYTES

  def test_every_shard_has_memory_of_its_own_and_none_is_the_mapped_file(self, made, accelerator):
    before = pathlib.Path("/proc/self/maps").read_text().count("model.safetensors")
    load_arrays(made)
    assert pathlib.Path("/proc/self/maps").read_text().count("model.safetensors") == before


class TestTies:
  TABLE = WeightTable(("emb", "embed", "v d"), tied=[Tied("head", "embed")])
  PARAMETERS = {"emb": ((8, 4), P("tp"))}

  def test_an_equal_head_is_left_out(self, save, plan, rng, mesh, tiny_chunks):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    x[0, 0] = np.nan  # It is the same as itself here.
    arrays = load_arrays(plan(save({"embed": x, "head": x}), self.PARAMETERS, self.TABLE, mesh))
    assert list(arrays) == ["emb"]
    assert_same(arrays["emb"], x)

  @pytest.mark.parametrize(
    ("head", "embedding", "dtype"),
    [
      ("float32", "bfloat16", None),
      ("bfloat16", "float32", None),
      ("float32", "bfloat16", "float32"),
      ("float16", "bfloat16", None),
      ("float32", "float16", "bfloat16"),
    ],
  )
  def test_heads_are_compared_as_numbers_after_rounding(
    self, head, embedding, dtype, save, plan, rng, tiny_chunks
  ):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    x[1, 1], x[2, 2] = 0.0, np.nan
    y = x.copy()
    y[1, 1] = -0.0
    if head == "float16":
      y = x.astype(embedding).astype(np.float32)
    dtype = None if dtype is None else np.dtype(dtype)
    tensors = {"embed": x.astype(embedding), "head": y.astype(head)}
    loaded = load_arrays(plan(save(tensors), self.PARAMETERS, self.TABLE, dtype=dtype))
    assert_same(loaded["emb"], tensors["embed"].astype(dtype or embedding))
    y[-1, -1] *= 1.02
    with pytest.raises(CheckpointError, match="head differs from embed"):
      load(plan(save(tensors | {"head": y.astype(head)}), self.PARAMETERS, self.TABLE, dtype=dtype))

  def test_a_head_that_does_not_fit_into_the_dtype_differs(self, save, plan):
    x = np.full((8, 4), 1e6, np.float32)
    with pytest.raises(CheckpointError, match="head differs from embed"):
      load(
        plan(
          save({"embed": x.astype("bfloat16"), "head": np.minimum(x, 6e4).astype("float16")}),
          self.PARAMETERS,
          self.TABLE,
        )
      )

  @pytest.mark.parametrize("change", ["last element", "shape"])
  def test_a_different_head_is_an_error_with_both_remedies(self, change, save, plan, rng, tiny_chunks):
    x = np.zeros((8, 4), np.float32)
    y = x.copy()
    match change:
      case "last element":
        y[-1, -1] = 1
      case "shape":
        y = y.reshape(4, 8)
    with pytest.raises(CheckpointError, match=r"untie them in the configuration.*or remove head"):
      load(plan(save({"embed": x, "head": y}), self.PARAMETERS, self.TABLE))

  @pytest.mark.parametrize("parts", [2, 3])
  def test_a_part_of_the_comparison_is_of_those_rows_alone(self, parts, save, plan, rng, tiny_chunks):
    x = rng.normal(size=(6, 4)).astype(np.float32)
    y = x.copy()
    y[-1, 0] += 1
    made = plan(save({"embed": x, "head": y}), {"emb": ((6, 4), P())}, self.TABLE)
    with contextlib.closing(made.checkpoint.open(made.files)) as reader:
      equal = [are_equal(reader, made.ties[0], None, part, parts) for part in range(parts)]
    assert equal == [True] * (parts - 1) + [False]

  @pytest.mark.parametrize("noted", [False, True], ids=["without a note", "noted in the header"])
  def test_a_head_alone_is_the_embedding(self, noted, save, plan, rng):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    directory = save({"head": x}, metadata={"embed": "head", "format": "pt"} if noted else None)
    assert_same(load_arrays(plan(directory, self.PARAMETERS, self.TABLE))["emb"], x)

  def test_a_tensor_that_is_noted_under_another_name_fills_both_parameters(self, save, plan, rng):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    table = WeightTable(("emb", "embed", "v d"), ("w", "head", "v d"), tied=self.TABLE.tied)
    parameters = self.PARAMETERS | {"w": ((8, 4), P())}
    arrays = load_arrays(plan(save({"head": x}, metadata={"embed": "head"}), parameters, table))
    assert_same(arrays["emb"], x)
    assert_same(arrays["w"], x)
    with pytest.raises(CheckpointError, match="embed is missing"):
      plan(save({"head": x}), parameters, table)

  def test_an_index_may_list_a_head_that_no_file_holds(self, save_sharded, plan, rng):
    x = rng.normal(size=(8, 4)).astype(np.float32)
    listed = {"embed": "./m-1.safetensors", "head": "m-1.safetensors"}
    made = plan(save_sharded({"m-1.safetensors": {"embed": x}}, index=listed), self.PARAMETERS, self.TABLE)
    assert made.notes() == ["model.safetensors.index.json lists head, which no file holds"]
    assert_same(load_arrays(made)["emb"], x)


class TestModel:
  def test_the_metadata_is_the_declared_sharding_on_any_mesh(self, save, plan, rng, mesh):
    x = rng.normal(size=(3, 4)).astype(np.float32)
    model = load(plan(save({"x": x}), {"x": ((3, 4), P("fsdp", "tp"))}, WeightTable(("x", "x", "v d")), mesh))
    assert model.x.get_metadata()["out_sharding"] == P("fsdp", "tp")
    assert model.x[...].sharding == NamedSharding(mesh, P(None, "tp"))

  def test_layers_of_a_list_get_their_own_numbers(self, save, plan, rng, mesh):
    tensors = {f"m.{i}.w": rng.normal(size=4).astype(np.float32) for i in range(12)}
    parameters = {f"layers.{i}.w": ((4,), P("tp")) for i in range(12)}
    model = load(plan(save(tensors), parameters, WeightTable(("layers.{i}.w", "m.{i}.w", "d")), mesh))
    for i in range(12):
      assert_same(model.layers[i]["w"][...], tensors[f"m.{i}.w"])
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))

  def test_files_of_a_store_are_fetched_by_name_and_read_where_they_lie(
    self, save, save_sharded, plan, rng, tmp_path
  ):
    x = rng.normal(size=(4, 6)).astype(np.float32)
    remote = save_sharded({"m-1.safetensors": {"a": x}, "m-2.safetensors": {"unused": x}})
    index = json.loads((remote / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"a", "unused"}

    class Store(LocalFiles):
      fetched = ()

      def fetch(self, names):
        type(self).fetched += tuple(names)
        for name in names:
          (tmp_path / "local").mkdir(exist_ok=True)
          (tmp_path / "local" / name).write_bytes((remote / name).read_bytes())
        return str(tmp_path / "local")

    table = WeightTable(("a", "a", "v d"), ignored=[Ignored("unused", "a test")])
    made = plan(Store(str(remote)), {"a": ((4, 6), P())}, table)
    assert_same(load_arrays(made)["a"], x)
    assert Store.fetched == ("m-1.safetensors",)


class TestOpenedPlans:
  def test_parameters_are_read_one_by_one_in_any_order(self, save, plan, rng, mesh):
    tensors = {name: rng.normal(size=(8, 4)).astype(np.float32) for name in "abc"}
    table = WeightTable(*((name, name, "v d") for name in tensors))
    made = plan(save(tensors), dict.fromkeys(tensors, ((8, 4), P("fsdp", "tp"))), table, mesh)
    with made.open() as opened:
      for name in "cabc":
        assert_same(opened.read(name), tensors[name])
      assert opened.read_all("ba").keys() == {"a", "b"}

  def test_nothing_is_opened_before_the_first_read(self, save, plan, mesh):
    directory = save({"a": np.zeros((8, 4), np.float32)})
    made = plan(directory, {"a": ((8, 4), P())}, WeightTable(("a", "a", "v d")), mesh)
    (directory / "model.safetensors").unlink()
    with made.open() as opened, pytest.raises(CheckpointError, match="removed after its header was read"):
      opened.read("a")

  def test_a_head_that_differs_is_found_by_each_read(self, save, plan, mesh):
    x = np.zeros((8, 4), np.float32)
    table = WeightTable(("emb", "embed", "v d"), tied=[Tied("head", "embed")])
    made = plan(save({"embed": x, "head": x + 1}), {"emb": ((8, 4), P())}, table, mesh)
    with made.open() as opened:
      for _ in range(2):
        with pytest.raises(CheckpointError, match="head differs from embed"):
          opened.read("emb")

  def test_it_ends_with_its_block(self, save, plan):
    made = plan(
      save({"a": np.zeros((8, 4), np.float32)}), {"a": ((8, 4), P())}, WeightTable(("a", "a", "v d"))
    )
    with made.open() as opened:
      opened.read("a")
    with pytest.raises(ValueError, match="the opened plan is closed"):
      opened.read("a")

  def test_threads_share_one_reader(self, save, plan):
    made = plan(
      save({"a": np.zeros((8, 4), np.float32)}), {"a": ((8, 4), P())}, WeightTable(("a", "a", "v d"))
    )
    ready = threading.Barrier(8)
    with made.open() as opened, concurrent.futures.ThreadPoolExecutor(8) as pool:
      readers = set(pool.map(lambda _: (ready.wait(), id(opened.reader))[1], range(8)))
    assert len(readers) == 1


@pytest.mark.parametrize(
  "spec", [P("tp", "fsdp"), P("fsdp", "tp"), P(None, "tp"), P(None, ("fsdp", "tp"))], ids=str
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_one_copy_fills_the_rows_of_all_shards_that_are_side_by_side(
  spec, dtype, plan, save, rng, mesh, monkeypatch
):
  # Of 128 bytes and more, so that shards leave no gaps; experts are stacked, and split by columns.
  experts = {f"e{i}": rng.normal(size=(8, 64)).astype(np.float32) for i in range(2)}
  tensors = {"x": rng.normal(size=(64, 128)).astype(np.float32), **experts}
  copies = []
  cast_into = fill.cast_into
  monkeypatch.setattr(fill, "cast_into", lambda *args: (copies.append(args[0].shape), cast_into(*args)))
  table = WeightTable(("x", "x", "a b"), ("e", "e{i}", "a b -> i a b"))
  parameters = {"x": ((64, 128), spec), "e": ((2, 8, 64), P(None, *spec))}
  made = plan(save(tensors), parameters, table, mesh, dtype=dtype and np.dtype(dtype))
  arrays = load_arrays(made)
  for name, expected in (("x", tensors["x"]), ("e", np.stack(list(experts.values())))):
    np.testing.assert_array_equal(np.asarray(arrays[name]), expected.astype(made.parameters[0].dtype))
  if dtype is None:
    assert len(copies) == 3 * (mesh.shape[spec[0]] if spec[0] else 1)
