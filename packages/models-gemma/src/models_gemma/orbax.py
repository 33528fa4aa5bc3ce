"""A model from an Orbax tree with Google's names."""

from __future__ import annotations

import os
from typing import Any, TypeVar, cast

from flax import nnx
from jax.sharding import Mesh

from models_core.dtypes import as_dtype
from models_core.formats import as_files, read_orbax
from models_core.loading import abstract_model, load, plan_load
from models_core.weights import WeightTable
from models_gemma.orbax_rows import fit_rows

M = TypeVar("M", bound=nnx.Module)


def create_model_from_orbax(
  checkpoint_path: str | os.PathLike,
  model_class: type[M],
  model_config: Any,
  table: WeightTable,
  mesh: Mesh | None = None,
  dtype: Any = None,
) -> M:
  """Creates a model and loads an Orbax tree into it.

  Args:
    checkpoint_path: its directory, or one that holds it.
    model_class: called as `model_class(config, rngs=...)`.
    model_config: of the model that the tree holds. The rows of the embedding are the tree's: 256128 for Gemma 1 and 2,
      where Hugging Face's files have 256000; 262144 for Gemma 3, where they have 262208.
    table: of the names in the tree.
    mesh: of either kind; None is one device.
    dtype: of the parameters; None keeps each as it is stored.

  Raises:
    CheckpointError: with all that is missing, unexpected, doubled or mis-shaped.
    TypeError: if `mesh` is neither a Mesh nor None, or `dtype` is no floating-point type.
  """
  checkpoint = read_orbax(as_files(checkpoint_path))
  model = abstract_model(model_class, fit_rows(model_config, checkpoint.tensors), mesh)
  plan = plan_load(checkpoint, model, table, dtype=as_dtype(dtype))
  return cast(M, load(plan))
