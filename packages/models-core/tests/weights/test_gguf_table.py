"""Tables of GGUF files follow from Hugging Face's."""

import pytest

from models_core.weights.gguf import gguf_table
from models_core.weights.table import Conversion, Form, Ignored, WeightTable

DOUBLED = Conversion(load=lambda x: x / 2, save=lambda x: x * 2)
HUGGINGFACE = WeightTable(
  ("embedder.input_embedding", "model.embed_tokens.weight", "v d"),
  ("layers.{i}.attn.q_proj.w", "model.layers.{i}.self_attn.q_proj.weight", "(n h) d -> n h d"),
  ("layers.{i}.attn.q_norm.w", [Form("a.{i}", "h"), Form("b.{i}", "h")]),
)


def rows(table):
  return {row.ours: (row.forms, row.conversion) for row in table.rows}


def test_names_differ_and_layouts_do_not():
  assert rows(gguf_table(HUGGINGFACE)) == {
    "embedder.input_embedding": ((Form("token_embd.weight", "v d"),), None),
    "layers.{i}.attn.q_proj.w": ((Form("blk.{i}.attn_q.weight", "(n h) d -> n h d"),), None),
    "layers.{i}.attn.q_norm.w": ((Form("blk.{i}.attn_q_norm.weight", "h"),), None),
  }


def test_a_row_of_ones_own_replaces_the_common_one_and_norms_may_hold_other_numbers():
  ignored = Ignored("rope_freqs.weight", "not needed")
  own = ("layers.{i}.attn.q_proj.w", "blk.{i}.attn_q.weight", "(n h 2) d -> n (2 h) d")
  table = gguf_table(HUGGINGFACE, own, norms=DOUBLED, ignored=[ignored])
  found = rows(table)
  assert found["layers.{i}.attn.q_proj.w"] == ((Form(*own[1:]),), None)
  assert found["layers.{i}.attn.q_norm.w"][1] is DOUBLED
  assert found["embedder.input_embedding"][1] is None
  assert table.ignored == (ignored,)


def test_a_parameter_without_a_common_name_wants_a_row():
  odd = WeightTable(("layers.{i}.mlp.gate.w", "model.layers.{i}.gate", "f d"))
  with pytest.raises(ValueError, match=r"layers\.\{i\}\.mlp\.gate\.w: pass a row for it"):
    gguf_table(odd)
  row = ("layers.{i}.mlp.gate.w", "blk.{i}.gate", "f d")
  assert rows(gguf_table(odd, row)) == rows(WeightTable(row))
