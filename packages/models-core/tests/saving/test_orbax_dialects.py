"""Orbax trees in other naming schemes than the format's own: arrays of all layers, wrapped names, and their bases."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models_core.errors import ConfigError
from models_core.family import Family
from models_core.formats.orbax import ORBAX
from models_core.saving import orbax_writer
from models_core.saving.base import Base
from models_core.saving.orbax_saver import save_parameters_to_orbax
from models_core.weights.table import Form, Ignored, WeightTable

from ..toys import made_of

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS, D, F, N, H = 3, 6, 10, 4, 2


@dataclasses.dataclass(frozen=True)
class Config:
  num_layers: int = LAYERS
  num_heads: int = N
  head_dim: int = H


FAMILY = Family(
  name="tiny",
  model_types=("tiny",),
  model_class=lambda config, *, rngs: made_of(PARAMETERS)(config, rngs=rngs),
  config_class=Config,
  read_config=lambda raw: Config(),
  write_config=lambda config: {"model_type": "tiny"},
  weights={
    "huggingface": WeightTable(),
    "maxtext": WeightTable(
      ("layers.{i}.up", [Form("all.up", "d i/l f -> f d"), Form("one_{i}.up", "d f -> f d")]),
      ("layers.{i}.q", [Form("all.q", "d i/l n h -> (n h) d"), Form("one_{i}.q", "d n h -> (n h) d")]),
      ("norm", "norm", "d"),
      ignored=[Ignored("tower.**", "no part of the model")],
    ),
  },
)


def random(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(BF16)


PARAMETERS = {"norm": random(D)}
for number in range(LAYERS):
  PARAMETERS |= {f"layers.{number}.up": random(F, D) + BF16.type(number)}
  PARAMETERS |= {f"layers.{number}.q": random(N * H, D) + BF16.type(number)}
STACKED = {
  "all.up": np.stack([PARAMETERS[f"layers.{i}.up"].T for i in range(LAYERS)], axis=1),
  "all.q": np.stack([PARAMETERS[f"layers.{i}.q"].T.reshape(D, N, H) for i in range(LAYERS)], axis=1),
  "norm": PARAMETERS["norm"],
}


def save(directory, **options):
  save_parameters_to_orbax(
    PARAMETERS, PARAMETERS.__getitem__, directory, family=FAMILY, config=Config(), **options
  )


def restored(directory):
  """By Orbax, as a flat dictionary."""
  flat, _ = jax.tree.flatten_with_path(ocp.StandardCheckpointer().restore(directory))
  return {".".join(key.key for key in path): leaf for path, leaf in flat}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert np.asarray(found[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("cell", [orbax_writer.CELL, 64])
def test_arrays_of_all_layers(tmp_path, monkeypatch, cell):
  monkeypatch.setattr(orbax_writer, "CELL", cell)
  save(tmp_path / "tree", naming="maxtext")
  assert_same(restored(tmp_path / "tree"), STACKED)


def test_names_that_are_wrapped(tmp_path):
  save(tmp_path / "tree", naming="maxtext", wrapping="params.params.")
  assert_same(restored(tmp_path / "tree"), {f"params.params.{name}": a for name, a in STACKED.items()})


def base_of(directory, arrays):
  tree = {}
  for name, array in arrays.items():
    place, (*path, leaf) = tree, name.split(".")
    for key in path:
      place = place.setdefault(key, {})
    place[leaf] = array
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory, tree)
  return Base.of(directory, ORBAX)


def test_a_base_in_the_same_naming_scheme_decides_the_forms_and_is_copied(tmp_path):
  single = {
    f"one_{i}.{name}": STACKED[f"all.{name}"][:, i] for i in range(LAYERS) for name in ("up", "q")
  } | {"norm": STACKED["norm"], "tower.w": random(5)}
  wrapped = {f"params.params.{name}": array for name, array in single.items()}
  save(
    tmp_path / "tree", naming="maxtext", wrapping="params.params.", base=base_of(tmp_path / "base", wrapped)
  )
  assert_same(restored(tmp_path / "tree"), wrapped)


def test_a_base_in_another_naming_scheme_decides_nothing(tmp_path):
  base = base_of(tmp_path / "base", PARAMETERS)
  save(tmp_path / "tree", naming="maxtext", base=base)
  assert_same(restored(tmp_path / "tree"), STACKED)


def test_a_naming_scheme_that_the_family_does_not_have(tmp_path):
  with pytest.raises(
    ConfigError, match="no weight table for the naming scheme 'tunix', only for huggingface, maxtext"
  ):
    save(tmp_path / "tree", naming="tunix")
  assert not (tmp_path / "tree").exists()
