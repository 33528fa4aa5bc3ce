"""Layouts of tensors that hold all layers, and the tables of trainers that write such tensors."""

import dataclasses

import numpy as np
import pytest

from models_core.weights.layout import arrange, letter_sizes, pieces, put_back
from models_core.weights.maxtext import divided_by_root_of_head_dim, maxtext_table
from models_core.weights.table import Conversion, Form, Row, WeightTable, own_names
from models_core.weights.tunix import tunix_table

LAYERS = 4
SIZES = {"n": 2, "k": 1, "h": 3, "l": LAYERS}

# layout, shape of the tensor, shape of the parameter, the parameter of layer 2 in numpy
LAYOUTS = [
  ("d i/l f -> f d", (5, LAYERS, 7), (7, 5), lambda x: x[:, 2].T),
  ("d i/l -> d", (5, LAYERS), (5,), lambda x: x[:, 2]),
  ("i/l f d -> f d", (LAYERS, 7, 5), (7, 5), lambda x: x[2]),
  ("e i/l d f -> e f d", (3, LAYERS, 5, 7), (3, 7, 5), lambda x: x[:, 2].swapaxes(1, 2)),
  ("d i/l n h -> (n h) d", (5, LAYERS, 2, 3), (6, 5), lambda x: x[:, 2].reshape(5, 6).T),
  ("n i/l h -> (n h)", (2, LAYERS, 3), (6,), lambda x: x[:, 2].reshape(6)),
  (
    "d i/l n (p 2) -> (n 2 p) d", (5, LAYERS, 2, 8), (16, 5),
    lambda x: x[:, 2].reshape(5, 2, 4, 2).swapaxes(2, 3).reshape(5, 16).T,
  ),
]  # fmt: skip


def layer(layout, number, shape, conversion=None):
  row = Row("layers.{i}.w", (Form("stack.w", layout),), conversion)
  (piece,) = pieces(row, row.forms[0], {"i": str(number)}, shape, SIZES)
  return piece


@pytest.mark.parametrize(
  ("layout", "theirs", "ours", "reference"), LAYOUTS, ids=lambda value: str(value)[:30]
)
def test_a_layer_is_one_position_of_an_axis(layout, theirs, ours, reference):
  x = np.arange(np.prod(theirs), dtype=np.float32).reshape(theirs)
  piece = layer(layout, 2, ours)
  assert (piece.tensor, piece.shape) == ("stack.w", theirs)
  np.testing.assert_array_equal(arrange(x, piece, ours), reference(x))
  back = np.full_like(x, np.nan)
  for number in range(LAYERS):
    piece = layer(layout, number, ours)
    put_back(arrange(x, piece, ours), piece, back)
  np.testing.assert_array_equal(back, x)


def test_only_leading_layers_are_contiguous():
  assert layer("i/l f d -> f d", 2, (7, 5)).run == 70
  assert layer("f i/l d -> f d", 2, (7, 5)).run is None


def test_a_layer_that_the_axis_does_not_have():
  with pytest.raises(ValueError, match="selects a part that a fused axis does not have"):
    layer("d i/l f -> f d", LAYERS, (7, 5))


def test_sizes_come_from_the_configuration():
  config = dataclasses.make_dataclass("Config", ["num_layers", "num_heads", "head_dim"])(4, 2, None)
  assert letter_sizes(config) == {"l": 4, "n": 2}


def test_a_conversion_may_depend_on_sizes():
  scaled = lambda sizes: Conversion(load=lambda x: x * sizes["h"], save=lambda w: w / sizes["h"])
  x = np.arange(5 * LAYERS * 7, dtype=np.float32).reshape(5, LAYERS, 7)
  piece = layer("d i/l f -> f d", 1, (7, 5), scaled)
  np.testing.assert_array_equal(arrange(x, piece, (7, 5)), x[:, 1].T * 3)


@pytest.mark.parametrize("head_dim", [4, 128])
def test_queries_without_the_scale_of_attention(head_dim):
  convert = divided_by_root_of_head_dim({"h": head_dim})
  w = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  np.testing.assert_allclose(convert.save(w), w.astype(np.float64) / head_dim**0.5, rtol=1e-6)
  np.testing.assert_allclose(convert.load(convert.save(w)), w, rtol=2e-7)
  assert convert.load(w.astype(np.float16)).dtype == np.float32


HUGGINGFACE = WeightTable(
  ("embedder.input_embedding", "e.weight", "v d"),
  ("layers.{i}.attn.q_proj.w", "{i}.q.weight", "(n h) d"),
  ("layers.{i}.input_layernorm.w", "{i}.norm.weight", "d"),
)


def forms_of(table, parameter):
  row, _ = table.row_of(parameter)
  return [(form.name, form.layout) for form in row.forms]


def test_maxtext_s_table_has_stacked_layers_single_ones_and_variables():
  table = maxtext_table(HUGGINGFACE)
  assert forms_of(table, "layers.3.input_layernorm.w") == [
    ("decoder.layers.pre_self_attention_layer_norm.scale", "d i/l -> d"),
    ("decoder.layers.pre_self_attention_layer_norm.scale.value", "d i/l -> d"),
    ("decoder.layers_{i}.pre_self_attention_layer_norm.scale", "d"),
    ("decoder.layers_{i}.pre_self_attention_layer_norm.scale.value", "d"),
  ]
  assert forms_of(table, "embedder.input_embedding")[0] == ("token_embedder.embedding", "v d")


def test_tunix_s_table_has_the_family_s_rows_before_the_common_ones():
  table = tunix_table(HUGGINGFACE, ("layers.{i}.attn.q_proj.w", [("layers.{i}.q", "n d h -> (n h) d")]))
  assert forms_of(table, "layers.0.attn.q_proj.w")[0] == ("layers.{i}.q", "n d h -> (n h) d")
  assert forms_of(table, "layers.0.input_layernorm.w")[1] == ("layers.{i}.input_layernorm.w.value", "d")


@pytest.mark.parametrize(("make", "whose"), [(maxtext_table, "MaxText"), (tunix_table, "tunix")])
def test_a_parameter_without_a_tensor_is_an_error_of_the_table(make, whose):
  with pytest.raises(ValueError, match=f"{whose}'s tensor is not known for the parameter layers.{{i}}.new.w"):
    make(WeightTable(("layers.{i}.new.w", "{i}.new", "d")))


def test_names_tell_the_naming_scheme():
  shapes = {
    "embedder.input_embedding": (8, 4),
    "layers.0.attn.q_proj.w": (6, 4),
    "layers.0.input_layernorm.w": (4,),
  }
  tables = [maxtext_table(HUGGINGFACE), HUGGINGFACE, own_names(shapes)]
  checkpoints = [
    ["token_embedder.embedding", "decoder.layers.self_attention.query.kernel", "step"],
    ["e.weight", "0.q.weight", "1.q.weight"],
    ["embedder.input_embedding.value", "layers.7.attn.q_proj.w.value", "opt_state.mu"],
  ]
  assert [[table.known(names) for table in tables] for names in checkpoints] == [
    [2, 0, 0],
    [0, 3, 0],
    [0, 0, 2],
  ]
