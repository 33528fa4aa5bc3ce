import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.adapters import (
  Adapter,
  Factors,
  adapter_of,
  load_peft_adapter,
  merge_into,
  merge_lora,
  save_peft_adapter,
  set_adapter,
)
from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import AdapterError, CheckpointError
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
  "q_proj.w": ("dr", "rnh", "nhd"),
  "o_proj.w": ("nhr", "rd", "dnh"),
  "k_proj.w": ("dr", "rkh", "khd"),
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


def adapted(dtype="float32", shared=False, factor_dtype=None):
  """A model with factors beside its projections and its experts."""
  model = create_dummy_model(FAMILY.model_class, CONFIG, dtype=dtype, scale=0.3)
  rng = np.random.default_rng(0)
  for name, (a, b, w) in changed(parameters(model)).items():
    sizes = dict(zip(w, parameters(model)[name].get_value().shape, strict=True)) | {"r": RANK}
    for side, axes in (("_lora_a", a), ("_lora_b", b.replace("e", "") if shared else b)):
      value = rng.normal(size=[sizes[axis] for axis in axes]) * 0.3
      setattr(
        module_of(model, name),
        name.split(".")[-1] + side,
        nnx.LoRAParam(jnp.asarray(value, factor_dtype or dtype)),
      )
  return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [False, True], ids=["own b", "one b for all experts"])
def test_the_sum_is_float32_and_rounded_once(dtype, shared):
  model = adapted(dtype, shared)
  merged, before = parameters(merge_lora(model, FAMILY, alpha=ALPHA)), parameters(model)
  names = changed(before)
  assert len(names) == 3 * 2 + 1 + 2
  for name, variable in before.items():
    old, new = (np.asarray(v.get_value()) for v in (variable, merged[name]))
    assert new.dtype == jnp.dtype(dtype)
    if name not in names:
      np.testing.assert_array_equal(new, old)
      continue
    a, b, w = names[name]
    module, leaf = module_of(model, name), name.split(".")[-1]
    a_value, b_value = (
      np.asarray(getattr(module, leaf + side)[...], np.float64) for side in ("_lora_a", "_lora_b")
    )
    equation = f"{a},{b.replace('e', '') if shared else b}->{w}"
    exact = np.asarray(old, np.float64) + ALPHA / RANK * np.einsum(equation, a_value, b_value)
    assert np.abs(exact - np.asarray(old, np.float64)).max() > 0.05
    if dtype == "float32":
      np.testing.assert_allclose(new, exact, rtol=1e-5, atol=1e-6)
    else:
      # Of a sum that lies between two bfloat16 numbers the nearer is taken; float32's error may decide a tie.
      assert np.mean(new == exact.astype(np.float32).astype(jnp.bfloat16)) > 0.999


def test_an_adapter_is_merged_into_a_model_where_it_lies(tmp_path):
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
    assert variable.get_metadata()["out_sharding"] == before[name].get_metadata()["out_sharding"]


def test_a_checkpoint_in_bfloat16_takes_float32_factors(tmp_path):
  model = adapted("bfloat16", factor_dtype="float32")
  write_checkpoint(
    tmp_path, FAMILY, CONFIG, create_dummy_model(FAMILY.model_class, CONFIG, dtype="bfloat16", scale=0.3)
  )
  save_lora_merged_model_as_safetensors(tmp_path, tmp_path / "out", model, RANK, ALPHA)
  again = parameters(create_model_from_safe_tensors(tmp_path / "out", CONFIG))
  for name, variable in parameters(merge_lora(model, FAMILY, alpha=ALPHA)).items():
    np.testing.assert_array_equal(again[name].get_value(), variable.get_value())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_survives_peft_s_files_bit_by_bit(tmp_path, dtype):
  model = adapted(dtype)
  adapter = adapter_of(model, alpha=ALPHA, rank=RANK)
  save_peft_adapter(adapter, tmp_path / "adapter", FAMILY, CONFIG, base_model="Qwen/Qwen3-30B-A3B")
  again = load_peft_adapter(tmp_path / "adapter", FAMILY, CONFIG)
  assert (again.rank, again.alpha) == (RANK, ALPHA)
  assert again.factors.keys() == adapter.factors.keys()
  for name, factors in adapter.factors.items():
    np.testing.assert_array_equal(again.factors[name].a, factors.a)
    np.testing.assert_array_equal(again.factors[name].b, factors.b)
  other = adapted(dtype)
  for _, variable in nnx.to_flat_state(nnx.state(other, nnx.LoRAParam)):
    variable.set_value(variable[...] * 0)
  set_adapter(other, again)
  for ours, theirs in zip(
    *(jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, other)), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_the_config_names_modules_in_full_where_not_all_of_a_name_are_adapted(tmp_path):
  adapter = adapter_of(adapted(), alpha=ALPHA)
  for folder, names in (
    ("all", [n for n in adapter.factors if "attn" in n]),
    ("one", ["layers.1.attn.q_proj.w"]),
  ):
    part = Adapter({name: adapter.factors[name] for name in names}, ALPHA, RANK)
    save_peft_adapter(part, tmp_path / folder, FAMILY, CONFIG)
  read = lambda folder: json.loads((tmp_path / folder / "adapter_config.json").read_text())["target_modules"]
  assert read("all") == ["k_proj", "o_proj", "q_proj"]
  assert read("one") == ["model.layers.1.self_attn.q_proj"]


