"""Models whose checkpoints hold all layers in one tensor: on every mesh, converted, in part, and in several layouts."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models_core.errors import CheckpointError
from models_core.formats.files import LocalFiles
from models_core.formats.safetensors import read_safetensors
from models_core.loading import boxes
from models_core.loading.abstract import abstract_model
from models_core.loading.loader import load_arrays
from models_core.loading.plan import plan_load
from models_core.saving.plan import plan_save
from models_core.testing import MESHES
from models_core.weights.layout import arrange, pieces
from models_core.weights.table import Conversion, Form, WeightTable

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS, D, F, N, H = 3, 8, 12, 4, 2
UP, QUERY, NORM = "up", "query", "norm"
TABLE = WeightTable(
  ("layers.{i}.up", UP, "d i/l f -> f d"),
  ("layers.{i}.q", QUERY, "d i/l n h -> (n h) d"),
  ("layers.{i}.norm", NORM, "d i/l -> d"),
)
PARAMETERS = {
  f"layers.{i}.{name}": declared
  for i in range(LAYERS)
  for name, declared in {
    "up": ((F, D), P("tp", "fsdp")), "q": ((N * H, D), P("tp", "fsdp")), "norm": ((D,), P()),
  }.items()
}  # fmt: skip


def random(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(BF16)


TENSORS = {UP: random(D, LAYERS, F), QUERY: random(D, LAYERS, N, H), NORM: random(D, LAYERS)}


@pytest.fixture
def load(toy, save_sharded):
  def run(table, parameters=PARAMETERS, tensors=TENSORS, mesh=None, **sizes):
    checkpoint = read_safetensors(LocalFiles(str(save_sharded({"model.safetensors": tensors}))))
    model = abstract_model(toy, parameters, mesh)
    model = dataclasses.replace(model, letters={"n": N, "h": H, "l": LAYERS} | sizes)
    return load_arrays(plan_load(checkpoint, model, table))

  return run


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_every_layer_on_every_mesh(load, mesh):
  arrays = load(TABLE, mesh=mesh and MESHES[mesh]())
  for i in range(LAYERS):
    np.testing.assert_array_equal(arrays[f"layers.{i}.up"], TENSORS[UP][:, i].T)
    np.testing.assert_array_equal(arrays[f"layers.{i}.q"], TENSORS[QUERY][:, i].reshape(D, N * H).T)
    np.testing.assert_array_equal(arrays[f"layers.{i}.norm"], TENSORS[NORM][:, i])


def test_a_converted_layer(load):
  negative = Conversion(load=lambda x: -x, save=lambda w: -w)
  arrays = load(WeightTable(*TABLE.rows[1:], ("layers.{i}.up", UP, "d i/l f -> f d", negative)))
  for i in range(LAYERS):
    np.testing.assert_array_equal(arrays[f"layers.{i}.up"], -TENSORS[UP][:, i].T)


# layout, shape of the tensor, of the parameter, and the box that holds all of it
TAKEN = [
  ("d i/l f -> f d", (D, LAYERS, F), (F, D), np.s_[0:D, 1:2, 0:F]),
  ("i/l d -> d", (LAYERS, D), (D,), np.s_[1:2, 0:D]),
  ("d (1/3 f) -> f d", (D, 3 * F), (F, D), np.s_[0:D, F : 2 * F]),
  ("d (f 1/3) -> f d", (D, F * 3), (F, D), np.s_[0:D, 0 : F * 3]),
  ("d f -> f d", (D, F), (F, D), np.s_[0:D, 0:F]),
]


@pytest.mark.parametrize(("layout", "theirs", "ours", "expected"), TAKEN, ids=lambda value: str(value)[:20])
def test_the_box_of_a_tensor_that_a_piece_takes(layout, theirs, ours, expected):
  row = WeightTable(("layers.{i}.w", "w", layout)).rows[0]
  (piece,) = pieces(row, row.forms[0], {"i": "1"}, ours, {"l": LAYERS})
  x = random(*theirs)
  box, within = boxes.taken(piece)
  assert box == expected
  np.testing.assert_array_equal(arrange(x[box], within, ours), arrange(x, piece, ours))


def test_the_first_layers_of_a_tensor_that_holds_more(load):
  first = {name: declared for name, declared in PARAMETERS.items() if not name.startswith("layers.2.")}
  arrays = load(TABLE, first)
  assert arrays.keys() == first.keys()
  np.testing.assert_array_equal(arrays["layers.1.up"], TENSORS[UP][:, 1].T)


def test_another_number_of_layers(load):
  with pytest.raises(
    CheckpointError, match=r"up has shape \(8, 3, 12\), but .* \(12, 8\) needs \(8, 4, 12\)"
  ):
    load(TABLE, l=4)


class Config(dict):
  """Parameters of a toy model, and whether its heads are interleaved."""

  pairs = False


HEADS = [Form(QUERY, "d i/l n h -> (n h) d", lambda c: not c.pairs), Form(QUERY, "d i/l n (p 2) -> (n 2 p) d", lambda c: c.pairs)]  # fmt: skip
TWO_LAYOUTS = WeightTable(TABLE.rows[0], TABLE.rows[2], ("layers.{i}.q", HEADS))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_configuration_decides_between_layouts_of_one_shape(load, pairs):
  config = Config(PARAMETERS)
  config.pairs = pairs
  tensors = TENSORS | {QUERY: random(D, LAYERS, N, 4)}
  config |= {f"layers.{i}.q": ((N * 4, D), P()) for i in range(LAYERS)}
  q = load(TWO_LAYOUTS, config, tensors, h=4)["layers.1.q"]
  stored = tensors[QUERY][:, 1]
  halves = np.concatenate([stored[..., ::2], stored[..., 1::2]], axis=-1) if pairs else stored
  np.testing.assert_array_equal(q, halves.reshape(D, N * 4).T)


def test_without_a_decision_they_are_ambiguous(load):
  undecided = [dataclasses.replace(form, when=None) for form in HEADS]
  with pytest.raises(CheckpointError, match=r"query .* is ambiguous: its shape fits more than one layout"):
    load(WeightTable(TABLE.rows[0], TABLE.rows[2], ("layers.{i}.q", undecided)))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_configuration_decides_on_saving_over_such_a_base(save_sharded, pairs):
  config = dataclasses.make_dataclass("Config", ["num_layers", "num_heads", "head_dim", "pairs"])
  base = read_safetensors(LocalFiles(str(save_sharded({"model.safetensors": TENSORS}))))
  parameters = {name: np.empty(shape, BF16) for name, (shape, _) in PARAMETERS.items()}
  planned = plan_save(parameters, TWO_LAYOUTS, config=config(LAYERS, N, H, pairs), base=base)
  (query,) = (tensor for tensor in planned if tensor.name == QUERY)
  assert {len(piece.split) for _, piece in query.parts} == {5 if pairs else 4}
