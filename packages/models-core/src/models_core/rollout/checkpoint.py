"""The weights of a model as named arrays of Hugging Face's naming scheme, and back, without leaving the devices."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from models_core.casting import cast_into, holds
from models_core.config import TYING_FIELDS, field_of
from models_core.dtypes import float_dtypes
from models_core.errors import CheckpointError, ModelsError
from models_core.family import Family
from models_core.formats import aligned_empty
from models_core.layers import dotted
from models_core.loading import match_tensors, shorten
from models_core.rollout.moves import Move, finished, put, same_bits, take, tensor_sharding
from models_core.rollout.parameters import parameters_of, quantised_owner
from models_core.saving import Shaped, plan_save
from models_core.weights import Piece, Tied, letter_sizes

# Where the arrays come from, in errors.
_WHERE = "the given arrays"


class LazyCheckpoint(Mapping[str, jax.Array]):
  """The tensors of a model's checkpoint by name, each of which is made on the devices when it is asked for.

  It holds the parameters that the model had when this was made; make a new one after each step of a training. A tensor
  that is element by element a parameter is the model's own array: a step that donates it deletes it here, too.

  Args:
    model: a model of the family, on any mesh. LoRA factors are merged and quantised parameters are dequantised, each
      computed in float32 and rounded once.
    family: family of the model.
    alpha: the alpha of the training that made the model's LoRA factors; None if it has none.
    rank: the rank that the factors must have; None accepts any.

  Raises:
    AdapterError: if the model has LoRA factors and `alpha` is not given, or the other way round, or they do not fit.
    ModelsError: if a parameter does not hold an array.
    TypeError: if the model is not of the family.
  """

  def __init__(
    self, model: nnx.Module, family: Family, *, alpha: float | None = None, rank: int | None = None
  ):
    table = family.huggingface
    self._parameters = parameters_of(model, table, alpha=alpha, rank=rank)
    planned = plan_save(self._parameters, table, config=getattr(model, "config", None))
    self._tensors = {tensor.name: tensor for tensor in planned}
    # Parameters of the last tensor: the experts of one are asked for one after the other.
    self._held: dict[str, jax.Array] = {}

  def __len__(self) -> int:
    return len(self._tensors)

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def __getitem__(self, name: str) -> jax.Array:
    parts = self._tensors[name].parts
    needed = [parameter for parameter, _ in parts]
    self._held = {parameter: self._held[parameter] for parameter in needed if parameter in self._held}
    for parameter in needed:
      if parameter not in self._held:
        self._held[parameter] = self._parameters[parameter].get()
    return _settled(take([(self._held[parameter], piece) for parameter, piece in parts]))

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of all tensors by name, for which no tensor is made."""
    return {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in self._tensors.items()}


def iter_checkpoint(
  model: nnx.Module, family: Family, *, alpha: float | None = None, rank: int | None = None
) -> Iterator[tuple[str, jax.Array]]:
  """Yields the tensors of a model's checkpoint one by one, as `to_checkpoint` returns them.

  If the caller keeps none of them, no more than one is in memory beside the model; of merged or dequantised experts,
  the parameter that holds them, too.
  """
  checkpoint = LazyCheckpoint(model, family, alpha=alpha, rank=rank)
  return ((name, checkpoint[name]) for name in checkpoint)


def to_checkpoint(
  model: nnx.Module, family: Family, *, alpha: float | None = None, rank: int | None = None
) -> dict[str, jax.Array]:
  """The tensors of a model's checkpoint: the names, shapes and bits that saving the model without a base writes.

  Nothing passes through the host. A tensor is sharded as the axes of the parameters that it comes from; one that is
  element by element a parameter is the model's own array. Arguments and errors are those of `LazyCheckpoint`.
  """
  return dict(iter_checkpoint(model, family, alpha=alpha, rank=rank))


