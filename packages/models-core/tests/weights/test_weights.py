import numpy as np
import pytest

from models_core.weights.layout import arrange, part_shape, pieces
from models_core.weights.table import Conversion, Form, WeightTable, matches

HEADS = {"n": 2, "k": 1, "h": 3}


def assemble(layout, tensors, shape, *, name="w", placeholders=None, values=None):
  """A parameter from its tensors, each checked against the shape that the layout implies."""
  row = WeightTable(("ours", name, layout, values) if values else ("ours", name, layout)).rows[0]
  out = np.full(shape, np.nan)
  for piece in pieces(row, row.forms[0], placeholders or {}, shape, HEADS):
    assert tensors[piece.tensor].shape == piece.shape
    out[piece.target] = arrange(tensors[piece.tensor], piece, part_shape(piece, shape))
  return out


# layout, shape of the tensor, shape of the parameter, the same in numpy, whether the bytes are one run
LAYOUTS = [
  ("v d", (4, 5), (4, 5), lambda x: x, True),
  ("", (), (), lambda x: x, True),
  ("d", (5,), (5,), lambda x: x, True),
  ("(n h) d -> n h d", (6, 5), (2, 3, 5), lambda x: x.reshape(2, 3, 5), True),
  ("d (n h) -> d n h", (5, 6), (5, 2, 3), lambda x: x.reshape(5, 2, 3), True),
  ("(n h) -> n h", (6,), (2, 3), lambda x: x.reshape(2, 3), True),
  ("n h d -> n h d", (2, 3, 5), (2, 3, 5), lambda x: x, True),
  ("d f -> f d", (5, 4), (4, 5), lambda x: x.T, False),
  ("d (n h) -> n h d", (5, 6), (2, 3, 5), lambda x: x.reshape(5, 2, 3).transpose(1, 2, 0), False),
  ("(n h) d -> h n d", (6, 5), (3, 2, 5), lambda x: x.reshape(2, 3, 5).swapaxes(0, 1), False),
  # GGUF's Llama files pair neighbouring rows for RoPE.
  ("(n h 2) d -> n (2 h) d", (12, 5), (2, 6, 5), lambda x: x.reshape(2, 3, 2, 5).swapaxes(1, 2).reshape(2, 6, 5), False),
  ("e (0/2 f) d -> e f d", (3, 8, 5), (3, 4, 5), lambda x: x[:, :4], False),
  ("e (1/2 f) d -> e f d", (3, 8, 5), (3, 4, 5), lambda x: x[:, 4:], False),
  ("e d (1/2 f) -> e f d", (3, 5, 8), (3, 4, 5), lambda x: x[:, :, 4:].swapaxes(1, 2), False),
  ("(f 1/2) d -> f d", (8, 5), (4, 5), lambda x: x[1::2], False),
  ("(2/3 n h) d -> n h d", (18, 5), (2, 3, 5), lambda x: x[12:].reshape(2, 3, 5), True),
  ("0/2 k d h -> k h d", (2, 2, 5, 3), (2, 3, 5), lambda x: x[0].swapaxes(1, 2), False),
  ("0/2 k h d -> k h d", (2, 2, 3, 5), (2, 3, 5), lambda x: x[0], True),
  ("1/2 k h d -> k h d", (2, 2, 3, 5), (2, 3, 5), lambda x: x[1], True),
  ("(n h) d", (6, 5), (6, 5), lambda x: x, True),
  ("d (n h)", (5, 6), (5, 6), lambda x: x, True),
  ("(a b) d -> d (a b)", (8, 5), (5, 8), lambda x: x.T, False),
  ("n d h -> (n h) d", (2, 5, 3), (6, 5), lambda x: x.swapaxes(1, 2).reshape(6, 5), False),
  ("n h d -> d (n h)", (2, 3, 5), (5, 6), lambda x: x.reshape(6, 5).T, False),
  ("1/2 k d h -> (k h) d", (2, 1, 5, 3), (3, 5), lambda x: x[1, 0].T, False),
  ("(n p 2) d -> (n 2 p) d", (12, 5), (12, 5), lambda x: x.reshape(2, 3, 2, 5).swapaxes(1, 2).reshape(12, 5), False),
  ("1/2 2/3 v d -> v d", (2, 3, 4, 5), (4, 5), lambda x: x[1, 2], True),
]  # fmt: skip


@pytest.mark.parametrize(
  ("layout", "theirs", "ours", "reference", "run"), LAYOUTS, ids=lambda value: str(value)[:30]
)
def test_a_layout_is_what_reshape_slice_and_transpose_say(layout, theirs, ours, reference, run):
  x = np.arange(np.prod(theirs, dtype=int), dtype=np.float64).reshape(theirs)
  expected = reference(x)
  assert expected.shape == ours
  np.testing.assert_array_equal(assemble(layout, {"w": x}, ours), expected)


@pytest.mark.parametrize(
  ("layout", "theirs", "ours", "reference", "run"), LAYOUTS, ids=lambda value: str(value)[:30]
)
def test_a_run_starts_where_the_parameters_elements_lie(layout, theirs, ours, reference, run):
  row = WeightTable(("ours", "w", layout)).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, ours, HEADS)
  assert (piece.run is not None) == run
  if run:
    x = np.arange(np.prod(theirs, dtype=int), dtype=np.float64).reshape(theirs)
    elements = x.reshape(-1)[piece.run : piece.run + np.prod(ours, dtype=int)]
    np.testing.assert_array_equal(elements.reshape(ours), reference(x))


