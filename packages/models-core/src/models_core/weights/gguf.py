"""Weight tables of GGUF files. GGUF gives the tensor of a parameter the same name in all architectures."""

from __future__ import annotations

from collections.abc import Sequence

from models_core.weights.table import Conversion, Ignored, Tied, WeightTable

L, B = "layers.{i}", "blk.{i}"

NAMES = {
  # ours                              GGUF
  "embedder.input_embedding":         "token_embd.weight",
  f"{L}.input_layernorm.w":           f"{B}.attn_norm.weight",
  f"{L}.attn.q_proj.w":               f"{B}.attn_q.weight",
  f"{L}.attn.q_proj.b":               f"{B}.attn_q.bias",
  f"{L}.attn.k_proj.w":               f"{B}.attn_k.weight",
  f"{L}.attn.k_proj.b":               f"{B}.attn_k.bias",
  f"{L}.attn.v_proj.w":               f"{B}.attn_v.weight",
  f"{L}.attn.v_proj.b":               f"{B}.attn_v.bias",
  f"{L}.attn.o_proj.w":               f"{B}.attn_output.weight",
  f"{L}.attn.o_proj.b":               f"{B}.attn_output.bias",
  f"{L}.attn.q_norm.w":               f"{B}.attn_q_norm.weight",
  f"{L}.attn.k_norm.w":               f"{B}.attn_k_norm.weight",
  f"{L}.post_attn_norm.w":            f"{B}.post_attention_norm.weight",
  f"{L}.post_attention_layernorm.w":  f"{B}.ffn_norm.weight",
  f"{L}.pre_ffw_norm.w":              f"{B}.ffn_norm.weight",
  f"{L}.mlp.gate_proj.w":             f"{B}.ffn_gate.weight",
  f"{L}.mlp.gate_proj.b":             f"{B}.ffn_gate.bias",
  f"{L}.mlp.up_proj.w":               f"{B}.ffn_up.weight",
  f"{L}.mlp.up_proj.b":               f"{B}.ffn_up.bias",
  f"{L}.mlp.down_proj.w":             f"{B}.ffn_down.weight",
  f"{L}.mlp.down_proj.b":             f"{B}.ffn_down.bias",
  f"{L}.mlp.router.w":                f"{B}.ffn_gate_inp.weight",
  f"{L}.post_ffw_norm.w":             f"{B}.post_ffw_norm.weight",
  "final_norm.w":                     "output_norm.weight",
  "lm_head.w":                        "output.weight",
}  # fmt: skip


def gguf_table(
  huggingface: WeightTable, *rows: tuple, norms: Conversion | None = None, ignored: Sequence[Ignored] = ()
) -> WeightTable:
  """Makes a family's weight table of GGUF files from its table of Hugging Face's files.

  Each row gets GGUF's name of its parameter and keeps its layout. The head is tied as in Hugging Face's files.

  Args:
    huggingface: the family's weight table of Hugging Face's files.
    *rows: for parameters whose name or layout differs, such as `(ours, checkpoint, layout)`.
    norms: conversion of the weights of norms; None if GGUF stores the same numbers.
    ignored: tensors to leave out.

  Raises:
    ValueError: if neither `rows` nor `NAMES` has a name for a parameter, which is an error in the table.
  """
  own = {row[0]: row for row in rows}
  derived = []
  for row in huggingface.rows:
    if row.ours not in own and row.ours not in NAMES:
      raise ValueError(f"no GGUF name is known for the parameter {row.ours}: pass a row for it")
    values = () if norms is None or not row.ours.endswith("norm.w") else (norms,)
    derived.append(own.get(row.ours) or (row.ours, NAMES[row.ours], row.forms[0].layout, *values))
  return WeightTable(*derived, ignored=ignored, tied=[Tied("output.weight", "token_embd.weight")])
