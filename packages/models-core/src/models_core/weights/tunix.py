"""Weight tables of the trees that tunix saves of models of its own. Matrices are [in, out] there, and heads are axes."""

from __future__ import annotations

from collections.abc import Sequence

from models_core.weights.table import TRAINING, Ignored, WeightTable, variable_forms

L = "layers.{i}"

# What the architectures of tunix share, except for Gemma's.
TENSORS = {
  # ours                             tunix, layout: tunix -> ours
  "embedder.input_embedding":         ("embedder.input_embedding",         "v d"),
  f"{L}.input_layernorm.w":           (f"{L}.input_layernorm.w",           "d"),
  f"{L}.attn.q_proj.w":               (f"{L}.attn.q_proj.w",               "d n h -> (n h) d"),
  f"{L}.attn.q_proj.b":               (f"{L}.attn.q_bias",                 "o"),
  f"{L}.attn.k_proj.w":               (f"{L}.attn.k_proj.w",               "d k h -> (k h) d"),
  f"{L}.attn.k_proj.b":               (f"{L}.attn.k_bias",                 "o"),
  f"{L}.attn.v_proj.w":               (f"{L}.attn.v_proj.w",               "d k h -> (k h) d"),
  f"{L}.attn.v_proj.b":               (f"{L}.attn.v_bias",                 "o"),
  f"{L}.attn.o_proj.w":               (f"{L}.attn.o_proj.w",               "n h d -> d (n h)"),
  f"{L}.attn.o_proj.b":               (f"{L}.attn.o_bias",                 "o"),
  f"{L}.attn.q_norm.w":               (f"{L}.attn.q_norm.w",               "h"),
  f"{L}.attn.k_norm.w":               (f"{L}.attn.k_norm.w",               "h"),
  f"{L}.post_attention_layernorm.w":  (f"{L}.post_attention_layernorm.w",  "d"),
  f"{L}.mlp.gate_proj.w":             (f"{L}.mlp.gate_proj.kernel",        "d f -> f d"),
  f"{L}.mlp.gate_proj.b":             (f"{L}.mlp.gate_proj.bias",          "o"),
  f"{L}.mlp.up_proj.w":               (f"{L}.mlp.up_proj.kernel",          "d f -> f d"),
  f"{L}.mlp.up_proj.b":               (f"{L}.mlp.up_proj.bias",            "o"),
  f"{L}.mlp.down_proj.w":             (f"{L}.mlp.down_proj.kernel",        "f d -> d f"),
  f"{L}.mlp.down_proj.b":             (f"{L}.mlp.down_proj.bias",          "o"),
  f"{L}.mlp.router.w":                (f"{L}.mlp.router.kernel",           "d e -> e d"),
  f"{L}.mlp.experts.gate_proj":       (f"{L}.mlp.gate_proj",               "e d f -> e f d"),
  f"{L}.mlp.experts.up_proj":         (f"{L}.mlp.up_proj",                 "e d f -> e f d"),
  f"{L}.mlp.experts.down_proj":       (f"{L}.mlp.down_proj",               "e f d -> e d f"),
  "final_norm.w":                     ("final_norm.w",                     "d"),
  "lm_head.w":                        ("lm_head.w",                        "d v -> v d"),
}  # fmt: skip


def tunix_table(huggingface: WeightTable, *rows: tuple, ignored: Sequence[Ignored] = ()) -> WeightTable:
  """Makes a family's weight table of the trees that tunix saves of its own model.

  Args:
    huggingface: the family's weight table of Hugging Face's files, which names the parameters.
    *rows: for parameters whose tensor differs: `(ours, [(tunix, layout), ...])`, one entry for each form.
    ignored: tensors to leave out.

  Raises:
    ValueError: if neither `rows` nor `TENSORS` has a tensor for a parameter, which is an error in the table.
  """
  own = dict(rows)
  names = [row.ours for row in huggingface.rows]
  if unknown := [name for name in names if name not in own and name not in TENSORS]:
    raise ValueError(f"tunix's tensor is not known for the parameter {unknown[0]}: pass a row for it")
  forms = {name: own.get(name) or [TENSORS[name]] for name in names}
  return WeightTable(
    *((name, [form for one in forms[name] for form in variable_forms(*one)]) for name in names),
    ignored=(*TRAINING, *ignored),
  )
