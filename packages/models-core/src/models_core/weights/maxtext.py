"""Weight tables of the trees of MaxText, in which an array holds a parameter of all layers, along its second axis.

With `scan_layers=False` each layer has arrays of its own, without this axis. Matrices are [in, out], and heads are axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from models_core.weights.table import TRAINING, Conversion, Form, Ignored, Row, WeightTable, variable_forms

L = "layers.{i}."

TENSORS = {
  # ours                          MaxText, layout of one layer: MaxText -> ours
  "embedder.input_embedding":      ("token_embedder.embedding",             "v d"),
  f"{L}input_layernorm.w":         ("pre_self_attention_layer_norm.scale",  "d"),
  f"{L}attn.q_proj.w":             ("self_attention.query.kernel",          "d n h -> (n h) d"),
  f"{L}attn.q_proj.b":             ("self_attention.query.bias",            "n h -> (n h)"),
  f"{L}attn.k_proj.w":             ("self_attention.key.kernel",            "d k h -> (k h) d"),
  f"{L}attn.k_proj.b":             ("self_attention.key.bias",              "k h -> (k h)"),
  f"{L}attn.v_proj.w":             ("self_attention.value.kernel",          "d k h -> (k h) d"),
  f"{L}attn.v_proj.b":             ("self_attention.value.bias",            "k h -> (k h)"),
  f"{L}attn.o_proj.w":             ("self_attention.out.kernel",            "n h d -> d (n h)"),
  f"{L}attn.o_proj.b":             ("self_attention.out.bias",              "d"),
  f"{L}attn.q_norm.w":             ("self_attention.query_norm.scale",      "h"),
  f"{L}attn.k_norm.w":             ("self_attention.key_norm.scale",        "h"),
  f"{L}post_attention_layernorm.w": ("post_self_attention_layer_norm.scale", "d"),
  f"{L}mlp.gate_proj.w":           ("mlp.wi_0.kernel",                      "d f -> f d"),
  f"{L}mlp.gate_proj.b":           ("mlp.wi_0.bias",                        "f"),
  f"{L}mlp.up_proj.w":             ("mlp.wi_1.kernel",                      "d f -> f d"),
  f"{L}mlp.up_proj.b":             ("mlp.wi_1.bias",                        "f"),
  f"{L}mlp.down_proj.w":           ("mlp.wo.kernel",                        "f d -> d f"),
  f"{L}mlp.down_proj.b":           ("mlp.wo.bias",                          "d"),
  f"{L}mlp.router.w":              ("moe_block.gate.kernel",                "d e -> e d"),
  f"{L}mlp.experts.gate_proj":     ("moe_block.wi_0",                       "e d f -> e f d"),
  f"{L}mlp.experts.up_proj":       ("moe_block.wi_1",                       "e d f -> e f d"),
  f"{L}mlp.experts.down_proj":     ("moe_block.wo",                         "e f d -> e d f"),
  "final_norm.w":                  ("decoder.decoder_norm.scale",           "d"),
  "lm_head.w":                     ("decoder.logits_dense.kernel",          "d v -> v d"),
}  # fmt: skip

IGNORED = (*TRAINING, Ignored("nnx_aux.**", "the state of a training run", repeated=False))


# A layout of one layer, and whether it is that of a configuration; None if there is a single layout.
Layout = tuple[str, Callable[[Any], bool] | None]


def maxtext_table(
  huggingface: WeightTable,
  layouts: Mapping[str, Sequence[Layout]] | None = None,
  conversions: Mapping[str, Callable[[Mapping[str, int]], Conversion]] | None = None,
) -> WeightTable:
  """Makes a family's weight table of MaxText's trees.

  Args:
    huggingface: the family's weight table of Hugging Face's files, which names the parameters.
    layouts: of parameters that have other ones, by the parameter's name.
    conversions: of the numbers that differ, by the parameter's name.

  Raises:
    ValueError: if `TENSORS` has no tensor for a parameter, which is an error in the table.
  """
  names = [row.ours for row in huggingface.rows]
  if unknown := [name for name in names if name not in TENSORS]:
    raise ValueError(f"MaxText's tensor is not known for the parameter {unknown[0]}: add it")
  rows = []
  for name in names:
    tensor, layout = TENSORS[name]
    own = (layouts or {}).get(name, [(layout, None)])
    rows.append(Row(name, tuple(_forms(name, tensor, own)), (conversions or {}).get(name)))
  return WeightTable(*rows, ignored=IGNORED)


def _forms(name: str, tensor: str, layouts: Sequence[Layout]) -> Iterator[Form]:
  ways = (
    [("", False)] if not name.startswith(L) else [("decoder.layers.", True), ("decoder.layers_{i}.", False)]
  )
  for prefix, is_scanned in ways:
    for layout, when in layouts:
      for form in variable_forms(prefix + tensor, _scanned(layout) if is_scanned else layout):
        yield dataclasses.replace(form, when=when)


def _scanned(layout: str) -> str:
  """The layout of an array of all layers: "d f -> f d" -> "d i/l f -> f d"."""
  theirs, _, ours = layout.partition(" -> ")
  first, *rest = theirs.split(" ", 1)
  return f"{' '.join([first, 'i/l', *rest])} -> {ours or theirs}"


def divided_by_root_of_head_dim(sizes: Mapping[str, int]) -> Conversion:
  """The conversion of queries that are stored as w / sqrt(H), so that attention needs no scale."""
  root = np.sqrt(np.float32(sizes["h"]))
  return Conversion(
    load=lambda stored: stored.astype(np.float32) * root,
    save=lambda w: w.astype(np.float32) * (np.float32(1) / root),
  )
