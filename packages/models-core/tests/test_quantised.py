import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models_core.layers.linear import Embedder
from models_core.quantised import NF4, Quantised


@dataclasses.dataclass
class Library:
  """What a library may hold a quantised array in."""

  qvalue: Any
  scale: Any
  zero_point: Any = None
  qtype: Any = "int8"


Q = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)


@pytest.mark.parametrize("tiles", [(6, 1), (1, 1), (3, 2), (6, 4)])
@pytest.mark.parametrize("zero", [False, True])
def test_numbers_and_rows_are_those_of_their_tiles(tiles, zero):
  rng = np.random.default_rng(0)
  scale = rng.normal(size=tiles).astype(np.float32)
  zero_point = rng.integers(-3, 3, tiles).astype(np.int8) if zero else None
  spread = lambda x: np.repeat(np.repeat(x, 6 // tiles[0], 0), 4 // tiles[1], 1).astype(np.float32)
  expected = (Q - (spread(zero_point) if zero else 0)) * spread(scale)
  array = Quantised.of(
    Library(jnp.asarray(Q), jnp.asarray(scale), None if zero_point is None else jnp.asarray(zero_point))
  )
  np.testing.assert_allclose(array.numbers(jnp.float32), expected, rtol=1e-6)
  rows = np.asarray(array.rows(jnp.array([5, 0, 0, 6, -1])).numbers(jnp.float32))
  np.testing.assert_allclose(rows[:3], expected[[5, 0, 0]], rtol=1e-6)
  assert np.isnan(rows[3:]).all()


def test_codes_of_normal_floats():
  array = Quantised.of(Library(jnp.arange(16, dtype=jnp.uint8)[None], jnp.full((1, 1), 2.0), qtype="nf4"))
  np.testing.assert_array_equal(array.numbers(jnp.float32), 2 * np.array(NF4, np.float32)[None])


def test_a_plain_array_is_not_quantised():
  assert Quantised.of(jnp.ones(3)) is None


def test_an_embedding_that_a_library_quantised_is_looked_up():
  embedder = Embedder.__new__(Embedder)

  class Holder:
    dtype = jnp.dtype("bfloat16")
    array = Library(jnp.asarray(Q), jnp.full((6, 1), 0.5))

    def __getitem__(self, index):
      return self

  object.__setattr__(embedder, "input_embedding", Holder())
  out = embedder.encode(jnp.array([[1, 4]]))
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), Q[[[1, 4]]] * 0.5)