@pytest.mark.parametrize(
  ("name", "layout", "shape", "axis"),
  [
    ("experts.{e}.w", "f d -> e f d", (3, 4, 5), 0),
    ("experts.{e}.w", "f d -> f e d", (4, 3, 5), 1),
    ("experts.{e}.w", "d f -> f d e", (4, 5, 3), 2),
    ("experts.{e}.s", "-> e", (3,), 0),
  ],
)
def test_a_placeholder_that_only_the_checkpoint_has_is_a_stacked_axis(name, layout, shape, axis, rng):
  theirs = layout.partition("->")[0].split()
  sizes = dict(zip(layout.partition("->")[2].split(), shape, strict=True))
  tensors = {name.format(e=e): rng.normal(size=[sizes[axis] for axis in theirs]) for e in range(3)}
  flip = theirs == ["d", "f"]
  expected = np.stack([x.T if flip else x for x in tensors.values()], axis=axis)
  np.testing.assert_array_equal(assemble(layout, tensors, shape, name=name), expected)


def test_two_stacked_axes_and_a_shared_number_fill_their_own_places(rng):
  tensors = {
    f"blocks.7.layers.{i}.experts.{e}.w": rng.normal(size=(4, 5)) for i in range(2) for e in range(3)
  }
  name, placeholders = "blocks.{b}.layers.{l}.experts.{e}.w", {"b": "7"}
  out = assemble("f d -> l e f d", tensors, (2, 3, 4, 5), name=name, placeholders=placeholders)
  np.testing.assert_array_equal(out, np.stack(list(tensors.values())).reshape(2, 3, 4, 5))


def test_values_are_applied_after_the_layout_and_make_no_run(rng):
  x = rng.normal(size=(5, 4))
  row = WeightTable(("ours", "w", "f d", Conversion(lambda x: x - 1, lambda x: x + 1))).rows[0]
  (piece,) = pieces(row, row.forms[0], {}, (5, 4))
  assert piece.run is None
  # The function sees the parameter's axes, not the tensor's.
  scale = np.arange(4.0)[:, None]
  out = assemble("d f -> f d", {"w": x}, (4, 5), values=Conversion(lambda w: w * scale, lambda w: w / scale))
  np.testing.assert_array_equal(out, x.T * scale)


@pytest.mark.parametrize(
  ("name", "found"),
  [
    ("layers.0.w", {"i": "0"}),
    ("layers.10.w", {"i": "10"}),
    ("layers.01.w", None),
    ("layers.1x.w", None),
    ("layers.-1.w", None),
    ("layers..w", None),
    ("layers.\u0661.w", None),
    ("layers.1.w.bias", None),
    ("model.layers.1.w", None),
    ("layersX1Xw", None),
    ("layers.1.w\n", None),
  ],
)
def test_a_placeholder_is_a_whole_number_and_names_match_as_a_whole(name, found):
  row = WeightTable(("layers.{i}.w", "x", "d")).rows[0]
  assert row.match(name) == found
  assert matches("layers.{i}.w", name) == (found is not None)


@pytest.mark.parametrize(
  ("layout", "shape", "message"),
  [
    ("f d", (4,), "has 2 axes, but the parameter has shape"),
    ("f d -> e f d", (3, 4, 5), "different axes on its two sides"),
    ("e f d -> f d", (4, 5), "different axes on its two sides"),
    ("1 d -> d", (5,), "different axes on its two sides"),
    ("(n h 2) d -> n (2 h) d", (2, 5, 5), "cannot split an axis of size 5"),
    ("a b -> (a b)", (6,), "does not tell the sizes of a and b"),
    ("n d h -> (n h) d", (12, 5), "cannot split an axis of size 12"),
    ("d d", (4, 5), "cannot split an axis of size 5"),
    ("(2/2 f) d -> f d", (4, 5), "parts are counted from 0"),
  ],
)
def test_a_layout_that_does_not_fit_is_a_fault_of_the_table(layout, shape, message):
  row = WeightTable(("ours", "w", layout)).rows[0]
  with pytest.raises(ValueError, match=message):
    pieces(row, row.forms[0], {}, shape, HEADS)


@pytest.mark.parametrize(
  "row", [("ours",), ("ours", "theirs"), ("ours", "theirs", "d", "values"), (1, "theirs", "d")]
)
def test_a_row_of_another_form_is_refused_and_shown(row):
  with pytest.raises(TypeError, match="a row is"):
    WeightTable(row)


def test_a_row_may_list_alternatives():
  forms = (Form("split.{e}.w", "f d -> e f d"), Form("fused", "e (0/2 f) d -> e f d"))
  (row,) = WeightTable(("ours", forms)).rows
  assert row.forms == forms
  assert [p.tensor for p in pieces(row, forms[0], {}, (2, 4, 5))] == ["split.0.w", "split.1.w"]
  assert [p.shape for p in pieces(row, forms[1], {}, (2, 4, 5))] == [(2, 8, 5)]
