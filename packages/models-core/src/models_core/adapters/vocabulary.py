"""The configuration of a model whose vocabulary an adapter resizes, or whose head it takes apart from the embedding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from models_core.adapters.lora import Adapter
from models_core.config import TYING_FIELDS, VOCABULARY_FIELDS, field_of
from models_core.errors import AdapterError
from models_core.family import Family
from models_core.loading import abstract_model
from models_core.weights import WeightTable

# Names of modules in transformers.
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"


def merged_config(config: Any, adapter: Adapter, family: Family) -> Any:
  """The configuration of a model after an adapter was merged into it.

  Args:
    config: of the model before.
    adapter: the adapter.
    family: family of the model.

  Raises:
    AdapterError: if the adapter takes the head apart from the embedding, and the family's models cannot have two.
  """
  if adapter.vocab_size is not None:
    config = resized(config, adapter.vocab_size)
  if not adapter.unties:
    return config
  if (untied := untied_config(config)) is None:
    raise AdapterError(
      f"the adapter changes the embedding or the head alone, and {family.name} models have one matrix for both: merge "
      "it with peft into a model that was loaded with tie_word_embeddings=False"
    )
  return untied


def resized(config: Any, size: int) -> Any:
  """A configuration with another size of the vocabulary.

  Raises:
    AdapterError: if the configuration has no such field.
  """
  field = field_of(config, VOCABULARY_FIELDS)
  if field is None:
    raise AdapterError(
      f"the adapter changes the size of the vocabulary to {size}, but {type(config).__name__} has no field for it"
    )
  return dataclasses.replace(config, **{field: size})


def untied_config(config: Any) -> Any:
  """The configuration of the same model with a head of its own; None if there is none."""
  field = field_of(config, TYING_FIELDS)
  if field is None or not getattr(config, field):
    return None
  return dataclasses.replace(config, **{field: False})


def twins_of(table: WeightTable) -> tuple[str, str]:
  """The parameters of the embedding and of the head, which may be the same; "" for one that the table does not have."""
  return _named(table, _EMBEDDING, [tie.twin for tie in table.tied]), _named(
    table, _HEAD, [tie.tensor for tie in table.tied]
  )


def _named(table: WeightTable, module: str, tensors: Sequence[str]) -> str:
  """The parameter of a module that is called so, or of one of some tensors."""
  for row in table.rows:
    for form in row.forms:
      if form.name in tensors or form.name.split(".")[-2:-1] == [module]:
        return row.ours
  return ""


@functools.lru_cache(64)
def with_head(table: WeightTable) -> WeightTable:
  """A weight table that has a row for the head, also if the family's models have the embedding in its place."""
  embedding, head = twins_of(table)
  if head or not embedding or not table.tied:
    return table
  row, _ = table.row_of(embedding)
  heads = {tie.twin: tie.tensor for tie in table.tied}
  forms = [dataclasses.replace(form, name=heads[form.name]) for form in row.forms if form.name in heads]
  return WeightTable(*table.rows, ("lm_head.w", forms), ignored=table.ignored, tied=table.tied)


def vocabulary_parameters(
  family: Family, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
  """Names of the parameters whose first axis is that of the vocabulary, among those with the given shapes."""
  field = field_of(config, VOCABULARY_FIELDS)
  if field is None:
    return frozenset()
  after = abstract_model(family.model_class, resized(config, getattr(config, field) + 1)).parameters
  return frozenset(name for name, p in after.items() if p.shape != shapes[name])
