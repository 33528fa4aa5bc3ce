"""Compiles functions of a model before the model has values, so that compiling and reading take place at the same time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from models_core.loading.abstract import AbstractModel
from models_core.loading.planned import PlannedParameter


class Compiling:
  """A function of a model and other arguments, which a thread compiles. Call it as the function.

  Args:
    function: called as `function(model, *args)`; one that is jitted keeps its options, such as donated arguments.
    args: the model with a `jax.ShapeDtypeStruct` for each array, then the other arguments, as arrays or as
      `jax.ShapeDtypeStruct`.
  """

  def __init__(self, function: Callable[..., Any], *args: Any):
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    thread = concurrent.futures.ThreadPoolExecutor(1, "compile")
    self._compiled = thread.submit(lambda: jitted.lower(*args).compile())
    thread.shutdown(wait=False)

  def __call__(self, *args: Any) -> Any:
    """Calls the compiled function, once it is compiled.

    Args:
      *args: the model and the other arguments, in the shapes, dtypes and shardings that were compiled for.

    Raises:
      TypeError, ValueError: as JAX raises them, if an argument differs from what was compiled for.
      Exception: whatever the function raised while it was traced.
    """
    return self.result()(*args)

  def result(self) -> jax.stages.Compiled:
    """The compiled function itself, once it is compiled."""
    return self._compiled.result()


def with_shapes(model: AbstractModel, parameters: Sequence[PlannedParameter]) -> nnx.Module:
  """The model as it will be loaded, with a `jax.ShapeDtypeStruct` in the place of each array."""
  return model.fill(
    {
      planned.parameter.name: jax.ShapeDtypeStruct(
        planned.parameter.shape, planned.dtype, sharding=planned.parameter.sharding
      )
      for planned in parameters
    }
  )
