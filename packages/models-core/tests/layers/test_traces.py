"""Programs that own their model trace layers that are alike once, and compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.layers.traces import one_trace

from .tiny_lm import TOKENS, Config, Layer, make

WINDOWS = (None, 3, None, 3, None, 2)


@pytest.fixture
def calls(monkeypatch):
  """The layers that are called in Python."""
  found = []
  call = Layer.__call__
  monkeypatch.setattr(Layer, "__call__", lambda self, *args: found.append(self) or call(self, *args))
  return found


def logits_of(model, *, once):
  graph, state = nnx.split(model)

  @jax.jit
  def run(state):
    if not once:
      return nnx.merge(graph, state)(TOKENS, cache=model.init_cache(2, 8))
    with one_trace():
      return nnx.merge(graph, state)(TOKENS, cache=model.init_cache(2, 8))

  return run(state)


def test_each_kind_of_layer_is_traced_once(calls):
  model = make(None, Config(windows=WINDOWS))
  expected, expected_cache = logits_of(model, once=False)
  assert len(calls) == 6
  del calls[:]
  found, cache = logits_of(model, once=True)
  assert len(calls) == 3
  np.testing.assert_array_equal(found, expected)
  jax.tree.map(np.testing.assert_array_equal, cache, expected_cache)


def test_layers_that_differ_have_traces_of_their_own(calls):
  class Louder(Layer):
    def __call__(self, x, *args):
      x, cache = super().__call__(x, *args)
      return x * self.factor, cache

  model = make(None, Config(windows=(None,) * 5))
  for i, factor in ((1, 2.0), (2, 3.0), (4, 2.0)):
    model.layers[i].__class__ = Louder
    model.layers[i].factor = factor
  model.layers[3].extra = nnx.Param(jnp.ones(2))
  expected, _ = logits_of(model, once=False)
  del calls[:]
  found, _ = logits_of(model, once=True)
  assert len(calls) == 4
  np.testing.assert_array_equal(found, expected)


def test_layers_that_change_a_variable_are_called_one_by_one(monkeypatch):
  model = make(None, Config(windows=(None,) * 3))
  counter = nnx.Variable(jnp.float32(0))
  for layer in model.layers:
    layer.counter = counter
  call = Layer.__call__

  def counted(self, x, *args):
    self.counter.set_value(self.counter.get_value() + 1)
    x, cache = call(self, x, *args)
    return x * self.counter.get_value(), cache

  monkeypatch.setattr(Layer, "__call__", counted)
  expected, _ = logits_of(model, once=False)
  found, _ = logits_of(model, once=True)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("factors", [(1, True, 1.0), (0.0, -0.0, 0.0)], ids=str)
def test_attributes_that_are_equal_and_differ(factors, monkeypatch):
  model = make(None, Config(windows=(None,) * 3))
  for layer, factor in zip(model.layers, factors, strict=True):
    layer.factor = factor
  call = Layer.__call__

  def by_repr(self, x, *args):
    x, cache = call(self, x, *args)
    return x * len(repr(self.factor)), cache

  monkeypatch.setattr(Layer, "__call__", by_repr)
  expected, _ = logits_of(model, once=False)
  found, _ = logits_of(model, once=True)
  np.testing.assert_array_equal(found, expected)


def test_a_trace_belongs_to_one_run(monkeypatch):
  model = make(None, Config(windows=(None, None)))
  before, _ = logits_of(model, once=True)
  call = Layer.__call__
  monkeypatch.setattr(Layer, "__call__", lambda self, x, *args: call(self, 2 * x, *args))
  after, _ = logits_of(model, once=True)
  assert not np.allclose(before, after)
