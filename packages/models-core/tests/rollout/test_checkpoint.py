"""A model as named arrays and back: bits, names, errors, and how much memory it takes."""

import dataclasses
import gc
import itertools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.adapters import merge_lora
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import AdapterError, CheckpointError, ModelsError
from models_core.layers import dotted
from models_core.rollout import LazyCheckpoint, from_checkpoint, iter_checkpoint, to_checkpoint
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.weights import Form, Tied, WeightTable

from ..adapters.tiny import ALPHA, CONFIG, FAMILY, RANK, adapted, parameters, plain

V, D, F, EXPERTS = 16, 8, 12, 4
TABLE = WeightTable(
  ("embed", "embed.weight", "v d"),
  ("layers.{i}.up", [Form("{i}.{e}.up", "f d -> e f d"), Form("{i}.gate_up", "e (1/2 f) d -> e f d")]),
  ("layers.{i}.gate", [Form("{i}.{e}.gate", "f d -> e f d"), Form("{i}.gate_up", "e (0/2 f) d -> e f d")]),
  ("layers.{i}.q", "{i}.q", "d f -> f d"),
  ("layers.{i}.codes", "{i}.codes", "d"),
  tied=[Tied("head.weight", "embed.weight")],
)
SHAPES = {
  "embed": ((V, D), P("tp", "fsdp")),
  "layers.0.up": ((EXPERTS, F, D), P("tp", "fsdp")),
  "layers.0.gate": ((EXPERTS, F, D), P("tp", "fsdp")),
  "layers.0.q": ((F, D), P("tp", "fsdp")),
  "layers.0.codes": ((D,), P(), jnp.int32),
}


@pytest.fixture
def family(toy):
  return types.SimpleNamespace(huggingface=TABLE, model_class=toy)


@pytest.fixture
def make(toy):
  """Makes a model of random numbers, some of them -0, on a mesh."""

  def build(mesh=None, dtype="float32", seed=0, **changes):
    table = {name: row for name, row in (SHAPES | changes).items() if row is not None}
    model = create_dummy_model(toy, table, mesh, dtype=dtype, random_seed=seed)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
      value = variable.get_value()
      zeroed = np.array(value)
      zeroed.reshape(-1)[::5] = -0.0
      variable.set_value(jax.device_put(zeroed, value.sharding))
    return model

  return build


