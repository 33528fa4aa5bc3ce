"""Changes the number of rows of a model's embedding and head, and the configuration with it.

A new row is the mean of all rows, so that its logit is the mean of the other logits: no more than the largest, whatever
the hidden state. Greedy decoding and `top_k` therefore never choose a token that is padding only, before or after a
soft cap. Its probability is not zero, though: to sample, cut the logits, `logits[..., :len(tokenizer)]`. Rows of zeros
would have a logit of 0, which is the largest if all others are negative.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from models_core.config import VOCABULARY_FIELDS, field_of
from models_core.errors import ModelsError
from models_core.layers import CausalLM, on_auto_axes, value_of
from models_core.quantised import Quantised
from models_core.sharding import axis_names, fit


def resize_vocabulary(model: nnx.Module, vocab_size: int) -> None:
  """Sets the number of rows of the embedding, and of the head if the model has one of its own.

  The first rows stay bit by bit; new ones are the mean of all rows, in float32 and rounded once. Each parameter keeps
  the sharding that its declaration has on the mesh: an axis that had to be replicated is sharded if the new number
  divides. The model is changed in place, and its configuration replaced. Make optimisers, and compile, afterwards. Under
  several processes all must call this, outside of transformations.

  Args:
    model: a language model of any family, or a score model of one.
    vocab_size: rows after the call; fewer than now drops the last ones.

  Raises:
    ModelsError: if the model is of another kind, or a parameter to change is quantised or has LoRA factors.
    ValueError: if `vocab_size` is not a positive whole number.
  """
  lm = _language_model(model)
  if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)) or vocab_size < 1:
    raise ValueError(f"vocab_size is {vocab_size!r}, expected a positive whole number")
  rows = int(vocab_size)
  field, old = field_of(lm.config, VOCABULARY_FIELDS), lm.config
  if field is None:
    raise ModelsError(
      f"{type(lm.config).__name__} has none of the fields {', '.join(VOCABULARY_FIELDS)}: its vocabulary cannot change"
    )
  new = dataclasses.replace(old, **{field: rows})
  # All or nothing: arrays are made before the first variable changes.
  resized = [(variable, _resized(variable, rows)) for variable in _variables(lm)]
  # They are computed in the background, where memory may run out.
  jax.block_until_ready([value for _, value in resized])
  for variable, value in resized:
    variable.set_value(value)
  for _, part in nnx.iter_graph(model):
    if isinstance(part, nnx.Module) and getattr(part, "config", None) == old:
      part.config = new  # type: ignore[attr-defined]


def pad_vocabulary(model: nnx.Module, multiple_of: int | None = None) -> None:
  """Adds rows until the mesh can shard the vocabulary, by `resize_vocabulary`.

  `resize_vocabulary(model, n)` with the former number n takes the padding away again, for example before saving.

  Args:
    model: a language model of any family, or a score model of one.
    multiple_of: what the number of rows shall be a multiple of; None is the number of parts into which the model's
      ShardingConfig divides the vocabulary on its mesh.

  Raises:
    ModelsError, ValueError: as `resize_vocabulary` raises them.
  """
  lm = _language_model(model)
  if multiple_of is None:
    multiple_of = _parts(lm)
  if isinstance(multiple_of, bool) or not isinstance(multiple_of, (int, np.integer)) or multiple_of < 1:
    raise ValueError(f"multiple_of is {multiple_of!r}, expected a positive whole number")
  resize_vocabulary(model, -(-lm.num_embed // int(multiple_of)) * int(multiple_of))


def _language_model(model: Any) -> CausalLM:
  """The language model itself, or that of a score model."""
  lm = model if isinstance(model, CausalLM) else getattr(model, "model", None)
  if not isinstance(lm, CausalLM):
    raise ModelsError(f"{type(model).__name__} is no models_core.layers.CausalLM, and has none as `model`")
  return lm


def _variables(lm: CausalLM) -> Iterator[nnx.Param]:
  """The variables with an axis of the vocabulary, which is their first one."""
  for module, name in ((lm.embedder, "input_embedding"), (getattr(lm, "lm_head", None), "w")):
    if module is None:
      continue
    variable = getattr(module, name)
    if Quantised.of(value_of(variable)) is not None:
      raise ModelsError(f"{name} is quantised: change the vocabulary before the model is quantised")
    if hasattr(module, f"{name}_lora_a"):
      raise ModelsError(
        f"{name} has LoRA factors: merge them first, with models_core.adapters.merge_lora, or add them afterwards"
      )
    yield variable


def _resized(variable: nnx.Param, rows: int) -> jax.Array:
  """The value of a variable with another number of rows."""
  value = variable.get_value()
  sharding = _sharding(variable, (rows, *value.shape[1:]))

  def run(w: jax.Array) -> jax.Array:
    if rows <= w.shape[0]:
      return w[:rows]
    mean = jnp.mean(w, axis=0, keepdims=True, dtype=jnp.float32).astype(w.dtype)
    return jnp.concatenate([w, jnp.broadcast_to(mean, (rows - w.shape[0], *w.shape[1:]))])

  return jax.jit(on_auto_axes(run, sharding), out_shardings=sharding)(value)


def _sharding(variable: nnx.Param, shape: tuple[int, ...]) -> Sharding:
  """The sharding of a variable with a new shape: its declared one, unless it was given another."""
  value = variable.get_value()
  if not isinstance(own := value.sharding, NamedSharding):
    return own
  mesh, declared = own.mesh, PartitionSpec(*(variable.get_metadata().get("out_sharding") or ()))
  usual = NamedSharding(mesh, fit(value.shape, declared, mesh)[0])
  spec = declared if own.is_equivalent_to(usual, value.ndim) else own.spec
  return NamedSharding(mesh, fit(shape, spec, mesh)[0])


def _parts(lm: CausalLM) -> int:
  """Into how many parts the ShardingConfig divides the vocabulary on the model's mesh."""
  sharding = value_of(lm.embedder.input_embedding).sharding
  if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
    return 1
  shd, sizes = lm.config.shd_config, dict(sharding.mesh.shape)
  fields = ("emb_vd", "lm_head_vd", *(["act_btv"] if shd.act_btv is not None else []))
  ways = (math.prod(sizes.get(name, 1) for name in axis_names(shd.spec(f, "v")[0])) for f in fields)
  return math.lcm(*ways)
