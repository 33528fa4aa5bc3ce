"""Creates a model from an Orbax tree with Google's names."""

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
    checkpoint_path: directory of the tree, or one that contains it.
    model_class: called as `model_class(config, rngs=...)`.
    model_config: configuration of the model in the tree, except for `num_embed`: the tree decides the rows of the
      embedding. Trees of Gemma 1 and 2 have 256128, where Hugging Face's files have 256000; trees of Gemma 3 have
      262144, where those files may have 262208.
    table: weight table for the names in the tree.
    mesh: with Auto or Explicit axes; None is one device.
    dtype: of the parameters; None keeps the dtype of each tensor.

  Raises:
    CheckpointError: listing all tensors that are missing, unexpected, duplicate or have the wrong shape.
    TypeError: if `mesh` is neither a Mesh nor None, or `dtype` is no floating-point type.
  """
  checkpoint = read_orbax(as_files(checkpoint_path))
  model = abstract_model(model_class, fit_rows(model_config, checkpoint.tensors), mesh)
  plan = plan_load(checkpoint, model, table, dtype=as_dtype(dtype))
  return cast(M, load(plan))
