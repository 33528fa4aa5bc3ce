"""Weights are floating-point numbers: quantised ones and bare integers are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from models_core.config import is_mark, quantisation_problem, stated_quantisation
from models_core.dequantising import DequantisedCheckpoint
from models_core.formats import Checkpoint
from models_core.loading.abstract import AbstractParameter


def check_floats(
  checkpoint: Checkpoint,
  needed: Mapping[str, str],
  ignored: Collection[str],
  parameters: Mapping[str, AbstractParameter],
  raw: Mapping[str, Any] | None = None,
) -> tuple[tuple[str, ...], str | None]:
  """Checks that the tensors of a checkpoint are plain numbers, or are encoded as their format defines.

  Args:
    checkpoint: the headers of the checkpoint.
    needed: by the name of each tensor that could fill a parameter, or must equal one that does, the parameter.
    ignored: names of tensors that are left out.
    parameters: of the model, by name.
    raw: the checkpoint's config.json, if it has been read.

  Returns:
    The problems of quantised weights; and the note, if the configuration says so of plain ones.
  """
  if isinstance(checkpoint, DequantisedCheckpoint):
    return checkpoint.contradictions, None
  narrow: dict[str, str] = {}
  eighths: dict[str, str] = {}
  for name, info in checkpoint.tensors.items():
    if info.encoding is not None or name not in needed or not _is_float(parameters[needed[name]].dtype):
      continue
    if not _is_float(info.dtype):
      narrow[name] = info.dtype.name
    elif info.dtype.itemsize == 1:
      eighths[name] = info.dtype.name
  marks = [
    name for name in checkpoint.tensors if name not in needed and name not in ignored and is_mark(name)
  ]
  stated = stated_quantisation(checkpoint.files, raw)
  if marks or narrow:
    return (quantisation_problem(stated, marks, narrow),), None
  if stated is None:
    return (), None
  if eighths:
    return (quantisation_problem(stated, marks, eighths),), None
  if stated.scheme is not None and stated.scheme.on_floats:
    problem = (
      f"{stated}, which computes in a way of its own even with plain weights, and is not implemented: load a model that "
      "was not trained for it"
    )
    return (problem,), None
  return (), f"{stated}, but all weights are plain floating-point numbers: it is not read"


@functools.cache
def _is_float(dtype: np.dtype) -> bool:
  return bool(jnp.issubdtype(dtype, jnp.inexact))
