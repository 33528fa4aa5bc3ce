"""Mappings for samplers: what follows from layouts, and what a model answers to tunix."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.errors import ConfigError
from models_core.layers import CausalLM
from models_core.rollout import SGLANG, SGLANG_EXPERTS, VLLM, VLLM_FLAX, Backend, backend_mappings
from models_core.weights import Form, WeightTable

L, M = "layers.{i}", "model.layers.{i}"
TABLE = WeightTable(
  ("embed.w", "model.embed_tokens.weight", "v d"),
  (f"{L}.norm.w", f"{M}.norm.weight", "d"),
  (f"{L}.attn.q_proj.w", f"{M}.attn.q_proj.weight", "(n h) d"),
  (f"{L}.attn.q_proj.b", f"{M}.attn.q_proj.bias", "(n h)"),
  (f"{L}.attn.o_proj.w", f"{M}.attn.o_proj.weight", "d (n h)"),
  (f"{L}.attn.k_proj.w", f"{M}.attn.k_proj.weight", "(k h) d"),
  (f"{L}.mlp.down_proj.w", f"{M}.mlp.down_proj.weight", "d f"),
  (
    f"{L}.experts.up",
    [Form(f"{M}.mlp.experts.{{e}}.up_proj.weight", "f d -> e f d"), Form("other", "e f d")],
  ),
  ("lm_head.w", "lm_head.weight", "v d"),
)
MAPPINGS = backend_mappings(TABLE, sglang_jax=SGLANG_EXPERTS)


@dataclasses.dataclass(frozen=True)
class Config:
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 3


class Model(CausalLM):
  BACKEND_MAPPINGS = MAPPINGS

  def __init__(self, experts=True):
    self.config = Config()
    self.embed = nnx.Dict(w=nnx.Param(jnp.zeros((8, 5))))
    if experts:
      self.layers = nnx.List([nnx.Dict(experts=nnx.Dict(up=nnx.Param(jnp.zeros((2, 4, 5)))))])

  def _rotary(self, window):
    raise NotImplementedError

  def _logits(self, hidden):
    raise NotImplementedError


@pytest.mark.parametrize(
  ("parameter", "vllm", "sglang"),
  [
    (
      "embed.w",
      ("model.embed_tokens.weight", ("model", None)),
      ("model.embed_tokens.embedding", ("tensor", None)),
    ),
    ("layers.*.norm.w", ("model.layers.*.norm.weight", (None,)), ("model.layers.*.norm.scale", (None,))),
    (
      "layers.*.attn.q_proj.w",
      ("model.layers.*.attn.q_proj.weight", (None, "model", None)),
      ("model.layers.*.attn.q_proj.weight", (None, "tensor")),
    ),
    (
      "layers.*.attn.q_proj.b",
      ("model.layers.*.attn.q_proj.bias", ("model", None)),
      ("model.layers.*.attn.q_proj.bias", ("tensor",)),
    ),
    (
      "layers.*.attn.o_proj.w",
      ("model.layers.*.attn.o_proj.weight", ("model", None, None)),
      ("model.layers.*.attn.o_proj.weight", ("tensor", None)),
    ),
    (
      "layers.*.mlp.down_proj.w",
      ("model.layers.*.mlp.down_proj.weight", ("model", None)),
      ("model.layers.*.mlp.down_proj.weight", ("tensor", None)),
    ),
    ("layers.*.experts.up", None, ("model.layers.*.mlp.wi_1", ("expert", None, "tensor"))),
    ("lm_head.w", ("lm_head.weight", (None, "model")), ("lm_head.embedding", ("tensor", None))),
  ],
)
def test_names_and_mesh_axes_follow_from_the_layout(parameter, vllm, sglang):
  for backend, expected in (("vllm_jax", vllm), ("sglang_jax", sglang)):
    assert MAPPINGS[backend]["to_hf_mappings"].get(parameter) == expected


def test_matrices_are_transposed_unless_they_are_kept():
  matrices = {
    f"layers.*.{name}.w": (1, 0) for name in ("attn.q_proj", "attn.o_proj", "attn.k_proj", "mlp.down_proj")
  }
  assert MAPPINGS["vllm_jax"]["to_hf_transpose_keys"] == matrices | {"lm_head.w": (1, 0)}
  of_weights = {k: v for k, v in MAPPINGS["sglang_jax"]["to_hf_transpose_keys"].items() if "lora" not in k}
  assert of_weights == matrices | {"layers.*.experts.up": (0, 2, 1)}


def test_factors_have_places_beside_their_matrices():
  vllm, sglang = (MAPPINGS[backend] for backend in ("vllm_jax", "sglang_jax"))
  assert vllm["lora_to_hf_mappings"]["layers.*.attn.o_proj.w_lora_a"] == (
    "model.layers.*.attn.o_proj.weight_lora_a",
    ("model", None),
  )
  assert sglang["lora_to_hf_mappings"]["layers.*.attn.q_proj.w_lora_b"] == (
    "model.layers.*.attn.q_proj.B_buffer",
    (None, "tensor", None),
  )
  assert len(vllm["lora_to_hf_mappings"]) == len(sglang["lora_to_hf_mappings"]) == 8
  assert vllm["lora_to_hf_transpose_keys"] == {}
  assert set(sglang["lora_to_hf_transpose_keys"].values()) == {(0, 2, 1)}


def test_the_names_of_flax():
  names = backend_mappings(TABLE, vllm_jax=VLLM_FLAX)["vllm_jax"]["to_hf_mappings"]
  assert [names[key][0] for key in ("embed.w", "layers.*.norm.w", "layers.*.attn.q_proj.w", "lm_head.w")] == [
    "model.embed.embedding",
    "model.layers.*.norm.scale",
    "model.layers.*.attn.q_proj.kernel",
    "model.lm_head",
  ]


def test_alternatives_become_a_regular_expression():
  backend = dataclasses.replace(SGLANG, names=(("attn.o_proj.weight", "attn.(?:o|c)_proj.weight"),))
  names = backend_mappings(TABLE, sglang_jax=backend)["sglang_jax"]["to_hf_mappings"]
  assert names["layers.*.attn.o_proj.w"][0] == r"model\.layers\.(\d+)\.attn\.(?:o|c)_proj\.weight"
  assert Backend("model", has_heads=True) == VLLM


class TestModel:
  def test_hooks_split_heads_after_the_transposition(self):
    hooks = Model().to_hf_hook_fns()
    assert hooks.keys() == {
      f"layers.{i}.attn.{name}" for i in range(2) for name in ("q_proj.w", "q_proj.b", "k_proj.w", "o_proj.w")
    }
    x = np.arange(60).reshape(5, 12)
    np.testing.assert_array_equal(hooks["layers.1.attn.q_proj.w"](x), x.reshape(5, 4, 3))
    np.testing.assert_array_equal(hooks["layers.1.attn.o_proj.w"](x.T), x.T.reshape(4, 3, 5))
    np.testing.assert_array_equal(hooks["layers.0.attn.k_proj.w"](x[:, :6]), x[:, :6].reshape(5, 2, 3))
    np.testing.assert_array_equal(hooks["layers.0.attn.q_proj.b"](x[0]), x[0].reshape(4, 3))
    assert Model().to_hf_hook_fns("sglang_jax") == {}

  def test_answers_may_be_changed(self):
    """The samplers add those of LoRA in place."""
    model = Model()
    for backend in MAPPINGS:
      for method in (
        "to_hf_transpose_keys",
        "lora_to_hf_mappings",
        "lora_to_hf_transpose_keys",
        "to_hf_hook_fns",
      ):
        getattr(model, method)(backend)["other"] = None
        assert "other" not in getattr(model, method)(backend)
    model.to_hf_mappings("sglang_jax").clear()
    assert model.to_hf_mappings("sglang_jax")

  def test_what_has_no_place_is_an_error(self):
    assert "embed.w" in Model(experts=False).to_hf_mappings()
    with pytest.raises(
      ConfigError, match=r"vllm_jax have no place for layers\.0\.experts\.up: hand the weights over"
    ):
      Model().to_hf_mappings()

  def test_factors_need_no_place_of_their_own(self):
    model = Model(experts=False)
    model.embed.w_lora_a = nnx.LoRAParam(jnp.zeros((8, 2)))
    assert model.to_hf_mappings("vllm_jax") == MAPPINGS["vllm_jax"]["to_hf_mappings"]

  def test_backends_that_nobody_described(self):
    with pytest.raises(
      ConfigError, match="Model has no mapping for the backend 'other', only for vllm_jax, sglang_jax"
    ):
      Model().to_hf_transpose_keys("other")

    class Bare(Model):
      BACKEND_MAPPINGS = CausalLM.BACKEND_MAPPINGS

    with pytest.raises(ConfigError, match="Bare has no mapping for the backend 'vllm_jax', only for none"):
      Bare().to_hf_mappings()
