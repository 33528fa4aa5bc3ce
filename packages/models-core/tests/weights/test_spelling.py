"""The prefix `model.` of Hugging Face's names: transformers loads checkpoints without it, and with one too many."""

import pytest

from models_core.weights import Form, Ignored, Tied, WeightTable

TABLE = WeightTable(
  ("emb", "model.embed.weight", "v d"),
  ("layers.{i}.w", [Form("model.layers.{i}.w.weight", "d"), Form("model.layers.{i}.x.weight", "d")]),
  ("head", "lm_head.weight", "v d"),
  ignored=[Ignored("model.layers.{i}.inv_freq", "unused")],
  tied=[Tied("lm_head.weight", "model.embed.weight")],
)
NAMES = [
  "model.embed.weight",
  "model.layers.0.w.weight",
  "model.layers.1.w.weight",
  "model.layers.0.inv_freq",
  "lm_head.weight",
]


def names(table):
  return [form.name for row in table.rows for form in row.forms]


def test_names_with_the_prefix_are_the_tables_own():
  assert TABLE.spelled_as(NAMES) is TABLE
  assert TABLE.spelled_as(["model.embed.weight"]) is TABLE


def test_the_prefix_may_be_missing():
  bare = TABLE.spelled_as([name.removeprefix("model.") for name in NAMES])
  assert names(bare) == ["embed.weight", "layers.{i}.w.weight", "layers.{i}.x.weight", "lm_head.weight"]
  assert bare.ignored[0].pattern == "layers.{i}.inv_freq"
  assert bare.tied == (Tied("lm_head.weight", "embed.weight"),)
  assert "the names lack the prefix 'model.'" in bare.absence


def test_the_prefix_may_be_there_twice():
  twice = TABLE.spelled_as([f"model.{name}" for name in NAMES])
  assert names(twice)[0] == "model.model.embed.weight"
  assert twice.tied == (Tied("model.lm_head.weight", "model.model.embed.weight"),)
  assert twice.absence == ""


@pytest.mark.parametrize(
  "found", [[], ["lm_head.weight"], ["other.weight"], [f"module.{n}" for n in NAMES]], ids=range(4)
)
def test_other_names_change_nothing(found):
  assert TABLE.spelled_as(found) is TABLE


def test_of_several_prefixes_the_one_that_is_there_counts():
  table = WeightTable(
    ("emb", [Form(f"{prefix}embed", "v d") for prefix in ("model.", "text.model.", "model.text.")])
  )
  assert table.spelled_as(["text.model.embed"]) is table
  assert names(table.spelled_as(["text.embed"])) == ["embed", "text.model.embed", "text.embed"]


def test_a_table_without_the_prefix_has_one_spelling():
  table = WeightTable(("emb", "token_embd.weight", "v d"))
  assert table.spelled_as(["model.token_embd.weight"]) is table
