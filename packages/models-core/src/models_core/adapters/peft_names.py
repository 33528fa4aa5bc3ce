"""Names in the files of peft: the modules of a model's matrices, and the tensors of an adapter that belong to them.

The factors of the module `model.layers.0.self_attn.q_proj` are `base_model.model.model.layers.0.self_attn.q_proj`
`.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]; those of an embedding [vocabulary, dim] are `.lora_embedding_A`
[r, vocabulary] and `.lora_embedding_B` [dim, r]. Names of modules and shapes follow from the weight table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from models_core.adapters.lora import Roles, find_row, roles
from models_core.adapters.vocabulary import twins_of
from models_core.errors import AdapterError
from models_core.weights import Form, WeightTable

_PLACEHOLDER = re.compile(r"\{(\w+)\}")

PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_SIDES = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
SHIFT = ".lora_B.bias"
BASE_LAYER = ".base_layer"
ROWS = ".token_adapter.trainable_tokens_delta"


@dataclasses.dataclass(frozen=True)
class Matrices:
  """The matrices of a parameter, in one of the forms in which transformers may hold it.

  Attributes:
    parameter: name of the parameter.
    shape: of the parameter.
    form: the form.
    roles: roles of the parameter's axes.
    placeholders: those of the form's name that the parameter's name decides.
    modules: the module of each matrix, by its index along the stacked axes, such as `{(0,): "...experts.0.up_proj"}`;
      `{(): "...q_proj"}` of a parameter that is one matrix. None if one tensor holds the matrices of all experts.
    is_embedding: whether the parameter is the embedding.
    is_head: whether it is the head.
  """

  parameter: str
  shape: tuple[int, ...]
  form: Form
  roles: Roles
  placeholders: Mapping[str, str]
  modules: Mapping[tuple[int, ...], str] | None
  is_embedding: bool
  is_head: bool

  @property
  def sides(self) -> tuple[str, str]:
    """What the names of the two factors end with."""
    return EMBEDDING_SIDES if self.is_embedding else SIDES

  @property
  def sizes(self) -> dict[str, int]:
    """Sizes of the axes by their letters."""
    return dict(zip(self.roles.axes, self.shape, strict=True))


def matrices_of(table: WeightTable, parameter: str, shape: tuple[int, ...]) -> Iterator[Matrices]:
  """The matrices of a parameter in each form of its row; none if it is a vector.

  Args:
    table: weight table of Hugging Face's naming scheme.
    parameter: name of the parameter.
    shape: of the parameter.
  """
  row, placeholders = find_row(table, parameter)
  embedding, head = twins_of(table)
  for form in row.forms:
    try:
      own = roles(row, form)
    except AdapterError:
      continue
    modules = None
    if {*_PLACEHOLDER.findall(form.name)} - placeholders.keys() == {*own.experts}:
      sizes = dict(zip(own.axes, shape, strict=True))
      modules = {
        index: _module(form.name.format(**placeholders, **dict(zip(own.experts, index, strict=True))))
        for index in np.ndindex(*(sizes[axis] for axis in own.experts))
      }
    yield Matrices(
      parameter, shape, form, own, placeholders, modules, parameter == embedding, parameter == head
    )


def _module(tensor: str) -> str:
  """The name of the module that a tensor belongs to."""
  return tensor.removesuffix(".weight")