def from_checkpoint(
  model: nnx.Module, family: Family, arrays: Mapping[str, Any] | Iterable[tuple[str, Any]]
) -> None:
  """Sets the parameters of a model to the arrays of a checkpoint, cast to the dtype and sharding that the model has.

  All problems are found before anything changes. Then one parameter after the other is set, so that beside the model
  and the given arrays there is only one parameter in memory, and an array that comes from other devices or the host.
  On CPUs a parameter of several arrays is in memory twice.
  The model shares no memory with the arrays.

  Args:
    model: a model of the family. LoRA factors, if any, stay as they are.
    family: family of the model.
    arrays: arrays of JAX or NumPy by Hugging Face's names, in any form that a file may have. Of a mapping, such as a
      `LazyCheckpoint`, each array is asked for when it is needed. Pairs of a name and an array are collected first:
      only after the last one is known what is missing.

  Raises:
    CheckpointError: with all arrays that are missing, unexpected, duplicate or mis-shaped, are not numbers of the
      parameter's kind, do not fit into its dtype, or are a tied head and differ from the embedding.
    TypeError: if the model is not of the family.
  """
  problems: list[str] = []
  if not isinstance(arrays, Mapping):
    pairs = list(arrays)
    counts = collections.Counter(name for name, _ in pairs)
    problems += [f"{name} occurs {n} times: give each name once" for name, n in counts.items() if n > 1]
    arrays = dict(pairs)
  variables = _variables(model)
  parameters = {name: _like(name, variable) for name, variable in variables.items()}
  given = _shapes_of(arrays)
  found = match_tensors(
    {name: tuple(one.shape) for name, one in given.items()},
    {name: one.shape for name, one in parameters.items()},
    family.huggingface,
    letter_sizes(config := getattr(model, "config", None)),
    config=config,
  )
  if problems := [*problems, *found.problems]:
    raise CheckpointError(_WHERE, shorten(problems))
  if problems := [
    *_misfits(arrays, given, found.pieces, parameters),
    *_untied(arrays, found.ties, found.pieces, parameters, config),
  ]:
    raise CheckpointError(_WHERE, shorten(problems))
  for name, pieces in found.pieces.items():
    variables[name].set_value(_assembled(arrays, pieces, parameters[name]))


def _variables(model: nnx.Module) -> dict[str, nnx.Param]:
  """The model's own variables by name, without LoRA factors."""
  found = {}
  for path, variable in nnx.iter_graph(model):
    if isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam):
      if (owner := quantised_owner(path)) is not None:
        raise ModelsError(
          f"{dotted(owner)} is quantised: set the weights of the model that was quantised, and quantise it again"
        )
      found[dotted(path)] = variable
  return found


