"""The columns of our tables of published models."""

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


def by_field(*sizes: int) -> dict[str, Any]:
  """A row of such a table as fields of a configuration."""
  return dict(zip(_COLUMNS, sizes, strict=True))
