"""Which alternatives of a pattern match no module, and what may be meant."""

import jax.numpy as jnp
import pytest
from flax import nnx

from models_core.adapters import match_modules, unmatched
from models_core.adapters.patterns import _alternatives
from models_core.errors import AdapterError
from models_core.loading import abstract_model

SHAPES = {
  "embedder": (8, 4),
  "layers/0/attn/q_proj": (4, 4),
  "layers/0/attn/k_proj": (4, 4),
  "layers/0/attn/v_proj": (4, 4),
  "layers/0/attn/o_proj": (4, 4),
  "layers/0/attn/q_norm": (4,),
  "layers/0/mlp/up_proj": (6, 4),
  "layers/1/mlp/experts": (3, 6, 4),
  "lm_head": (8, 4),
}
MATRICES = sorted(path for path, shape in SHAPES.items() if len(shape) > 1)


class Model(nnx.Module):
  """A module for each path, with one parameter."""

  def __init__(self, config=None, *, rngs=None):
    for path, shape in SHAPES.items():
      here = self
      *steps, last = path.split("/")
      for step in steps:
        if not hasattr(here, step):
          setattr(here, step, nnx.Module())
        here = getattr(here, step)
      setattr(here, last, nnx.Module())
      getattr(here, last).w = nnx.Param(jnp.zeros(shape))


@pytest.fixture(scope="module")
def model():
  return Model()


def test_modules_with_a_matrix_match(model):
  assert match_modules(model, ".*") == MATRICES
  assert match_modules(model, ".*q_proj|.*head") == ["layers/0/attn/q_proj", "lm_head"]
  assert match_modules(model, "q_proj") == []
  assert unmatched(model, ".*") == {}


def test_factors_add_no_modules(model):
  adapted = Model()
  adapted.lm_head.w_lora_a = nnx.LoRAParam(jnp.zeros((4, 2)))
  assert match_modules(adapted, ".*") == MATRICES


def test_an_abstract_model_will_do():
  structure = abstract_model(Model, None)
  assert match_modules(nnx.merge(structure._graphdef, structure._state), ".*q_proj") == [
    "layers/0/attn/q_proj"
  ]


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    (".*q_proj|.*up_proj", {}),
    (".*q_einsum|.*up_proj", {".*q_einsum": (".*q_proj",)}),
    (".*kv_einsum", {".*kv_einsum": (".*k_proj", ".*v_proj")}),
    (".*attn_vec_einsum", {".*attn_vec_einsum": (".*o_proj",)}),
    (
      "layers/0/attn/qkv_einsum",
      {"layers/0/attn/qkv_einsum": tuple(f"layers/0/attn/{x}_proj" for x in "qkv")},
    ),
    (".*self_attn/q_proj", {".*self_attn/q_proj": (".*attn/q_proj",)}),
    # The whole path must match.
    ("q_proj", {"q_proj": (".*q_proj",)}),
    (r"layers\.0\.attn\.q_proj", {r"layers\.0\.attn\.q_proj": ("layers/0/attn/q_proj",)}),
    # Modules around those that hold matrices.
    (".*attn", {".*attn": (".*attn/.*",)}),
    # Slips of the pen.
    (".*uq_proj", {".*uq_proj": (".*up_proj", ".*q_proj")}),
    (r"layers/\d+/atn/q_proj", {r"layers/\d+/atn/q_proj": (r"layers/\d+/attn/q_proj",)}),
    (".*gate_proj|.*mlp/up_proj", {".*gate_proj": (".*experts",)}),
    # Nothing is close; norms hold no matrix.
    (".*w1|.*w2", {".*w1": (), ".*w2": ()}),
    ("layers/7/attn/q_proj", {"layers/7/attn/q_proj": ()}),
    (".*q_norm|.*experts", {".*q_norm": ()}),
    ("", {"": (".*",)}),
  ],
)
def test_each_alternative_is_judged_alone(model, pattern, expected):
  found = unmatched(model, pattern)
  assert found.keys() == expected.keys()
  assert {one: set(near) for one, near in found.items()} == {one: set(near) for one, near in expected.items()}
  for near in found.values():
    assert all(match_modules(model, one) for one in near)


@pytest.mark.parametrize(
  ("pattern", "alternatives"),
  [
    ("a|b|c", ["a", "b", "c"]),
    (".*(q|k)_proj|x", [".*q_proj", ".*k_proj", "x"]),
    (".*(?:q|k)(_a|_b)", [".*q_a", ".*q_b", ".*k_a", ".*k_b"]),
    ("(a|b(c|d))e", ["ae", "bce", "bde"]),
    ("((a|b))", ["a", "b"]),
    ("(ab)c", ["(ab)c"]),
    # Repeated and special groups stay.
    ("(a|b)+c", ["(a|b)+c"]),
    ("x(?!a|b).*", ["x(?!a|b).*"]),
    (r"(a|b)\1", [r"(a|b)\1"]),
    ("(?P<one>a|b)c|d", ["(?P<one>a|b)c", "d"]),
    ("(?i)A|b", ["(?i)A", "(?i)b"]),
    # Neither a bar nor a parenthesis.
    (r"a\|b|c", [r"a\|b", "c"]),
    (r"[a|(]b|c", [r"[a|(]b", "c"]),
    (r"[]|]b|[^]|]|\[c", [r"[]|]b", "[^]|]", r"\[c"]),
    ("a||a", ["a", ""]),
  ],
)
def test_a_pattern_is_split_where_a_regular_expression_is(pattern, alternatives):
  assert _alternatives(pattern) == alternatives


@pytest.mark.parametrize("ask", [match_modules, unmatched])
def test_a_broken_pattern_is_named(model, ask):
  with pytest.raises(AdapterError, match=r"the pattern '\(a' is not a regular expression: missing \)"):
    ask(model, "(a")
