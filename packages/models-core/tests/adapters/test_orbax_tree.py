"""LoRA factors in Orbax trees: of the model itself, in another naming scheme with fused tensors, and what is refused."""

import dataclasses

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from models_core.adapters import adapter_of, load_orbax_adapter
from models_core.errors import AdapterError, CheckpointError
from models_core.layers import dotted
from models_core.weights import WeightTable

from .tiny import ALPHA, CONFIG, FAMILY, RANK, D, E, F, H, N, V, adapted

L = "layers.{i}"


@dataclasses.dataclass(frozen=True)
class Heads(type(CONFIG)):
  num_heads: int = N
  head_dim: int = H


# Matrices [in, out], heads as axes of their own, and one tensor for two parameters.
THEIRS = dataclasses.replace(
  FAMILY,
  weights={
    **FAMILY.weights,
    "tunix": WeightTable(
      ("embed.w", "table", "d v -> v d"),
      (f"{L}.norm.w", f"{L}.scale", "d"),
      (f"{L}.q.w", f"{L}.q.w", "n d h -> (n h) d"),
      (f"{L}.o.w", f"{L}.o.w", "n h d -> d (n h)"),
      (f"{L}.experts.gate", f"{L}.gate_up", "e d 0/2 f -> e f d"),
      (f"{L}.experts.up", f"{L}.gate_up", "e d 1/2 f -> e f d"),
      (f"{L}.experts.down", f"{L}.down", "e f d -> e d f"),
    ),
  },
)


def nested(flat):
  tree = {}
  for name, array in flat.items():
    *path, leaf = name.split(".")
    place = tree
    for key in path:
      place = place.setdefault(key, {})
    place[leaf] = array
  return tree


def save(directory, state):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "tree", state)
  return directory / "tree"


def assert_same(found, expected):
  assert (found.alpha, found.rank) == (expected.alpha, expected.rank)
  assert found.factors.keys() == expected.factors.keys()
  for name, factors in expected.factors.items():
    np.testing.assert_array_equal(found.factors[name].a, factors.a, err_msg=name)
    np.testing.assert_array_equal(found.factors[name].b, factors.b, err_msg=name)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [nnx.LoRAParam, nnx.Param])
def test_what_a_trainer_saves_of_the_model(tmp_path, kind, shared):
  """A LoRAParam is a Param: of the two states, one holds the factors alone and the other all parameters."""
  model = adapted(shared=shared)
  expected = adapter_of(model, alpha=ALPHA)
  variables = nnx.state(model, kind)
  arrays = nested({dotted(path): v.get_value() for path, v in nnx.to_flat_state(variables)})
  for number, state in enumerate((variables, arrays)):
    tree = save(tmp_path / str(number), state)
    assert_same(load_orbax_adapter(tree, FAMILY, CONFIG, alpha=ALPHA), expected)


def factors_of_theirs(rng):
  """Factors of the tensors of layer 0 in `THEIRS`: what they contract is in a, all other axes are in b."""
  shapes = {
    "q.w_lora_a": (D, RANK),
    "q.w_lora_b": (RANK, N, H),
    "o.w_lora_a": (N, H, RANK),
    "o.w_lora_b": (RANK, D),
    "gate_up_lora_a": (E, D, RANK),
    "gate_up_lora_b": (E, RANK, 2, F),
    "down_lora_a": (E, F, RANK),
    "down_lora_b": (E, RANK, D),
  }
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_factors_in_another_naming_scheme(tmp_path):
  theirs = factors_of_theirs(np.random.default_rng(0))
  tree = save(tmp_path, nested({f"layers.0.{name}": array for name, array in theirs.items()}))
  adapter = load_orbax_adapter(tree, THEIRS, Heads(), alpha=ALPHA)

  def change(name):
    factors = adapter.factors[f"layers.0.{name}"]
    return np.einsum("...ir,...ro->...oi", factors.a, factors.b)

  a, b = (
    {n.removesuffix(side): w for n, w in theirs.items() if n.endswith(side)}
    for side in ("_lora_a", "_lora_b")
  )
  product = lambda equation, name: np.einsum(equation, a[name], b[name])
  np.testing.assert_allclose(change("q.w"), product("dr,rnh->nhd", "q.w").reshape(N * H, D), rtol=1e-5)
  np.testing.assert_allclose(change("o.w"), product("nhr,rd->dnh", "o.w").reshape(D, N * H), rtol=1e-5)
  for part, name in enumerate(("gate", "up")):
    np.testing.assert_allclose(
      change(f"experts.{name}"), product("edr,erpf->pefd", "gate_up")[part], rtol=1e-5, atol=1e-6
    )
  np.testing.assert_allclose(change("experts.down"), product("efr,erd->edf", "down"), rtol=1e-5, atol=1e-6)


def test_shapes_decide_if_the_names_are_those_of_several_naming_schemes(tmp_path):
  model = adapted(names=["layers.0.q.w", "layers.1.o.w"])
  tree = save(tmp_path, nnx.state(model, nnx.LoRAParam))
  assert_same(load_orbax_adapter(tree, THEIRS, Heads(), alpha=ALPHA), adapter_of(model, alpha=ALPHA))


REFUSED = {
  "one of a pair": ({"layers.0.q.w_lora_a": (D, RANK)}, r"tree: layers\.0\.q\.w_lora_b is missing"),
  "a foreign name": ({"layers.0.v.w_lora_a": (D, RANK)}, r"no matrix that these factors fit: layers\.0\.v\.w_lora_a"),
  "a vector": (
    {"layers.0.norm.w_lora_a": (D, RANK), "layers.0.norm.w_lora_b": (RANK, D)},
    r"norm\.w is not a matrix",
  ),
  "another shape": (
    {"embed.w_lora_a": (D, RANK), "embed.w_lora_b": (RANK, V + 1)},
    r"embed\.w_lora_b has shape \(2, 13\), but the model needs \(2, 12\)",
  ),
  "two ranks": (
    {
      "embed.w_lora_a": (D, 2), "embed.w_lora_b": (2, V),
      "layers.0.q.w_lora_a": (D, 3), "layers.0.q.w_lora_b": (3, N * H),
    },
    r"one rank, but they have the ranks \[2, 3\]",
  ),
  "no factors": ({"embed.w": (V, D)}, "holds no LoRA factors, whose names end in _lora_a and _lora_b"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused(tmp_path, why):
  shapes, message = REFUSED[why]
  tree = save(tmp_path, nested({name: np.ones(shape, np.float32) for name, shape in shapes.items()}))
  with pytest.raises(AdapterError, match=message):
    load_orbax_adapter(tree, FAMILY, CONFIG, alpha=ALPHA)


def test_a_broken_tree(tmp_path):
  tree = tmp_path / "tree"
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(
    tree, {"embed": {"w_lora_a": np.ones((D, RANK)), "w_lora_b": np.ones((RANK, V))}}
  )
  (tree / "embed.w_lora_b" / "0.0").unlink()
  with pytest.raises(CheckpointError, match=r"embed\.w_lora_b is incomplete"):
    load_orbax_adapter(tree, FAMILY, CONFIG, alpha=ALPHA)