def arrays_of(model):
  return {dotted(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def bits(array):
  array = np.ascontiguousarray(array)
  return array.view(f"u{array.itemsize}")


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    np.testing.assert_array_equal(bits(found[name]), bits(array), err_msg=name)


def saved(model, family, directory, config=CONFIG):
  save_model_to_safetensors(nnx.state(model, nnx.Param), directory, family=family, config=config)
  return safetensors.numpy.load_file(directory / "model.safetensors")


def expected_of(model):
  """The tensors of a Toy, in NumPy alone."""
  arrays = {name: np.array(array) for name, array in arrays_of(model).items()}
  tensors = {
    "embed.weight": arrays["embed"],
    "0.q": arrays["layers.0.q"].T,
    "0.codes": arrays["layers.0.codes"],
  }
  for part, e in itertools.product(("up", "gate"), range(EXPERTS)):
    tensors[f"0.{e}.{part}"] = arrays[f"layers.0.{part}"][e]
  return tensors


def fused(tensors):
  """The same tensors in the other form."""
  parts = [np.stack([tensors.pop(f"0.{e}.{part}") for e in range(EXPERTS)]) for part in ("gate", "up")]
  return tensors | {"0.gate_up": np.concatenate(parts, axis=1)}


@pytest.fixture(params=["one device", "explicit", "auto"])
def mesh(request, meshes):
  return None if request.param == "one device" else meshes(request.param, (2, 2), ("fsdp", "tp"))


class TestToCheckpoint:
  def test_the_arrays_are_the_saved_tensors(self, mesh, tmp_path):
    model = create_dummy_model(FAMILY.model_class, CONFIG, mesh, dtype="bfloat16")
    same(to_checkpoint(model, FAMILY), saved(model, FAMILY, tmp_path / "saved"))

  def test_every_bit_of_sharded_experts_is_kept(self, make, family, mesh):
    model = make(mesh)
    same(to_checkpoint(model, family), expected_of(model))

  def test_what_is_a_parameter_already_is_the_parameter(self, make, family, mesh):
    model = make(mesh)
    found = to_checkpoint(model, family)
    assert found["embed.weight"] is model.embed.get_value()
    assert found["0.q"] is not model.layers[0].q.get_value()

  def test_the_rest_is_sharded_as_its_axes_are(self, make, family, mesh):
    found = to_checkpoint(make(mesh), family)
    if mesh is not None:
      assert found["0.2.up"].sharding == NamedSharding(mesh, P("fsdp", None))
      assert found["0.q"].sharding == NamedSharding(mesh, P("fsdp", "tp"))
      assert found["embed.weight"].sharding.mesh == mesh

  def test_the_form_that_a_configuration_publishes(self, toy):
    table = WeightTable(
      ("w", [Form("one.{e}", "f d -> e f d"), Form("all", "e f d", when=lambda config: config)])
    )
    model = create_dummy_model(toy, {"w": ((2, 3, 4), P())})
    for config, names in ((False, {"one.0", "one.1"}), (True, {"all"})):
      model.config = config
      assert to_checkpoint(model, types.SimpleNamespace(huggingface=table)).keys() == names

  def test_names_and_shapes_cost_nothing(self, make, family):
    model = make()
    gc.collect()
    before = len(jax.live_arrays())
    lazy = LazyCheckpoint(model, family)
    assert {name: (one.shape, one.dtype) for name, one in lazy.shapes.items()} == {
      name: (array.shape, array.dtype) for name, array in expected_of(model).items()
    }
    assert len(lazy) == len(lazy.shapes)
    assert "0.3.up" in lazy
    assert "0.4.up" not in lazy
    assert len(jax.live_arrays()) == before

  def test_a_lazy_checkpoint_is_the_model_as_it_was(self, make, family):
    model = make()
    expected, lazy = expected_of(model), LazyCheckpoint(model, family)
    model.embed.set_value(model.embed.get_value() + 1)
    same(dict(lazy), expected)

  def test_a_model_of_another_family(self, make):
    with pytest.raises(TypeError, match="the weight table has no row for the parameter embed"):
      to_checkpoint(make(), FAMILY)

  def test_a_model_without_numbers(self, make, family):
    model = make()
    model.embed.set_value(jax.ShapeDtypeStruct((V, D), np.float32))
    with pytest.raises(ModelsError, match=r"embed is a ShapeDtypeStruct, expected a jax\.Array"):
      to_checkpoint(model, family)


class TestLora:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_factors_are_merged_as_saving_merges_them(self, dtype, tmp_path):
    model = adapted(dtype)
    merged = merge_lora(model, FAMILY, alpha=ALPHA)
    same(to_checkpoint(model, FAMILY, alpha=ALPHA, rank=RANK), saved(merged, FAMILY, tmp_path / "saved"))

  def test_what_no_factor_changes_is_not_copied(self):
    model = adapted()
    found = to_checkpoint(model, FAMILY, alpha=ALPHA)
    assert found["model.embed.weight"] is model.embed.w.get_value()

  def test_the_alpha_must_be_known(self):
    with pytest.raises(AdapterError, match=r"has LoRA factors, such as layers\.\d\.\S+_lora_\w: give alpha="):
      to_checkpoint(adapted(), FAMILY)
    with pytest.raises(AdapterError, match=r"no nnx\.LoRAParam"):
      to_checkpoint(plain(), FAMILY, alpha=1.0)
    with pytest.raises(AdapterError, match="rank=7 is given"):
      to_checkpoint(adapted(), FAMILY, alpha=1.0, rank=7)


@nnx.register_data_type
@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Numbers:
  """As qwix keeps quantised numbers."""

  qvalue: nnx.Param
  scale: nnx.Param
  zero_point: nnx.Param | None = None
  qtype: str = dataclasses.field(default="int8", metadata={"static": True})


@nnx.register_data_type
@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Holder:
  """As qwix replaces a parameter."""

  array: Numbers


def quantise(module, leaf, dtype, *, zero=False, tiles=1, nf4=False, seed=0):
  """Quantises a parameter in the way of qwix. Returns its exact numbers, float64."""
  value, rng = getattr(module, leaf).get_value(), np.random.default_rng(seed)
  shape, tiled = value.shape, (*value.shape[:-1], tiles)
  q = (
    rng.integers(0, 16, shape).astype(ml_dtypes.uint4)
    if nf4
    else rng.integers(-127, 128, shape).astype(np.int8)
  )
  scale = rng.uniform(0.1, 1, tiled).astype(dtype)
  point = rng.integers(-9, 9, tiled).astype(np.int8) if zero else None
  wide = lambda x: np.repeat(np.asarray(x).astype(np.float64), shape[-1] // tiles, axis=-1)
  # The codes of float32 numbers, from -1 to 1.
  codes = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
           -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
           0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
           1.0]  # fmt: skip
  number = np.array(codes)[q.astype(int)] if nf4 else q.astype(np.float64) - (wide(point) if zero else 0)
  spec = value.sharding
  put = lambda x: nnx.Param(
    jax.device_put(x, spec if x.shape == shape else value.sharding.with_memory_kind(None))
  )
  if isinstance(spec, NamedSharding):
    rest = NamedSharding(spec.mesh, P(*spec.spec[:-1], None)) if len(spec.spec) == len(shape) else spec
    put = lambda x: nnx.Param(jax.device_put(x, spec if x.shape == shape else rest))
  parts = Numbers(put(q), put(scale), put(point) if zero else None, "nf4" if nf4 else "int8")
  setattr(module, leaf, Holder(parts))
  return number * wide(scale)


class TestQuantised:
  @pytest.mark.parametrize(
    "options", [{}, {"zero": True}, {"tiles": 4}, {"zero": True, "tiles": 2}, {"nf4": True}], ids=str
  )
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_numbers_are_exact_until_they_are_rounded_once(self, make, family, mesh, options, dtype):
    model = make(mesh, dtype)
    sharding = model.layers[0].q.get_value().sharding
    exact = quantise(model.layers[0], "q", jnp.dtype(dtype), **options)
    experts = quantise(model.layers[0], "up", jnp.dtype(dtype), **options)
    found = to_checkpoint(model, family)
    np.testing.assert_array_equal(found["0.q"], exact.T.astype(np.float32).astype(dtype))
    for e in range(EXPERTS):
      np.testing.assert_array_equal(found[f"0.{e}.up"], experts[e].astype(np.float32).astype(dtype))
    assert found["0.q"].dtype == jnp.dtype(dtype)
    assert found["0.q"].sharding.device_set == sharding.device_set

  def test_factors_beside_a_quantised_parameter_cost_no_rounding_of_their_own(self):
    model = adapted("bfloat16")
    layer = model.layers[1]
    exact = quantise(layer.q, "w", jnp.dtype(jnp.bfloat16))
    a, b = (np.asarray(factor[...], np.float64) for factor in (layer.q.w_lora_a, layer.q.w_lora_b))
    found = to_checkpoint(model, FAMILY, alpha=ALPHA)["model.layers.1.attn.q.weight"]
    expected = exact + ALPHA / RANK * (b.T @ a.T)
    np.testing.assert_array_equal(found, expected.astype(np.float32).astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16

  def test_numbers_without_a_scale(self, make, family):
    model = make()
    quantise(model.layers[0], "q", np.dtype(np.float32))
    model.layers[0].q.array.scale = None
    with pytest.raises(ModelsError, match=r"layers\.0\.q\.array\.qvalue has no scale beside it"):
      to_checkpoint(model, family)


def live_bytes():
  return sum(array.nbytes for array in jax.live_arrays())


class TestMemory:
  @pytest.fixture(autouse=True)
  def _no_garbage(self):
    """Arrays that cycles of other tests hold would be freed while these count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

  def test_one_tensor_at_a_time(self, make, family):
    model = make(layers=None)
    before, items = live_bytes(), []
    largest = max(array.nbytes for array in expected_of(model).values())
    for name, array in iter_checkpoint(model, family):
      items.append(name)
      assert live_bytes() - before <= largest, name
      del array
    assert set(items) == expected_of(model).keys()

  def test_one_merged_parameter_and_one_tensor_at_a_time(self):
    model = adapted()
    before = live_bytes()
    largest = max(v.get_value().nbytes for v in parameters(model).values())
    for name, array in iter_checkpoint(model, FAMILY, alpha=ALPHA):
      # What each dequantised or merged parameter adds, and factors that were spread over the devices.
      assert live_bytes() - before <= largest + array.nbytes, name

  def test_one_parameter_at_a_time_is_set(self, make, family, monkeypatch):
    model, source = make(seed=1), make(seed=2)
    lazy, before = LazyCheckpoint(source, family), live_bytes()
    largest = max(array.nbytes for array in arrays_of(model).values())
    peak = 0
    own = LazyCheckpoint.__getitem__

    def counted(self, name):
      nonlocal peak
      array = own(self, name)
      peak = max(peak, live_bytes() - before)
      return array

    monkeypatch.setattr(LazyCheckpoint, "__getitem__", counted)
    from_checkpoint(model, family, lazy)
    same(arrays_of(model), arrays_of(source))
    # A parameter that is being filled, and a tensor of it.
    assert 0 < peak <= largest + largest // EXPERTS


class TestFromCheckpoint:
  @pytest.mark.parametrize("form", ["one by one", "fused"])
  @pytest.mark.parametrize("kind", ["numpy", "jax", "pairs"])
  def test_every_bit_arrives(self, make, family, mesh, form, kind):
    source, model = make(seed=1), make(mesh, seed=2)
    before = {name: array.sharding for name, array in arrays_of(model).items()}
    tensors = expected_of(source) if form == "one by one" else fused(expected_of(source))
    if kind != "numpy":
      tensors = {name: jnp.asarray(array) for name, array in tensors.items()}
    from_checkpoint(model, family, tensors.items() if kind == "pairs" else tensors)
    same(arrays_of(model), arrays_of(source))
    assert {name: array.sharding for name, array in arrays_of(model).items()} == before

  @pytest.mark.parametrize("given", [to_checkpoint, LazyCheckpoint, iter_checkpoint])
  def test_from_a_model_on_another_mesh(self, make, family, mesh, meshes, given):
    source = make(meshes("explicit", (4,), ("tp",)), seed=1)
    model = make(mesh, seed=2)
    from_checkpoint(model, family, given(source, family))
    same(arrays_of(model), arrays_of(source))

  @pytest.mark.parametrize("inside", [False, True])
  def test_inside_a_mesh_too(self, make, family, mesh, inside):
    source, model = make(mesh, seed=1), make(mesh, seed=2)
    with jax.set_mesh(mesh) if mesh else jax.default_device(None):
      from_checkpoint(model, family, to_checkpoint(source, family))
    same(arrays_of(model), arrays_of(source))

  @pytest.mark.parametrize("kind", ["numpy", "jax"])
  def test_the_dtype_is_the_models(self, make, family, mesh, kind):
    source, model = make(seed=1), make(mesh, "bfloat16")
    tensors = expected_of(source)
    if kind == "jax":
      tensors = {name: jnp.asarray(array) for name, array in tensors.items()}
    from_checkpoint(model, family, tensors)
    for name, array in arrays_of(source).items():
      expected = np.asarray(array).astype(jnp.bfloat16 if array.dtype == np.float32 else array.dtype)
      np.testing.assert_array_equal(bits(arrays_of(model)[name]), bits(expected))

  def test_the_model_shares_no_memory_with_the_arrays(self, make, family, mesh):
    source, model = make(mesh, seed=1), make(mesh, seed=2)
    expected = {name: np.array(array) for name, array in arrays_of(source).items()}
    from_checkpoint(model, family, to_checkpoint(source, family))
    for array in arrays_of(source).values():
      array.delete()
    same(arrays_of(model), expected)
    tensors = {name: np.array(array) for name, array in expected_of(model).items()}
    from_checkpoint(model, family, tensors)
    for array in tensors.values():
      array[...] = 0
    same(arrays_of(model), expected)

  def test_the_variables_stay_the_same_objects(self, make, family):
    model = make()
    variable, metadata = model.embed, model.embed.get_metadata()
    from_checkpoint(model, family, expected_of(make(seed=1)))
    assert model.embed is variable
    assert model.embed.get_metadata() == metadata

  def test_factors_stay(self):
    model, source = adapted(seed=1), plain(seed=5)
    factors = [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    from_checkpoint(model, FAMILY, to_checkpoint(source, FAMILY))
    for name, variable in parameters(model).items():
      np.testing.assert_array_equal(variable.get_value(), parameters(source)[name].get_value())
    for old, new in zip(factors, jax.tree.leaves(nnx.state(model, nnx.LoRAParam)), strict=True):
      np.testing.assert_array_equal(old, new)

  def test_a_tied_head_that_is_the_embedding(self, make, family, mesh):
    source, model = make(seed=1), make(mesh)
    tensors = expected_of(source)
    from_checkpoint(model, family, tensors | {"head.weight": tensors["embed.weight"].copy()})
    same(arrays_of(model), arrays_of(source))


class TestErrors:
  @pytest.fixture
  def refused(self, make, family):
    """Gives arrays to a model, which must refuse them and stay as it was. Returns the problems."""

    def give(tensors, dtype="float32"):
      model = make(dtype=dtype, seed=3)
      before = arrays_of(model)
      with pytest.raises(CheckpointError) as caught:
        from_checkpoint(model, family, tensors)
      after = arrays_of(model)
      assert all(after[name] is array for name, array in before.items())
      assert caught.value.where == "the given arrays"
      return caught.value.problems

    return give

  @pytest.fixture
  def tensors(self, make):
    return expected_of(make(seed=1))

  def test_all_problems_at_once(self, refused, tensors):
    tensors["0.q"] = tensors["0.q"].T
    tensors["0.extra"] = np.zeros(3)
    del tensors["embed.weight"], tensors["0.2.up"]
    assert sorted(refused(tensors)) == [
      "0.2.up is missing: the parameter layers.0.up (4, 12, 8) needs it",
      "0.extra (3,) is unexpected: the model has no parameter for it",
      "0.q has shape (12, 8), but the parameter layers.0.q (12, 8) needs (8, 12)",
      "embed.weight is missing: the parameter embed (16, 8) needs it",
    ]

  def test_a_parameter_in_two_forms(self, refused, tensors):
    both = tensors | fused(dict(tensors))
    assert any(
      "layers.0.up occurs twice: the checkpoint holds it as 0.0.up and 0.gate_up" in p for p in refused(both)
    )

  def test_a_name_that_occurs_twice(self, refused, tensors):
    pairs = [*tensors.items(), ("0.q", tensors["0.q"]), ("0.q", tensors["0.q"])]
    assert refused(pairs) == ("0.q occurs 3 times: give each name once",)

  @pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
  def test_a_tied_head_that_differs(self, refused, tensors, kind):
    other = tensors["embed.weight"].copy()
    other[-1, -1] += 1
    (problem,) = refused({name: kind(array) for name, array in (tensors | {"head.weight": other}).items()})
    assert problem.startswith("head.weight differs from embed.weight, but the configuration ties the head")

  @pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
  def test_a_number_that_does_not_fit(self, refused, tensors, kind):
    tensors["0.q"][2, 3] = -1e38
    tensors["0.1.up"][0, 0] = np.inf
    tensors["0.1.up"][0, 1] = np.nan
    (problem,) = refused({name: kind(array) for name, array in tensors.items()}, "float16")
    assert problem == f"0.q: {np.float32(1e38).item()} does not fit into float16, the dtype of its parameter"

  @pytest.mark.parametrize(
    ("name", "dtype", "needed"),
    [("0.q", np.int32, "float32"), ("0.codes", np.float32, "int32"), ("0.codes", np.int8, "int32")],
  )
  def test_numbers_of_another_kind(self, refused, tensors, name, dtype, needed):
    tensors[name] = tensors[name].astype(dtype)
    (problem,) = refused(tensors)
    assert problem.startswith(
      f"{name} has the dtype {np.dtype(dtype)}, but the parameter layers.{name} has {needed}"
    )

  def test_what_is_no_array(self, make, family, tensors):
    model = make(seed=3)
    tensors["0.q"] = tensors["0.q"].tolist()
    with pytest.raises(TypeError, match=r"0\.q is a list, expected an array of JAX or NumPy"):
      from_checkpoint(model, family, tensors)

  def test_a_quantised_model(self, make, family, tensors):
    model = make()
    quantise(model.layers[0], "q", np.dtype(np.float32))
    with pytest.raises(
      ModelsError, match=r"layers\.0\.q is quantised: set the weights of the model that was"
    ):
      from_checkpoint(model, family, tensors)

  def test_a_model_without_numbers(self, make, family, tensors):
    model = make()
    model.embed.set_value(jax.ShapeDtypeStruct((V, D), np.float32))
    with pytest.raises(ModelsError, match=r"embed is a ShapeDtypeStruct, expected a jax\.Array"):
      from_checkpoint(model, family, tensors)
