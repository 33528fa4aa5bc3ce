import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.formats import LocalFiles, read_safetensors
from models_core.loading import abstract_model, load, plan_load
from models_core.weights import WeightTable

SHAPE = (8, 4)


@pytest.fixture
def values(rng):
  return rng.normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def plan(save, toy, values):
  def make(mesh=None, dtype=None):
    model = abstract_model(toy, {"x": (SHAPE, P("fsdp", "tp"))}, mesh)
    files = LocalFiles(str(save({"x": values})))
    return plan_load(read_safetensors(files), model, WeightTable(("x", "x", "v d")), dtype=dtype)

  return make


def product(model, y):
  return (model.x[...] * y).sum()


@pytest.mark.parametrize("dtype", [None, np.dtype(jnp.bfloat16)], ids=["as stored", "cast"])
def test_a_loaded_model_is_what_was_compiled_for(dtype, plan, mesh, values):
  made = plan(mesh, dtype)
  y = jax.ShapeDtypeStruct(SHAPE, made.parameters[0].dtype, sharding=made.parameters[0].parameter.sharding)
  compiled = made.compile(product, y)
  model = load(made)
  found = compiled(model, jax.device_put(np.ones(SHAPE, y.dtype), y.sharding))
  np.testing.assert_allclose(np.float32(found), values.sum(), rtol=0.1 if dtype else 1e-5)
  assert product(model, jnp.ones((), y.dtype)).dtype == found.dtype


def test_without_a_mesh_and_with_donated_arguments(plan, values):
  made = plan()
  update = jax.jit(lambda model, y: y + model.x[...], donate_argnums=1)
  compiled = made.compile(update, jax.ShapeDtypeStruct(SHAPE, np.float32))
  y = jnp.ones(SHAPE)
  np.testing.assert_allclose(compiled(load(made), y), values + 1, rtol=1e-6)
  assert y.is_deleted()


def test_the_caller_does_not_wait(plan, values):
  made = plan()
  traced, go = threading.Event(), threading.Event()

  def slow(model):
    traced.set()
    assert go.wait(60)
    return model.x[...].sum()

  compiled = made.compile(slow)
  assert traced.wait(60)
  model = load(made)
  go.set()
  np.testing.assert_allclose(compiled(model), values.sum(), rtol=1e-5)


def test_errors_of_the_function_come_when_it_is_called(plan):
  made = plan()

  def wrong(model):
    raise RuntimeError("the function is wrong")

  compiled = made.compile(wrong)
  with pytest.raises(RuntimeError, match="the function is wrong"):
    compiled(load(made))
