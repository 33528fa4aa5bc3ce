"""Score models: language models whose head gives each token scores instead of logits, for rewards and critics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from models_core.family import Family
from models_core.formats import Checkpoint
from models_core.layers import Cache, CausalLM, Head, value_of
from models_core.weights import Ignored, WeightTable

# The head's tensor in files of Hugging Face, and under the parameter's own name, also as a variable.
_TENSORS = ("score.weight", "score.w", "score.w.value")
_LM_HEAD = "lm_head"


class ScoreModel(nnx.Module):
  """A language model with a head of scores.

  It shares the arrays of the model that it is made of, but not its variables: to train one changes nothing in the
  other. A training step that donates its arrays takes them from both; `jax.tree.map(jnp.copy, nnx.state(...))` and
  `nnx.update` give one of them arrays of its own first.

  Attributes:
    model: the language model, without a head of its own.
    score: the head, with the parameter `w` [S, D].
  """

  def __init__(self, model: CausalLM, *, rngs: nnx.Rngs, num_scores: int = 1):
    """Puts a random head on a language model, on the mesh of the model.

    Args:
      model: of any family, with or without LoRA factors. It is not changed.
      rngs: source of the random key.
      num_scores: S, scores of each token; trainers expect 1.

    Raises:
      TypeError: if `model` is not a CausalLM.
    """
    if not isinstance(model, CausalLM):
      raise TypeError(f"model is {type(model).__name__}, expected a models_core.layers.CausalLM")
    self.model = nnx.clone(model)
    if hasattr(self.model, _LM_HEAD):
      # No score depends on it, but optimisers would keep their moments for it.
      delattr(self.model, _LM_HEAD)
    # Replicated: it is hardly larger than a norm.
    self.score = Head(num_scores, model.config.embed_dim, PartitionSpec(None, None), rngs=rngs)
    _put_beside(self.score.w, value_of(model.embedder.input_embedding))

  @property
  def config(self) -> Any:
    """Configuration of the language model."""
    return self.model.config

  def __call__(
    self,
    tokens: ArrayLike,
    positions: ArrayLike | None = None,
    cache: Cache | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Computes the scores of each token, from this token and those before it.

    Args:
      tokens: int [B, T].
      positions: int [B, T], position of each token in its sequence; negative for padding. None as for the language
        model.
      cache: from `init_cache`; its next T slots take the keys and values of these tokens.
      attention_mask: bool [B, T or 1, S], True where a query sees a key; None is causal attention.
      segment_ids: int [B, T], number of the packed sequence that each token belongs to. Only without a cache.

    Returns:
      float32 scores [B, T, S] and the cache with T more slots in use, or None without a cache.

    Raises:
      CacheError, TypeError, ValueError: as the language model raises them.
    """
    hidden, cache = self.model(
      tokens, positions, cache, attention_mask, segment_ids=segment_ids, skip_lm_head=True
    )
    return self.score(hidden), cache

  def init_cache(self, batch_size: int, cache_size: int, dtype: Any = None, *, ring: bool = False) -> Cache:
    """Makes an empty KV cache, as the language model does."""
    return self.model.init_cache(batch_size, cache_size, dtype, ring=ring)

  def get_model_input(self) -> dict[str, Any]:
    """Arguments of a minimal call, for tools that trace a model."""
    return self.model.get_model_input()


def _put_beside(parameter: nnx.Param, weight: jax.Array) -> None:
  """Replicates a parameter over the devices of a weight; not while they are traced or have no values."""
  value = parameter.get_value()
  if any(isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)) for array in (value, weight)):
    return
  sharding: jax.sharding.Sharding = weight.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(None, None))
  values = np.asarray(value)
  parameter.set_value(jax.make_array_from_callback(values.shape, sharding, values.__getitem__))


def score_family(family: Family, num_scores: int = 1) -> Family:
  """The family of the score models of a family, for functions that load, save or merge.

  Its files are those of transformers' classes for sequence classification: the language model without a head, and
  `score.weight` [S, D].

  Args:
    family: of the language model.
    num_scores: S, scores of each token.
  """

  def make(config: Any, *, rngs: nnx.Rngs) -> ScoreModel:
    return ScoreModel(family.model_class(config, rngs=rngs), rngs=rngs, num_scores=num_scores)

  def read_config(raw: Mapping[str, Any]) -> Any:
    return family.read_config({key: value for key, value in raw.items() if key != "num_labels"})

  def write_config(config: Any) -> dict[str, Any]:
    own = family.write_config(config)
    names = [
      name.replace("ForCausalLM", "ForSequenceClassification") for name in own.get("architectures", ())
    ]
    return own | {"architectures": names, "num_labels": num_scores}

  return dataclasses.replace(
    family,
    model_class=cast(Any, make),
    read_config=read_config,
    write_config=write_config,
    weights={"huggingface": _with_score(family.huggingface)},
  )


def _with_score(table: WeightTable) -> WeightTable:
  """The weight table of a score model. A head of logits is ignored, wherever a checkpoint holds one."""
  rows = [dataclasses.replace(row, ours=f"model.{row.ours}") for row in table.rows]
  heads = {form.name for row in table.rows if row.ours.startswith(f"{_LM_HEAD}.") for form in row.forms}
  heads |= {tie.tensor for tie in table.tied}
  return WeightTable(
    *rows,
    ("score.w", "score.weight", "v d"),
    ignored=[
      *table.ignored,
      *(Ignored(name, "a score model has no head of logits", repeated=False) for name in sorted(heads)),
    ],
  )


def family_of(family: Family, checkpoint: Checkpoint) -> Family:
  """The family that reads a checkpoint: the given one, or its score family if the checkpoint holds a score head."""
  for name in _TENSORS:
    if (info := checkpoint.tensors.get(name)) is not None and len(info.shape) == 2:
      return score_family(family, info.shape[0])
  return family
