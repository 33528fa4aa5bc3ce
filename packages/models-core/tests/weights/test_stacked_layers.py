"""Parameters that stack layers have the rows of their layers."""

import numpy as np
import pytest

from models_core.weights import Form, WeightTable, arrange, maxtext_table, own_names, pieces

L, M = "layers.{i}", "model.layers.{i}"
TABLE = WeightTable(
  (f"{L}.attn.q_proj.w", f"{M}.self_attn.q_proj.weight", "(n h) d"),
  (f"{L}.mlp.down_proj.w", f"{M}.mlp.down", "f d -> d f"),
  (
    f"{L}.mlp.experts.gate_proj",
    [Form(f"{M}.experts.{{e}}.gate", "f d -> e f d"), Form(f"{M}.gate_up", "e (0/2 f) d -> e f d")],
  ),
)
LETTERS = {"n": 2, "h": 3, "l": 4}


def filled(parameter, shape, tensors, form=0, table=TABLE):
  """The parameter that tensors fill."""
  row, at = table.row_of(parameter)
  array = np.full(shape, np.nan)
  for piece in pieces(row, row.forms[form], at, shape, LETTERS):
    assert tensors[piece.tensor].shape == piece.shape
    array[piece.target] = arrange(tensors[piece.tensor], piece, array[piece.target].shape)
  return array


def numbers(*shape):
  return np.random.default_rng(0).normal(size=shape)


def test_each_layer_fills_its_slice():
  tensors = {f"model.layers.{i}.mlp.down": numbers(5, 2) + i for i in range(4)}
  stack = filled("layers.1:4:2.mlp.down_proj.w", (2, 2, 5), tensors)
  np.testing.assert_array_equal(stack, [tensors[f"model.layers.{i}.mlp.down"].T for i in (1, 3)])


def test_experts_are_stacked_in_stacked_layers():
  gates = numbers(2, 3, 5, 2)
  each = {f"model.layers.{i}.experts.{e}.gate": gates[i, e] for i in range(2) for e in range(3)}
  np.testing.assert_array_equal(filled("layers.0:2.mlp.experts.gate_proj", (2, 3, 5, 2), each), gates)
  fused = {f"model.layers.{i}.gate_up": np.concatenate([gates[i], -gates[i]], axis=1) for i in range(2)}
  np.testing.assert_array_equal(filled("layers.0:2.mlp.experts.gate_proj", (2, 3, 5, 2), fused, 1), gates)


def test_a_tensor_of_all_layers_fills_each_slice():
  table = maxtext_table(WeightTable((f"{L}.mlp.down_proj.w", "", "")))
  tensor = numbers(5, 4, 2)
  stack = filled(
    "layers.1:4:2.mlp.down_proj.w", (2, 2, 5), {"decoder.layers.mlp.wo.kernel": tensor}, table=table
  )
  np.testing.assert_array_equal(stack, tensor[:, [1, 3]].transpose(1, 2, 0))


def test_own_names_are_those_of_layers_or_of_the_same_stack():
  name, single = "layers.0:2.attn.w", "layers.2.attn.w"
  shapes, array = {name: (2, 3, 4), single: (3, 4)}, numbers(2, 3, 4)
  each = {"layers.0.attn.w": array[0], "layers.1.attn.w": array[1]}
  np.testing.assert_array_equal(filled(name, (2, 3, 4), each, table=own_names(shapes)), array)
  for tensor in (name, f"{name}.value"):
    table = own_names(shapes, [tensor])
    np.testing.assert_array_equal(filled(name, (2, 3, 4), {tensor: array}, table=table), array)
    assert table.known([tensor]) == 1
    # A model that stacks no layers.
    table = own_names({"layers.0.attn.w": (3, 4), "layers.1.attn.w": (3, 4)}, [tensor])
    np.testing.assert_array_equal(filled("layers.1.attn.w", (3, 4), {tensor: array}, table=table), array[1])


def test_the_shape_must_have_the_layers_of_the_name():
  with pytest.raises(TypeError, match="no row"):
    TABLE.row_of("layers.0:2.attn.k_proj.w")
  row, at = TABLE.row_of("layers.0:2.attn.q_proj.w")
  with pytest.raises(ValueError, match=r"3 layers, but .* holds 2"):
    pieces(row, row.forms[0], at, (3, 6, 4), LETTERS)
