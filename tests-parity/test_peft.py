"""LoRA adapters, in both directions: what peft wrote gives peft's logits here, and what is written here gives ours there."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from models_automodel import AutoModel
from models_automodel.families import family_of_config
from models_core.adapters import Adapter, Factors, load_peft_adapter, merge_adapter, save_peft_adapter
from models_core.layers import dotted
from models_core.loading import abstract_model
from models_core.testing import assert_close

# peft uses older names of transformers.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SIZES = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
CONFIGS = {
  "llama": lambda: transformers.LlamaConfig(**SIZES),
  "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
  "qwen3": lambda: transformers.Qwen3Config(**SIZES),
  "gemma2": lambda: transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=8),
  "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, sliding_window=8),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 12), np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)).copy()


@pytest.fixture(params=CONFIGS)
def base(request, tmp_path):
  """Directory of a random model that transformers wrote."""
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32)
  model.save_pretrained(tmp_path / "base")
  return tmp_path / "base"


def torch_model(base):
  return transformers.AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32, attn_implementation="eager"
  ).eval()


def torch_logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def ours(base):
  """A model, its family, and its arrays by name."""
  model, _ = AutoModel.from_pretrained(str(base))
  arrays = {dotted(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  return model, family_of_config(model.config, "model"), arrays


def merged_logits(model, family, arrays, adapter):
  merged = merge_adapter(arrays, adapter, family.weights["huggingface"])
  filled = abstract_model(family.model_class, model.config).fill(merged)
  return jax.jit(lambda m: m(TOKENS, POSITIONS)[0])(filled)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_gives_its_logits(base, tmp_path, rslora):
  config = peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=PROJECTIONS, init_lora_weights=False, use_rslora=rslora
  )
  theirs = peft.get_peft_model(torch_model(base), config).eval()
  theirs.save_pretrained(tmp_path / "adapter")
  model, family, arrays = ours(base)
  adapter = load_peft_adapter(tmp_path / "adapter", family, model.config)
  assert len(adapter.factors) == len(PROJECTIONS) * 2
  expected = torch_logits(theirs)
  assert np.abs(expected - torch_logits(torch_model(base))).max() > 0.05 * np.abs(expected).max()
  assert_close(merged_logits(model, family, arrays, adapter), expected)


def assert_peft_computes(base, model, family, arrays, adapter, directory):
  """peft reads an adapter that is saved into a directory, and has our logits."""
  save_peft_adapter(adapter, directory, family, model.config, base_model=str(base))
  theirs = peft.PeftModel.from_pretrained(torch_model(base), directory).eval()
  expected = merged_logits(model, family, arrays, adapter)
  assert np.abs(expected - torch_logits(torch_model(base))).max() > 0.05 * np.abs(expected).max()
  assert_close(torch_logits(theirs), expected)


@pytest.mark.parametrize("whole", [True, False], ids=["all layers", "one layer"])
def test_an_adapter_of_ours_loads_in_peft(base, tmp_path, whole):
  model, family, arrays = ours(base)
  rng, factors = np.random.default_rng(1), {}
  for layer in range(2 if whole else 1):
    for name in ("attn.q_proj", "attn.o_proj", "mlp.down_proj"):
      name = f"layers.{layer}.{name}.w"
      out, into = arrays[name].shape
      a, b = rng.normal(size=(into, 3)), rng.normal(size=(3, out))
      factors[name] = Factors(jnp.asarray(0.3 * a, jnp.float32), jnp.asarray(0.3 * b, jnp.float32))
  assert_peft_computes(base, model, family, arrays, Adapter(factors, alpha=5.0, rank=3), tmp_path / "adapter")


def write_experts(path):
  """A random model with experts, that transformers wrote."""
  torch.manual_seed(0)
  config = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)
  transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
  return path


# Of the ranks that peft gives to fused experts itself.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_experts_of_ours_load_in_peft(tmp_path):
  base = write_experts(tmp_path / "base")
  model, family, arrays = ours(base)
  rng, factors = np.random.default_rng(1), {}
  for layer in range(2):
    for name in ("gate_proj", "up_proj", "down_proj"):
      name = f"layers.{layer}.mlp.experts.{name}"
      E, out, into = arrays[name].shape
      a, b = rng.normal(size=(E, into, 3)), rng.normal(size=(E, 3, out))
      factors[name] = Factors(jnp.asarray(0.3 * a, jnp.float32), jnp.asarray(0.3 * b, jnp.float32))
  assert_peft_computes(base, model, family, arrays, Adapter(factors, alpha=5.0, rank=3), tmp_path / "adapter")


@pytest.mark.parametrize(
  "targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids="+".join
)
def test_experts_of_peft_give_its_logits(tmp_path, targets):
  base = write_experts(tmp_path / "base")
  config = peft.LoraConfig(
    r=3,
    lora_alpha=5,
    target_modules=["q_proj"],
    target_parameters=[f"mlp.experts.{target}" for target in targets],
    init_lora_weights=False,
  )
  theirs = peft.get_peft_model(torch_model(base), config).eval()
  theirs.save_pretrained(tmp_path / "adapter")
  model, family, arrays = ours(base)
  adapter = load_peft_adapter(tmp_path / "adapter", family, model.config)
  expected = torch_logits(theirs)
  assert np.abs(expected - torch_logits(torch_model(base))).max() > 0.05 * np.abs(expected).max()
  assert_close(merged_logits(model, family, arrays, adapter), expected)
