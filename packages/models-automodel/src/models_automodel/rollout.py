"""Weights of a model as named arrays, and back, for trainers that hand them to samplers. The model names its family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from models_automodel.families import family_of_config
from models_core import rollout
from models_core.errors import ModelsError
from models_core.family import Family
from models_core.rollout import LazyCheckpoint

__all__ = ["from_checkpoint", "iter_checkpoint", "lazy_checkpoint", "to_checkpoint"]


def to_checkpoint(
  model: nnx.Module, *, alpha: float | None = None, rank: int | None = None
) -> dict[str, jax.Array]:
  """The tensors of a model's checkpoint under Hugging Face's names, as arrays on the devices of the model.

  Names, shapes and bits are those that `AutoModel.save_pretrained` writes without a base. Nothing passes through the
  host. A tensor that is element by element a parameter is the model's own array, which a training step that donates it
  deletes.

  Args:
    model: a model of an installed family, on any mesh. LoRA factors are merged and parameters that qwix quantised are
      dequantised, each computed in float32 and rounded once.
    alpha: the alpha of the training that made the model's LoRA factors; None if it has none.
    rank: the rank that the factors must have; None accepts any.

  Raises:
    AdapterError: if the model has LoRA factors and `alpha` is not given, or the other way round, or they do not fit.
    ModelsError: if the model belongs to no installed family, or a parameter holds no array.
  """
  return rollout.to_checkpoint(model, _family_of(model), alpha=alpha, rank=rank)


def iter_checkpoint(
  model: nnx.Module, *, alpha: float | None = None, rank: int | None = None
) -> Iterator[tuple[str, jax.Array]]:
  """Yields the items of `to_checkpoint` one by one; the caller decides how many are in memory beside the model."""
  return rollout.iter_checkpoint(model, _family_of(model), alpha=alpha, rank=rank)


def lazy_checkpoint(
  model: nnx.Module, *, alpha: float | None = None, rank: int | None = None
) -> LazyCheckpoint:
  """The mapping of `to_checkpoint`, whose arrays are made when they are asked for."""
  return LazyCheckpoint(model, _family_of(model), alpha=alpha, rank=rank)


def from_checkpoint(model: nnx.Module, arrays: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
  """Sets the parameters of a model to arrays under Hugging Face's names, in the dtype and sharding that it has.

  Args:
    model: a model of an installed family, on any mesh. It is unchanged if this raises.
    arrays: arrays of JAX or NumPy, in any form that a file may have, such as `lazy_checkpoint` or `to_checkpoint`
      return. Pairs of a name and an array are collected first.

  Raises:
    CheckpointError: with all arrays that are missing, unexpected, duplicate or mis-shaped, or whose numbers do not fit.
    ModelsError: if the model belongs to no installed family, or a parameter holds no array.
  """
  rollout.from_checkpoint(model, _family_of(model), arrays)


def _family_of(model: nnx.Module) -> Family:
  if (config := getattr(model, "config", None)) is None:
    raise ModelsError(
      f"{type(model).__name__} has no attribute config: give a model of an installed family, or call "
      "models_core.rollout with its family"
    )
  return family_of_config(config, type(model).__name__)
