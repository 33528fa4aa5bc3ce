"""Published sizes as the rows of a table: each is a classmethod of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def preset_rows(*columns: str, **shared: Any) -> Callable[..., classmethod[Any, [], Any]]:
  """What makes presets of rows that state the same fields.

      _llama3 = preset_rows("num_layers", "embed_dim", norm_eps=1e-5)

      class ModelConfig:
        llama3_8b  = _llama3("Llama 3 8B.",  32, 4096)
        llama3_70b = _llama3("Llama 3 70B.", 80, 8192)

  Args:
    *columns: fields that a row states, in its order.
    **shared: fields that all rows have in common.

  Returns:
    `row(doc, *values)`: a classmethod without arguments, which makes the configuration and has this docstring.
  """

  def row(doc: str, *values: Any) -> classmethod[Any, [], Any]:
    fields = shared | dict(zip(columns, values, strict=True))

    def preset(cls: type[Any]) -> Any:
      return cls(**fields)

    preset.__doc__ = doc
    return classmethod(preset)

  return row
