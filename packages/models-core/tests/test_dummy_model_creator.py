import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from models_core.dummy_model_creator import create_dummy_model
from models_core.layers.parameters import parameter

SHAPES = {"w": (64, 32), "v": (64, 32), "odd": (3, 32)}
SPECS = {"w": P("tp", "fsdp"), "v": P("tp", "fsdp"), "odd": P("tp", "fsdp")}


class Model(nnx.Module):
  def __init__(self, config, *, rngs):
    for name, shape in SHAPES.items():
      setattr(self, name, parameter(shape, SPECS[name], rngs=rngs))
    self.norm = parameter((32,), P("tp"), rngs=rngs, init="ones")
    self.bias = parameter((32,), P("fsdp"), rngs=rngs, init="zeros", dtype=jnp.bfloat16)
    self.count = nnx.Param(jnp.ones((4,), jnp.int32))
    self.flag = nnx.Param(jnp.ones((4,), bool))


def values(model):
  return {path[0]: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def plain():
  return values(create_dummy_model(Model, None))


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float64"])
def test_the_dtype_must_be_one_that_parameters_can_have(dtype):
  with pytest.raises(TypeError, match="dtype"):
    create_dummy_model(Model, None, dtype=dtype)


def test_values_do_not_depend_on_the_mesh(plain, mesh, meshes):
  for where in (mesh, meshes("auto", (4, 1), ("tp", "data"))):
    model = create_dummy_model(Model, None, where)
    for name, value in values(model).items():
      np.testing.assert_array_equal(value, plain[name], strict=True)
  assert create_dummy_model(Model, None, mesh).w[...].sharding == NamedSharding(mesh, P("tp", "fsdp"))


def test_shards_lie_where_the_mesh_can_hold_them(mesh):
  model = create_dummy_model(Model, None, mesh)
  assert model.odd[...].sharding == NamedSharding(mesh, P(None, "fsdp"))
  assert model.odd.get_metadata()["out_sharding"] == P("tp", "fsdp")
  for variable in jax.tree.leaves(nnx.state(model)):
    assert isinstance(variable.sharding, NamedSharding)


def test_without_a_mesh_there_is_one_device():
  assert create_dummy_model(Model, None).w[...].sharding == SingleDeviceSharding(jax.local_devices()[0])


def test_norms_are_ones_biases_and_integers_zero_and_all_else_normal(plain):
  np.testing.assert_array_equal(plain["norm"], np.ones(32, np.float32), strict=True)
  np.testing.assert_array_equal(plain["bias"], np.zeros(32, jnp.bfloat16), strict=True)
  np.testing.assert_array_equal(plain["count"], np.zeros(4, np.int32), strict=True)
  np.testing.assert_array_equal(plain["flag"], np.zeros(4, bool), strict=True)
  assert plain["w"].dtype == np.float32
  assert abs(plain["w"].mean()) < 0.002
  assert abs(plain["w"].std() - 0.02) < 0.001
  assert not np.array_equal(plain["w"], plain["v"])


def test_seed_and_scale_matter_and_nothing_else_does(plain):
  np.testing.assert_array_equal(values(create_dummy_model(Model, None))["w"], plain["w"])
  other = values(create_dummy_model(Model, None, random_seed=1))["w"]
  assert np.isclose(other, plain["w"]).mean() < 0.01
  wide = values(create_dummy_model(Model, None, scale=2.0))
  np.testing.assert_allclose(wide["w"], plain["w"] * 100, rtol=1e-5)
  np.testing.assert_array_equal(wide["norm"], np.ones(32))


@pytest.mark.parametrize(
  "dtype", [jnp.bfloat16, np.dtype(jnp.bfloat16), "bfloat16"], ids=["type", "dtype", "name"]
)
def test_the_dtype_is_that_of_all_floats(dtype):
  model = create_dummy_model(Model, None, dtype=dtype)
  dtypes = {name: value.dtype for name, value in values(model).items()}
  floats = dict.fromkeys(("w", "v", "odd", "norm", "bias"), jnp.dtype(dtype))
  assert dtypes == floats | {"count": np.int32, "flag": np.bool_}


def test_layers_of_flax_with_and_without_annotations_are_made(mesh):
  class Foreign(nnx.Module):
    def __init__(self, config, *, rngs):
      annotated = nnx.with_partitioning(nnx.initializers.normal(), ("fsdp", "tp"))
      self.linear = nnx.Linear(4, 8, kernel_init=annotated, rngs=rngs)
      self.norm = nnx.LayerNorm(8, rngs=rngs)

  for where in (None, mesh):
    model = create_dummy_model(Foreign, None, where)
    assert model.linear.kernel.shape == (4, 8)
    if where is not None:
      assert model.linear.kernel[...].sharding == NamedSharding(mesh, P("fsdp", "tp"))
      assert model.norm.scale[...].sharding == NamedSharding(mesh, P())


def test_a_mesh_in_context_changes_nothing(plain, mesh):
  with jax.set_mesh(mesh):
    model = create_dummy_model(Model, None, mesh)
  for name, value in values(model).items():
    np.testing.assert_array_equal(value, plain[name], strict=True)
