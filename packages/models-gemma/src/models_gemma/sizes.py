"""Published models as rows of a table."""

from __future__ import annotations

from typing import Any

_COLUMNS = (
  "num_layers",
  "embed_dim",
  "hidden_dim",
  "num_heads",
  "head_dim",
  "num_kv_heads",
  "query_pre_attn_scalar",
)


def preset(doc: str, common: dict[str, Any], *sizes: int) -> classmethod:
  """A classmethod of a configuration that makes that of a published model.

  Args:
    doc: of the method.
    common: fields that the model shares with others.
    *sizes: its own, in the order of the columns.
  """
  own = dict(zip(_COLUMNS, sizes, strict=True))

  def create(cls: type) -> Any:
    return cls(**common, **own)

  create.__doc__ = doc
  return classmethod(create)
