import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models_core.formats import bounds_of


@pytest.mark.parametrize(
  ("index", "shape", "bounds"),
  [
    ((), (), ()),
    ((slice(None),), (5,), ((0, 5),)),
    ((slice(1, 3), slice(None), slice(2, None)), (4, 5, 6), ((1, 3), (0, 5), (2, 6))),
    ((slice(0, 9),), (5,), ((0, 5),)),
  ],
)
def test_bounds_of_an_index(index, shape, bounds):
  assert bounds_of(index, shape) == bounds


def test_bounds_of_shards_tell_copies_from_parts():
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
  indices = NamedSharding(mesh, P("x")).devices_indices_map((6, 3)).values()
  assert {bounds_of(index, (6, 3)) for index in indices} == {((0, 3), (0, 3)), ((3, 6), (0, 3))}


def test_an_index_has_a_slice_for_each_axis():
  with pytest.raises(ValueError, match="longer"):
    bounds_of((slice(None),), (2, 3))