def test_what_does_not_fit_is_named():
  model = adapted()
  with pytest.raises(AdapterError, match="rank=7 is given"):
    adapter_of(model, alpha=1.0, rank=7)
  with pytest.raises(AdapterError, match=r"no nnx\.LoRAParam"):
    adapter_of(create_dummy_model(FAMILY.model_class, CONFIG), alpha=1.0)
  q_proj = model.layers[0].attn.q_proj
  q_proj.w_lora_b = nnx.LoRAParam(jnp.zeros((RANK, 1, 1)))
  with pytest.raises(AdapterError, match=r"layers.0.attn.q_proj.w_lora_b has shape \(2, 1, 1\)"):
    merge_lora(model, FAMILY, alpha=1.0)
  del q_proj.w_lora_b
  with pytest.raises(AdapterError, match=r"these are missing: layers.0.attn.q_proj.w_lora_b"):
    merge_lora(model, FAMILY, alpha=1.0)
  norm = Adapter({"final_norm.w": Factors(jnp.zeros((1, 2)), jnp.zeros((2, 1)))}, 1.0, 2)
  with pytest.raises(AdapterError, match=r"final_norm.w is not a matrix"):
    save_peft_adapter(norm, "nowhere", FAMILY, CONFIG)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("use_dora", True, "use_dora=True is not supported"),
    ("bias", "all", "bias='all' is not supported"),
    ("rank_pattern", {"q_proj": 4}, "rank_pattern"),
    ("r", 5, "has shape"),
    ("r", "2", "r is '2'"),
    ("lora_alpha", None, "lora_alpha is None"),
  ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path, key, value, message):
  save_peft_adapter(adapter_of(adapted(), alpha=ALPHA), tmp_path / "a", FAMILY, CONFIG)
  file = tmp_path / "a" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
  with pytest.raises(AdapterError, match=message):
    load_peft_adapter(tmp_path / "a", FAMILY, CONFIG)


def test_rank_stabilised_lora_is_lora_with_a_larger_alpha(tmp_path):
  save_peft_adapter(adapter_of(adapted(), alpha=ALPHA), tmp_path / "a", FAMILY, CONFIG)
  file = tmp_path / "a" / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
  assert load_peft_adapter(tmp_path / "a", FAMILY, CONFIG).alpha == ALPHA * RANK**0.5


MODULE = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture
def fused(tmp_path):
  """`fused(keys and shapes)`: an adapter of peft whose experts are fused, and its tensors."""

  def write(shapes):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_model_to_safetensors(tensors, tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    config = {
      "peft_type": "LORA",
      "r": RANK,
      "lora_alpha": ALPHA,
      "target_parameters": ["mlp.experts.down_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tensors

  return write


def test_factors_of_fused_experts_are_those_of_each(fused, tmp_path):
  """Of gate and up together, and of down, which peft keeps beside them."""
  E, F, D = 6, 20, 48
  tensors = fused(
    {
      f"{MODULE}.base_layer.lora_A.weight": (E * RANK, D),
      f"{MODULE}.base_layer.lora_B.weight": (2 * F, RANK * E),
      f"{MODULE}.lora_A.weight": (E * RANK, F),
      f"{MODULE}.lora_B.weight": (D, RANK * E),
    }
  )
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
  np.testing.assert_allclose(both, expected(f"{MODULE}.base_layer"), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(change("down_proj"), expected(MODULE), rtol=1e-5, atol=1e-6)


def test_factors_that_fit_no_fused_experts_are_named(fused, tmp_path):
  fused({f"{MODULE}.lora_A.weight": (6 * RANK, 20), f"{MODULE}.lora_B.weight": (47, RANK * 6)})
  with pytest.raises(
    AdapterError, match=r"the model has no matrix that .*layers.0.mlp.experts.lora_A.weight"
  ):
    load_peft_adapter(tmp_path, FAMILY, CONFIG)


def test_a_directory_that_is_no_adapter_says_so(tmp_path):
  with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
    load_peft_adapter(tmp_path, FAMILY, CONFIG)


@pytest.mark.parametrize(
  ("text", "message"), [("{", "is not valid JSON"), ("[]", "is list, expected an object")]
)
def test_a_broken_adapter_config_says_so(tmp_path, text, message):
  save_peft_adapter(adapter_of(adapted(), alpha=ALPHA), tmp_path, FAMILY, CONFIG)
  (tmp_path / "adapter_config.json").write_text(text)
  with pytest.raises(CheckpointError, match=f"adapter_config.json {message}"):
    load_peft_adapter(tmp_path, FAMILY, CONFIG)
