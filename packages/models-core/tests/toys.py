"""Models of whatever parameters a test has."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def made_of(parameters):
  """A class whose models have parameters of the same names and shapes, whatever the configuration is."""

  def make(config, *, rngs):
    tree = {}
    for name, array in parameters.items():
      *parts, leaf = name.split(".")
      node = tree
      for part in parts:
        node = node.setdefault(part, {})
      node[leaf] = nnx.Param(jnp.zeros(np.shape(array)))
    return _module(tree)

  return make


def _module(tree):
  return nnx.Dict({key: _module(value) if isinstance(value, dict) else value for key, value in tree.items()})
