"""Adapters of Qwen's own matrices: core tests what is the same for all families."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.adapters import (
  Adapter,
  adapter_of,
  load_peft_adapter,
  merge_into,
  merge_lora,
  save_peft_adapter,
)
from models_core.dummy_model_creator import create_dummy_model
from models_core.layers import dotted
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.testing import write_checkpoint
from models_qwen.qwen3.model import ModelConfig
from models_qwen.qwen3.params import (
  FAMILY,
  create_model_from_safe_tensors,
  save_lora_merged_model_as_safetensors,
)

RANK, ALPHA = 2, 3.0
# One layer of experts, one without.
CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=67,
  embed_dim=48,
  hidden_dim=60,
  num_heads=6,
  head_dim=10,
  num_kv_heads=3,
  rope_theta=700.0,
  norm_eps=1e-3,
  num_experts=6,
  num_experts_per_tok=2,
  moe_hidden_dim=20,
  norm_topk_prob=False,
  decoder_sparse_step=1,
  mlp_only_layers=(1,),
)

# Of the tiny model: einsum of the change, and the letters of both factors.
EQUATIONS = {
  "q_proj.w": ("dr", "rn", "nd"),
  "o_proj.w": ("nr", "rd", "dn"),
  "k_proj.w": ("dr", "rk", "kd"),
  "up_proj.w": ("dr", "rf", "fd"),
  "experts.gate_proj": ("edr", "erf", "efd"),
  "experts.down_proj": ("efr", "erd", "edf"),
}


def parameters(model):
  return {
    dotted(path): v
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    if not isinstance(v, nnx.LoRAParam)
  }


def module_of(model, name):
  for part in name.split(".")[:-1]:
    model = model[int(part)] if part.isdigit() else getattr(model, part)
  return model


def changed(names):
  return {name: e for name in names for end, e in EQUATIONS.items() if name.endswith(end)}


def adapted(dtype="float32", factor_dtype=None):
  """A model with factors beside its projections and its experts."""
  model = create_dummy_model(FAMILY.model_class, CONFIG, dtype=dtype, scale=0.3)
  rng = np.random.default_rng(0)
  for name, (a, b, w) in changed(parameters(model)).items():
    sizes = dict(zip(w, parameters(model)[name].get_value().shape, strict=True)) | {"r": RANK}
    for side, axes in (("_lora_a", a), ("_lora_b", b)):
      value = rng.normal(size=[sizes[axis] for axis in axes]) * 0.3
      setattr(
        module_of(model, name),
        name.split(".")[-1] + side,
        nnx.LoRAParam(jnp.asarray(value, factor_dtype or dtype)),
      )
  return model


def test_every_matrix_is_changed_by_its_factors():
  model = adapted()
  merged, before = parameters(merge_lora(model, FAMILY, alpha=ALPHA)), parameters(model)
  names = changed(before)
  assert len(names) == 3 * 2 + 1 + 2
  for name, variable in before.items():
    old, new = (np.asarray(v.get_value()) for v in (variable, merged[name]))
    if name not in names:
      np.testing.assert_array_equal(new, old)
      continue
    a, b, w = names[name]
    module, leaf = module_of(model, name), name.split(".")[-1]
    factors = (getattr(module, leaf + side)[...] for side in ("_lora_a", "_lora_b"))
    change = ALPHA / RANK * np.einsum(f"{a},{b}->{w}", *factors)
    assert np.abs(change).max() > 0.05
    np.testing.assert_allclose(new, old + change, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_peft_s_files_is_merged_into_a_model_where_it_lies(tmp_path):
  lora_model = adapted()
  expected = parameters(merge_lora(lora_model, FAMILY, alpha=ALPHA))
  mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4])
  model = create_dummy_model(FAMILY.model_class, CONFIG, mesh, scale=0.3)
  save_peft_adapter(adapter_of(lora_model, alpha=ALPHA), tmp_path / "adapter", FAMILY, CONFIG)
  adapter = load_peft_adapter(tmp_path / "adapter", FAMILY, CONFIG)
  before, merged = parameters(model), parameters(merge_into(model, adapter, FAMILY))
  assert merged.keys() == expected.keys()
  for name, variable in merged.items():
    np.testing.assert_allclose(variable.get_value(), expected[name].get_value(), rtol=1e-6, atol=1e-6)
    assert variable.get_value().sharding == before[name].get_value().sharding


def test_a_checkpoint_in_bfloat16_takes_float32_factors(tmp_path):
  model = adapted("bfloat16", factor_dtype="float32")
  write_checkpoint(
    tmp_path, FAMILY, CONFIG, create_dummy_model(FAMILY.model_class, CONFIG, dtype="bfloat16", scale=0.3)
  )
  save_lora_merged_model_as_safetensors(tmp_path, tmp_path / "out", model, RANK, ALPHA)
  again = parameters(create_model_from_safe_tensors(tmp_path / "out", CONFIG))
  for name, variable in parameters(merge_lora(model, FAMILY, alpha=ALPHA)).items():
    np.testing.assert_array_equal(again[name].get_value(), variable.get_value())


@pytest.mark.parametrize(
  ("names", "modules", "layers"),
  [
    (["q_proj", "k_proj", "o_proj"], ["k_proj", "o_proj", "q_proj"], None),
    (["layers.1.attn.q_proj"], ["q_proj"], [1]),
    # Modules of the experts of layer 0; those of layer 1's feed-forward block share two of their names.
    (["gate_proj"], [f"model.layers.0.mlp.experts.{e}.gate_proj" for e in range(6)], None),
  ],
)
def test_modules_are_those_of_transformers(names, modules, layers, tmp_path):
  adapter = adapter_of(adapted(), alpha=ALPHA)
  part = {name: f for name, f in adapter.factors.items() if any(n in name for n in names)}
  save_peft_adapter(Adapter(part, ALPHA, RANK), tmp_path / "adapter", FAMILY, CONFIG)
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert (config["target_modules"], config["layers_to_transform"]) == (modules, layers)


def test_factors_of_fused_experts_are_those_of_each(tmp_path):
  """Of gate and up together, and of down, which peft keeps beside them."""
  E, F, D = 6, 20, 48
  module = "base_model.model.model.layers.0.mlp.experts"
  rng = np.random.default_rng(0)
  shapes = {
    f"{module}.base_layer.lora_A.weight": (E * RANK, D),
    f"{module}.base_layer.lora_B.weight": (2 * F, RANK * E),
    f"{module}.lora_A.weight": (E * RANK, F),
    f"{module}.lora_B.weight": (D, RANK * E),
  }
  tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  save_model_to_safetensors(tensors, tmp_path / "saved")
  (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
  config = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
  }
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  adapter = load_peft_adapter(tmp_path, FAMILY, CONFIG)

  def change(name):
    factors = adapter.factors[f"layers.0.mlp.experts.{name}"]
    return np.einsum("eir,ero->eoi", factors.a, factors.b)

  def expected(module):
    a = tensors[f"{module}.lora_A.weight"].reshape(E, RANK, -1)
    b = tensors[f"{module}.lora_B.weight"]
    return np.einsum("ore,eri->eoi", b.reshape(b.shape[0], RANK, E), a)

  assert len(adapter.factors) == 3
  both = np.concatenate([change("gate_proj"), change("up_proj")], 1)
  np.testing.assert_allclose(both, expected(f"{module}.base_layer"), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(change("down_proj"), expected(module), rtol=1e-5, atol=1e-6)
