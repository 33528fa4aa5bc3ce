"""Weight tables of GGUF files, whose tensors have one name for a parameter in all architectures."""

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
  f"{L}.attn.q_norm.w":               f"{B}.attn_q_norm.weight",
  f"{L}.attn.k_norm.w":               f"{B}.attn_k_norm.weight",
  f"{L}.post_attn_norm.w":            f"{B}.post_attention_norm.weight",
  f"{L}.post_attention_layernorm.w":  f"{B}.ffn_norm.weight",
  f"{L}.pre_ffw_norm.w":              f"{B}.ffn_norm.weight",
  f"{L}.mlp.gate_proj.w":             f"{B}.ffn_gate.weight",
  f"{L}.mlp.up_proj.w":               f"{B}.ffn_up.weight",
  f"{L}.mlp.down_proj.w":             f"{B}.ffn_down.weight",
  f"{L}.mlp.router.w":                f"{B}.ffn_gate_inp.weight",
  f"{L}.post_ffw_norm.w":             f"{B}.post_ffw_norm.weight",
  "final_norm.w":                     "output_norm.weight",
  "lm_head.w":                        "output.weight",
}  # fmt: skip


def gguf_table(
  huggingface: WeightTable, *rows: tuple, norms: Conversion | None = None, ignored: Sequence[Ignored] = ()
) -> WeightTable:
  """Hugging Face's rows under the names of GGUF, which has the same layouts and ties the head alike.

  Args:
    huggingface: the family's table.
    *rows: of parameters that differ, such as `(ours, checkpoint, layout)`.
    norms: where GGUF stores other numbers for the weights of norms.
    ignored: tensors to leave out.

  Raises:
    ValueError: for a parameter without a row of its own for which GGUF has no name: a fault of the table.
  """
  own = {row[0]: row for row in rows}
  derived = []
  for row in huggingface.rows:
    if row.ours not in own and row.ours not in NAMES:
      raise ValueError(f"GGUF files have no common name for {row.ours}: give its row")
    values = () if norms is None or not row.ours.endswith("norm.w") else (norms,)
    derived.append(own.get(row.ours) or (row.ours, NAMES[row.ours], row.forms[0].layout, *values))
  return WeightTable(*derived, ignored=ignored, tied=[Tied("output.weight", "token_embd.weight")])
