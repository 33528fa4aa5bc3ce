"""What a call of attention needs, of which the choice of an implementation depends."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class AttentionCase:
  """What a call of attention needs.

  Attributes:
    rows: B.
    queries: T.
    keys: S.
    heads: N, of queries.
    kv_heads: K.
    head_dim: H.
    dtype: name of the dtype of queries.
    platform: "cpu", "gpu" or "tpu".
    soft_cap: bounds the logits, or None.
    window: whether there is a sliding window.
    mask: whether a caller's mask takes the place of the causal rule.
    packed: whether a row holds several sequences.
    counted: whether positions count from 0 in every row, without a cache and without a mask.
    sequence_shards: into how many parts a mesh divides the queries of a row.
    products_replaced: whether a library replaces JAX's products.
  """

  rows: Any
  queries: Any
  keys: Any
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str
  platform: str
  soft_cap: float | None = None
  window: bool = False
  mask: bool = False
  packed: bool = False
  counted: bool = False
  sequence_shards: int = 1
  products_replaced: bool = False

  @property
  def is_symbolic(self) -> bool:
    """Whether a size is unknown."""
    return not all(isinstance(size, int) for size in (self.rows, self.queries, self.keys))

  def __str__(self) -> str:
    has = [name for name in ("window", "mask", "packed", "counted") if getattr(self, name)]
    if self.sequence_shards > 1:
      has.append(f"queries divided into {self.sequence_shards} parts")
    needs = f", {', '.join(has)}" if has else ""
    cap = "" if self.soft_cap is None else f", soft cap {self.soft_cap}"
    return (
      f"{self.dtype} q [{self.rows}, {self.queries}, {self.heads}, {self.head_dim}], k and v "
      f"[{self.rows}, {self.keys}, {self.kv_heads}, {self.head_dim}] on {self.platform}{needs}{cap}"
    )


def joined(*reasons: str | None) -> str | None:
  """The given reasons, separated by semicolons; None if all are None."""
  return "; ".join(filter(None, reasons)) or None


def why_no_fixed_mask(case: AttentionCase) -> str | None:
  """Why a kernel whose mask is fixed when it is traced cannot take a case, in one sentence; None if it can."""
  if case.mask:
    unknown = "it has a mask of its own, which the kernel would read as [B, T, S]"
  else:
    unknown = "it has positions or a cache, and the kernel knows only tokens that count from 0: pass neither"
  parts = case.sequence_shards
  return joined(
    "a library replaces JAX's products, and must see them as they are" if case.products_replaced else None,
    "its sizes are symbolic" if case.is_symbolic else None,
    None if case.counted and not case.mask else unknown,
    f"a mesh divides its sequence into {parts} parts" if parts > 1 else None,
  )
