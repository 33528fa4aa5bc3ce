"""Stacked layers run as a list of the same layers does, and what a run changes in them stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.digest import digest
from models_core.layers import by_layer, decoder_layers, dotted, take_layer
from models_core.layers.parameters import parameter as new_parameter
from models_core.layers.remat import RematConfig
from models_core.loading.abstract import abstract_model
from models_core.sharding import ShardingConfig

from .tiny_lm import POSITIONS, TOKENS, Config, D, Model, make, run

# Two units of two layers, and a layer more.
WINDOWS = (2, None, 2, None, 2)
STACKED = Config(windows=WINDOWS, scan_layers=True)


def parameters(model):
  return {dotted(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def pair(mesh, **fields):
  """A model whose layers are a list, and the same one with stacks."""
  unrolled = make(mesh, Config(windows=WINDOWS, **fields))
  model = abstract_model(Model, dataclasses.replace(STACKED, **fields), mesh)
  arrays = parameters(unrolled)
  stacks = {}
  for name, parameter in model.parameters.items():
    shapes, _ = by_layer({name: parameter}, None)
    values = [np.asarray(arrays[layer]) for layer in shapes]
    stacks[name] = jax.device_put(
      np.stack(values) if list(shapes) != [name] else values[0], parameter.sharding
    )
  return unrolled, model.fill(stacks)


def test_random_values_are_those_of_a_list():
  unrolled, scanned = (
    Model(Config(windows=WINDOWS, scan_layers=scan), rngs=nnx.Rngs(0)) for scan in (False, True)
  )
  assert list(scanned.layers) == ["0:4:2", "1:4:2", "4"]
  assert digest(scanned) == digest(unrolled)
  names = {name for name in parameters(scanned) if ".q.w" in name}
  assert names == {"layers.0:4:2.q.w", "layers.1:4:2.q.w", "layers.4.q.w"}


def test_the_axis_of_layers_is_sharded_as_the_configuration_says(mesh):
  shd = dataclasses.replace(ShardingConfig.get_default_sharding(is_sampling=True), stack_l=("fsdp",))
  unrolled, scanned = pair(mesh, shd_config=shd)
  stack = parameters(scanned)["layers.0:4:2.q.w"]
  assert stack.sharding == NamedSharding(mesh, P("fsdp", "tp", None))
  np.testing.assert_allclose(
    run(scanned, TOKENS, POSITIONS)[0], run(unrolled, TOKENS, POSITIONS)[0], rtol=1e-5
  )
  assert digest(scanned) == digest(unrolled)


def test_a_layer_of_a_sharded_stack_keeps_every_bit(mesh):
  values = np.array([[[-0.0, 1.0]] * 4, [[np.nan, -0.0]] * 4], np.float32)
  stack = jax.device_put(values, NamedSharding(mesh, P("fsdp", "tp")))
  for at in (0, 1):
    layer = take_layer(stack, at)
    assert layer.sharding == NamedSharding(mesh, P("tp"))
    assert np.asarray(layer).tobytes() == values[at].tobytes()


class Counting(nnx.Module):
  """Around a stack: counts its calls, drops values, and adds a parameter in its first call."""

  def __init__(self, inner):
    self.inner = inner
    self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

  def __call__(self, x, *args):
    self.count[...] += 1
    if not hasattr(self, "gain"):
      self.gain = nnx.LoRAParam(jnp.ones(D), out_sharding=P("tp"), eager_sharding=False)
    x, cache = self.inner(x, *args)
    return self.drop(x * self.gain[...]), cache


def test_what_a_run_changes_stays(mesh):
  _, model = pair(mesh, remat_config=RematConfig.DECODER)
  model.layers["0:4:2"] = counting = Counting(model.layers["0:4:2"])
  first, second = (np.asarray(run(model, TOKENS, POSITIONS)[0]) for _ in range(2))
  assert int(counting.count[...]) == 4
  assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()
  gain = counting.gain.get_raw_value()
  assert gain.shape == (2, D)
  assert counting.gain.get_metadata()["out_sharding"] == P(None, "tp")
  assert gain.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tp")), 2)
  # Each layer has a value of its own from now on.
  grads = nnx.jit(nnx.grad(lambda model: model(TOKENS, POSITIONS)[0].std()))(model)
  assert np.abs(np.diff(np.asarray(grads.layers["0:4:2"].gain[...]), axis=0)).max() > 0


def kept(model):
  """Bytes kept for the backward pass."""
  graphdef, state = nnx.split(model)
  loss = lambda state: nnx.merge(graphdef, state)(TOKENS, POSITIONS)[0].sum()
  arrays = jax.tree.leaves(jax.eval_shape(lambda state: jax.vjp(loss, state)[1], state))
  return sum(array.size * array.dtype.itemsize for array in arrays)


@pytest.mark.parametrize("which", [0, 1], ids=["list", "stacks"])
def test_policies_keep_what_their_names_say(which):
  bytes_kept = {
    name: kept(pair(None, remat_config=RematConfig(name))[which])
    for name in ("decoder", "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "none")
  }
  decoder, nothing, few, dots, plain = bytes_kept.values()
  assert decoder == nothing < few < min(dots, plain)


@pytest.mark.parametrize("name", ["dots_with_no_batch_dims_saveable", "offload_dot_with_no_batch_dims"])
def test_policies_change_no_gradient(name):
  grad = nnx.jit(nnx.grad(lambda model: model(TOKENS, POSITIONS)[0].std()))
  expected, found = (parameters(grad(pair(None, remat_config=RematConfig(one))[1])) for one in ("none", name))
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6)


class _Numbered(nnx.Module):
  """A layer that knows its number, has its own width or a parameter of all layers."""

  def __init__(self, kind, i, shared, rngs):
    self.number = i if kind == "numbered" else 0
    self.w = new_parameter((4, 4 + i if kind == "wider" else 4), P(), rngs=rngs)
    if kind == "shared":
      self.table = shared


@pytest.mark.parametrize("kind", ["alike", "numbered", "wider", "shared"])
@pytest.mark.parametrize("names", [[None] * 4, [["full"]] * 4, list("abab")], ids=str)
def test_layers_without_values_are_those_with_values(kind, names):
  class Model(nnx.Module):
    def __init__(self, config, *, rngs):
      self.shared = new_parameter((2,), P(), rngs=rngs)
      self.layers = decoder_layers(config, names, lambda i: _Numbered(kind, i, self.shared, rngs))

  model = Model(None, rngs=nnx.Rngs(0))
  structure = abstract_model(Model, None)
  state = dict(nnx.to_flat_state(nnx.state(model)))
  assert {name: p.shape for name, p in structure.parameters.items()} == {
    ".".join(map(str, path)): variable.get_value().shape for path, variable in state.items()
  }
  filled = structure.fill({name: np.zeros(p.shape, np.float32) for name, p in structure.parameters.items()})
  assert [layer.number for layer in filled.layers] == [layer.number for layer in model.layers]
  assert len({id(layer.w) for layer in filled.layers}) == 4
