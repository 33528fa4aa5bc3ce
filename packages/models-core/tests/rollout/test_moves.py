"""Parts of parameters and tensors on devices, compared bit by bit with NumPy's `put_back` and `arrange`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.rollout import moves
from models_core.rollout.moves import Move, finished, put, take, tensor_sharding
from models_core.sharding import default_sharding, fit
from models_core.weights import Conversion, WeightTable, arrange, part_shape, pieces, put_back

# Names and layouts of tensors, one for each parameter; shape and spec of each parameter.
MOVES = {
  "the same": (["w"], ["v d"], (8, 6), P("tp", "fsdp")),
  "joined heads": (["w"], ["(n h) d"], (8, 6), P("tp", "fsdp")),
  "heads apart": (["w"], ["(n h) d -> n h d"], (4, 2, 6), P("tp", None, "fsdp")),
  "transposed": (["w"], ["d f -> f d"], (8, 6), P("tp", "fsdp")),
  "transposed with heads": (["w"], ["d (n h) -> n h d"], (4, 2, 6), P("tp", None, "fsdp")),
  "a number as an axis": (["w"], ["(n h 2) d -> n (2 h) d"], (4, 4, 6), P("tp", None, "fsdp")),
  "stacked": (["w.{e}"], ["f d -> e f d"], (4, 6, 8), P(None, "tp", "fsdp")),
  "stacked and sharded": (["w.{e}"], ["f d -> e f d"], (4, 6, 8), P("tp", "fsdp")),
  "stacked over two mesh axes": (["w.{e}"], ["d f -> e f d"], (4, 6, 8), P(("tp", "fsdp"))),
  "stacked twice": (["w.{e}.{x}"], ["d -> e d x"], (2, 6, 4), P("tp", None, "fsdp")),
  "stacked, with heads": (["w.{e}"], ["(n h) d -> e n h d"], (2, 4, 2, 6), P("fsdp", "tp")),
  "two parameters": (["w", "w"], ["e (0/2 f) d -> e f d", "e (1/2 f) d -> e f d"], (4, 6, 8), P("tp", "fsdp")),
  "interleaved": (["w", "w"], ["(f 0/2) d -> f d", "(f 1/2) d -> f d"], (8, 6), P("tp", "fsdp")),
  "two parameters, stacked": (
    ["w.{e}", "w.{e}"], ["(0/2 f) d -> e f d", "(1/2 f) d -> e f d"], (4, 6, 8), P("tp", "fsdp"),
  ),
}  # fmt: skip

PLUS_ONE = Conversion(lambda x: x - np.float32(1), lambda x: x + np.float32(1))


def numbers(shape, dtype, seed):
  """Random numbers, and what arithmetic could lose: -0, infinities, NaNs with a payload."""
  flat = np.random.default_rng(seed).normal(size=int(np.prod(shape))).astype(dtype)
  flat[::5] = -0.0
  flat[1::7] = np.inf
  flat.view(f"u{flat.itemsize}")[2::11] = 0x7FC5 if flat.itemsize == 2 else 0x7FC12345
  return flat.reshape(shape)


def sharding_of(shape, spec, mesh):
  return default_sharding() if mesh is None else NamedSharding(mesh, fit(shape, spec, mesh)[0])


def bits(array):
  array = np.asarray(array)
  return array.reshape(-1).view(f"u{array.itemsize}").reshape(array.shape)


def resolved(names, layouts, shape, conversion=None):
  """The pieces of each parameter."""
  found = []
  for name, layout in zip(names, layouts, strict=True):
    values = () if conversion is None else (conversion,)
    row = WeightTable(("ours", name, layout, *values)).rows[0]
    found.append(pieces(row, row.forms[0], {}, shape))
  return found


@pytest.fixture(params=["one device", "explicit", "auto"])
def mesh(request, meshes):
  return None if request.param == "one device" else meshes(request.param, (2, 2), ("fsdp", "tp"))


@pytest.mark.parametrize(
  ("inside", "dtype"), [(False, jnp.bfloat16), (True, "float32")], ids=["outside", "inside"]
)
@pytest.mark.parametrize("move", MOVES)
def test_tensors_are_taken_from_parameters_and_put_back_bit_by_bit(move, mesh, dtype, inside):
  names, layouts, shape, spec = MOVES[move]
  values = [numbers(shape, dtype, seed) for seed in range(len(names))]
  sharding = sharding_of(shape, spec, mesh)
  arrays = [jax.device_put(value, sharding) for value in values]
  found = resolved(names, layouts, shape)
  again = [None] * len(arrays)
  with jax.set_mesh(mesh) if inside and mesh else jax.default_device(None):
    for parts in zip(*found, strict=True):
      tensor = np.zeros(parts[0].shape, values[0].dtype)
      for value, piece in zip(values, parts, strict=True):
        put_back(value[piece.target], piece, tensor)
      taken = take(list(zip(arrays, parts, strict=True)))
      np.testing.assert_array_equal(bits(taken), bits(tensor))
      for i, piece in enumerate(parts):
        like = jax.ShapeDtypeStruct(shape, values[0].dtype, sharding=sharding)
        assert taken.sharding.is_equivalent_to(tensor_sharding(Move.of(piece, shape), sharding), taken.ndim)
        again[i] = put(again[i], taken, piece, like)
  for value, array in zip(values, again, strict=True):
    array = finished(array, jax.ShapeDtypeStruct(shape, value.dtype, sharding=sharding))
    np.testing.assert_array_equal(bits(array), bits(value))
    assert array.sharding.is_equivalent_to(sharding, array.ndim)


@pytest.mark.parametrize(
  ("move", "spec"),
  [
    ("joined heads", P("tp", "fsdp")),
    ("heads apart", P("tp", "fsdp")),
    ("transposed", P("fsdp", "tp")),
    ("transposed with heads", P("fsdp", "tp")),
    ("a number as an axis", P("tp", "fsdp")),
    ("stacked", P("tp", "fsdp")),
    ("stacked and sharded", P("fsdp", None)),
    ("stacked over two mesh axes", P(None, None)),
    ("two parameters", P("tp", "fsdp", None)),
    ("interleaved", P("tp", "fsdp")),
  ],
)
def test_a_tensor_is_sharded_as_the_axes_that_it_comes_from(move, spec, mesh):
  names, layouts, shape, own = MOVES[move]
  (piece, *_), *_ = resolved(names, layouts, shape)
  sharding = tensor_sharding(Move.of(piece, shape), sharding_of(shape, own, mesh))
  if mesh is None:
    assert sharding == default_sharding()
  else:
    assert sharding.is_equivalent_to(NamedSharding(mesh, spec), len(piece.shape))


def test_an_axis_that_does_not_divide_is_replicated(meshes):
  """Two halves of 3 rows: 6 rows over 4 devices."""
  mesh = meshes("auto", (4,), ("tp",))
  (piece,), _ = resolved(["w", "w"], ["(0/2 f) d -> f d", "(1/2 f) d -> f d"], (3, 8))
  assert tensor_sharding(Move.of(piece, (3, 8)), NamedSharding(mesh, P("tp"))).spec == P(None, None)


def test_a_parameter_that_is_the_tensor_is_not_copied(mesh):
  array = jax.device_put(numbers((8, 6), "float32", 0), sharding_of((8, 6), P("tp", "fsdp"), mesh))
  ((piece,),) = resolved(["w"], ["(n h) d"], (8, 6))
  assert take([(array, piece)]) is array


def test_numbers_of_another_kind_are_converted_both_ways(mesh):
  value = np.arange(8, dtype=np.float32)
  sharding = sharding_of((8,), P("tp"), mesh)
  ((piece,),) = resolved(["w"], ["d"], (8,), PLUS_ONE)
  taken = take([(jax.device_put(value, sharding), piece)])
  np.testing.assert_array_equal(taken, value + 1)
  back = put(None, taken, piece, jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding))
  np.testing.assert_array_equal(back, value)
  np.testing.assert_array_equal(back, arrange(np.asarray(taken), piece, part_shape(piece, (8,))))


def test_parameters_of_two_dtypes_meet_in_one_that_holds_both():
  wide, narrow = np.full((4, 6), 1.1, np.float32), np.full((4, 6), 2.5, jnp.bfloat16)
  (one,), (two,) = resolved(["w", "w"], ["(0/2 f) d -> f d", "(1/2 f) d -> f d"], (4, 6))
  taken = take([(jnp.asarray(wide), one), (jnp.asarray(narrow), two)])
  np.testing.assert_array_equal(taken, np.concatenate([wide, narrow.astype(np.float32)]))
  assert taken.dtype == np.float32


@pytest.mark.parametrize("move", [name for name in MOVES if "stacked" in name])
def test_other_devices_than_cpus_keep_the_parameters_dtype_meanwhile(move, mesh, monkeypatch):
  monkeypatch.setattr(moves, "_held", lambda like: like.dtype)
  names, layouts, shape, spec = MOVES[move]
  value, sharding = numbers(shape, "float32", 0), sharding_of(shape, spec, mesh)
  like, array = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding), None
  for piece in resolved(names[:1], layouts[:1], shape)[0]:
    tensor = np.zeros(piece.shape, np.float32)
    put_back(value[piece.target], piece, tensor)
    array = put(array, jax.device_put(tensor, tensor_sharding(Move.of(piece, shape), sharding)), piece, like)
    assert array.dtype == np.float32
  assert finished(array, like) is array
  np.testing.assert_array_equal(bits(array), bits(value))


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_an_expert_is_written_alone(meshes, kind):
  """Each of 64 experts costs as much as itself, not as much as all of them."""
  mesh, shape = meshes(kind, (2, 2), ("fsdp", "tp")), (64, 32, 16)
  sharding = NamedSharding(mesh, P("tp", "fsdp"))
  ((first, *_),) = resolved(["w.{e}"], ["f d -> e f d"], shape)
  move = Move.of(first, shape)
  array = jax.device_put(np.zeros(shape, np.uint16), sharding)
  tensor = jax.device_put(np.zeros(shape[1:], jnp.bfloat16), tensor_sharding(move, sharding))
  program = moves._putter(move, shape, np.dtype(jnp.bfloat16), sharding)
  compiled = program.lower(array, tensor, np.int32([3])).compile()
  item = 32 * 16 * 2
  assert compiled.memory_analysis().temp_size_in_bytes <= 2 * item
  assert compiled.cost_analysis()["bytes accessed"] <= 8 * item


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_an_expert_is_sent_alone(meshes, kind):
  """XLA would gather all 64 experts on each device to take one of them."""
  mesh, shape = meshes(kind, (2, 2), ("fsdp", "tp")), (64, 32, 16)
  array = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, P("tp", "fsdp")))
  ((first, *_),) = resolved(["w.{e}"], ["f d -> e f d"], shape)
  program = moves._taker((Move.of(first, shape),), (array.sharding,), np.dtype(np.float32))
  memory = program.lower((array,), (np.int32([3]),)).compile().memory_analysis()
  item = 32 * 16 * 4
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 2 * item
