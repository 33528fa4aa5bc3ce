"""Presets: published model sizes as the rows of a table, each a classmethod of the configuration's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def preset_rows(*columns: str, **shared: Any) -> Callable[..., classmethod[Any, [], Any]]:
  """Makes a function that turns one row of values into a preset. All its rows state the same fields.

      _llama3 = preset_rows("num_layers", "embed_dim", norm_eps=1e-5)

      class ModelConfig:
        llama3_8b  = _llama3("Llama 3 8B.",  32, 4096)
        llama3_70b = _llama3("Llama 3 70B.", 80, 8192)

      ModelConfig.llama3_8b()  # ModelConfig(num_layers=32, embed_dim=4096, norm_eps=1e-5)

  Args:
    *columns: the fields whose values a row states, in the order of the row.
    **shared: fields that have the same value in all rows.

  Returns:
    `row(doc, *values)`, which returns a classmethod with the docstring `doc`. Called without arguments, the classmethod
    makes the configuration.
  """

  def row(doc: str, *values: Any) -> classmethod[Any, [], Any]:
    fields = shared | dict(zip(columns, values, strict=True))

    def preset(cls: type[Any]) -> Any:
      return cls(**fields)

    preset.__doc__ = doc
    return classmethod(preset)

  return row