def _like(name: str, variable: nnx.Param) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding of a parameter."""
  value = variable.get_value()
  if not isinstance(value, jax.Array):
    raise ModelsError(
      f"{name} is a {type(value).__name__}, expected a jax.Array: load or initialise the weights first"
    )
  return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)


def _shapes_of(arrays: Mapping[str, Any]) -> Mapping[str, Shaped]:
  """Shapes and dtypes of arrays by name; those of a `LazyCheckpoint` are not made for it.

  Raises:
    TypeError: if a value is not an array.
  """
  if isinstance(arrays, LazyCheckpoint):
    return arrays.shapes
  for name, array in arrays.items():
    if not isinstance(array, (jax.Array, np.ndarray)):
      raise TypeError(f"{name} is a {type(array).__name__}, expected an array of JAX or NumPy")
  return arrays


def _misfits(
  arrays: Mapping[str, Any],
  shapes: Mapping[str, Shaped],
  pieces: Mapping[str, Sequence[Piece]],
  parameters: Mapping[str, jax.ShapeDtypeStruct],
) -> list[str]:
  """One sentence for each array whose numbers the parameter that it fills cannot hold."""
  problems: list[str] = []
  lost: dict[str, tuple[np.dtype, Any]] = {}
  for name, piece in ((name, piece) for name, own in pieces.items() for piece in own):
    dtype, target = np.dtype(shapes[piece.tensor].dtype), np.dtype(parameters[name].dtype)
    floating = [jnp.issubdtype(kind, jnp.floating) for kind in (dtype, target)]
    if floating[0] != floating[1] or (dtype != target and not any(floating)):
      problems.append(
        f"{piece.tensor} has the dtype {dtype}, but the parameter {name} has {target}: give it numbers of the same kind"
      )
    elif piece.tensor not in lost and not holds(target, dtype):
      lost[piece.tensor] = (target, _largest_lost(arrays[piece.tensor], target))
  # Only now wait for the devices.
  numbers = ((tensor, target, np.asarray(number).item()) for tensor, (target, number) in lost.items())
  problems += [
    f"{tensor}: {number} does not fit into {target}, the dtype of its parameter"
    for tensor, target, number in numbers
    if number
  ]
  return problems


def _largest_lost(array: Any, dtype: np.dtype) -> Any:
  """The largest magnitude of the finite numbers that are infinite in a dtype; 0 if there are none."""
  if isinstance(array, jax.Array):
    return _lost(dtype)(array)
  with np.errstate(over="ignore", invalid="ignore"):
    return max(np.abs(array[np.isfinite(array) & ~np.isfinite(array.astype(dtype))]), default=0)


@functools.cache
def _lost(dtype: np.dtype) -> Callable[[jax.Array], jax.Array]:
  def largest(array: jax.Array) -> jax.Array:
    is_lost = jnp.isfinite(array) & ~jnp.isfinite(array.astype(dtype))
    return jnp.max(jnp.where(is_lost, jnp.abs(array), jnp.zeros_like(array)), initial=0)

  return jax.jit(largest)


def _untied(
  arrays: Mapping[str, Any],
  ties: Sequence[Tied],
  pieces: Mapping[str, Sequence[Piece]],
  parameters: Mapping[str, jax.ShapeDtypeStruct],
  config: Any,
) -> list[str]:
  """One sentence for each tied head that differs from the embedding."""
  owners = {piece.tensor: name for name, own in pieces.items() for piece in own}
  field = field_of(config, TYING_FIELDS)
  problems = []
  for tie in ties:
    head, twin = arrays[tie.tensor], arrays[tie.twin]
    same = tuple(head.shape) == tuple(twin.shape)
    if same:
      like = parameters[owners[tie.twin]]
      # Rounded to any of these they must be the same numbers, as in files.
      kinds = float_dtypes(head.dtype, twin.dtype, like.dtype)
      placed = _placed(head, like.sharding), _placed(twin, like.sharding)
      same = any(bool(same_bits(*(one.astype(kind) for one in placed))) for kind in kinds)
    if not same:
      problems.append(
        f"{tie.tensor} differs from {tie.twin}, but the configuration ties the head to the embedding: "
        f"{'' if field is None else f'make the model with {field}=False to set both, or '}leave {tie.tensor} out"
      )
  return problems


def _assembled(arrays: Mapping[str, Any], pieces: Sequence[Piece], like: jax.ShapeDtypeStruct) -> jax.Array:
  """A parameter made of the arrays that fill it. It shares no memory with them."""
  parameter: jax.Array | None = None
  for piece in pieces:
    parameter = _with_part(parameter, arrays[piece.tensor], piece, like)
  assert parameter is not None
  return finished(parameter, like)


def _with_part(
  parameter: jax.Array | None, array: Any, piece: Piece, like: jax.ShapeDtypeStruct
) -> jax.Array:
  """A parameter into which one array is written."""
  if (on_host := isinstance(array, np.ndarray)) and piece.conversion is None:
    cast = aligned_empty(array.shape, np.dtype(like.dtype))
    cast_into(cast, array)
    array = cast
  placed = _placed(array, tensor_sharding(Move.of(piece, like.shape), like.sharding))
  parameter = put(parameter, placed, piece, like)
  # Devices may still be reading the host's memory, which is the caller's again when this returns.
  return parameter.block_until_ready() if on_host else _settled(parameter)


def _settled(array: jax.Array) -> jax.Array:
  """The array, on CPUs once it is there.

  Devices that a CPU simulates wait for one another in threads of one pool. If many programs are under way, they fill it
  and wait forever.
  """
  return array.block_until_ready() if next(iter(array.devices())).platform == "cpu" else array


def _placed(array: Any, sharding: Sharding) -> jax.Array:
  """An array with a sharding; it may share memory with the given one."""
  if isinstance(array, jax.Array) or sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  # Over several processes `device_put` would compare their values.
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
