"""LoRA adapters, in both directions: what peft wrote gives peft's logits here, and what is written here gives ours there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from models_automodel import AutoModel, load_adapter
from models_automodel.families import family_of_config
from models_core.adapters import (
  Adapter,
  Factors,
  load_peft_adapter,
  merge_adapter,
  read_peft_config,
  save_peft_adapter,
)
from models_core.errors import AdapterError
from models_core.formats import LocalFiles
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


TARGETS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
TIED = {"tie_word_embeddings": True}
# What an adapter is -> (the base's architecture, other values of its configuration, arguments of LoraConfig).
KINDS = {
  "DoRA": ("llama", {}, {**TARGETS, "use_dora": True, "target_modules": PROJECTIONS}),
  "DoRA of embedding and head": (
    "llama",
    {"tie_word_embeddings": False},
    {**TARGETS, "use_dora": True, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
  ),
  "the embedding": (
    "llama",
    {"tie_word_embeddings": False},
    {**TARGETS, "target_modules": ["q_proj", "embed_tokens"]},
  ),
  "the embedding alone of a tied pair": ("llama", TIED, {**TARGETS, "target_modules": ["embed_tokens"]}),
  "the head alone of a tied pair": ("qwen3", TIED, {**TARGETS, "target_modules": ["q_proj", "lm_head"]}),
  "a tied pair": (
    "qwen2",
    TIED,
    {**TARGETS, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
  ),
  "whole embedding and head": (
    "qwen2",
    {"tie_word_embeddings": False},
    {**TARGETS, "modules_to_save": ["embed_tokens", "lm_head"]},
  ),
  "a whole tied pair, each for itself": (
    "llama",
    TIED,
    {**TARGETS, "modules_to_save": ["embed_tokens", "lm_head"]},
  ),
  "a whole tied pair": (
    "llama",
    TIED,
    {**TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
  ),
  "a whole embedding of a tied pair": ("llama", TIED, {**TARGETS, "modules_to_save": ["embed_tokens"]}),
  "all norms whole": ("qwen3", {}, {**TARGETS, "modules_to_save": ["norm", "layernorm"]}),
  "a whole block": ("llama", {}, {**TARGETS, "target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
  "tokens": ("llama", {"tie_word_embeddings": False}, {**TARGETS, "trainable_token_indices": [3, 99, 17]}),
  "tokens of a tied pair": ("qwen3", TIED, {**TARGETS, "trainable_token_indices": {"embed_tokens": [3, 99]}}),
  "ranks and alphas by pattern": (
    "llama",
    {},
    {
      **TARGETS,
      "use_rslora": True,
      "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
      "alpha_pattern": {"^model.layers.0.mlp.down_proj": 11},
    },
  ),
  "some layers": ("gemma2", {}, {**TARGETS, "layers_to_transform": [1], "layers_pattern": "layers"}),
  "a regular expression": ("gemma3", {}, {**TARGETS, "target_modules": r".*layers\.0\..*\.(k|v)_proj"}),
  "all linear layers but some": (
    "llama",
    {},
    {**TARGETS, "target_modules": "all-linear", "exclude_modules": ["v_proj"]},
  ),
  "all biases": ("qwen2", {}, {**TARGETS, "bias": "all"}),
  "biases of adapted modules": ("qwen2", {}, {**TARGETS, "bias": "lora_only"}),
  "biases of factors": ("qwen2", {}, {**TARGETS, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
  "PiSSA": ("llama", {}, {**TARGETS, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 6}}),
  "PiSSA with DoRA": ("llama", {}, {**TARGETS, "init_lora_weights": "pissa", "use_dora": True}),
  "OLoRA": ("gemma2", {}, {**TARGETS, "init_lora_weights": "olora", "use_rslora": True}),
  "orthogonal": ("llama", {}, {**TARGETS, "r": 4, "init_lora_weights": "orthogonal"}),
  "MiCA": ("llama", {}, {**TARGETS, "init_lora_weights": "mica"}),
  "no factors": ("llama", {}, {"target_modules": "dummy-target-modules", "modules_to_save": ["lm_head"]}),
}


def write_base(path, name, **changes):
  """A random model that transformers wrote."""
  torch.manual_seed(0)
  config = CONFIGS[name]()
  for key, value in changes.items():
    setattr(config, key, value)
  transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
  return path


def write_adapter(path, model, **arguments):
  """An adapter of peft in which everything that is trained has moved."""
  theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **arguments))
  torch.manual_seed(1)
  for name, parameter in theirs.named_parameters():
    if parameter.requires_grad or ("bias" in name and arguments.get("bias", "none") != "none"):
      parameter.data += 0.2 * torch.randn_like(parameter)
  theirs.save_pretrained(path)
  return path


def peft_logits(model, adapter):
  return torch_logits(peft.PeftModel.from_pretrained(model, adapter).eval())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_peft_s_logits(kind, tmp_path):
  """Loaded by the name of the adapter alone; and written here, it gives them in peft."""
  name, changes, arguments = KINDS[kind]
  base = write_base(tmp_path / "base", name, **changes)
  adapter = write_adapter(tmp_path / "adapter", torch_model(base), **arguments)
  expected = peft_logits(torch_model(base), adapter)
  assert np.abs(expected - torch_logits(torch_model(base))).max() > 0.02 * np.abs(expected).max()
  model, path = AutoModel.from_pretrained(str(adapter))
  assert path == str(base)
  assert_close(jax.jit(lambda m: m(TOKENS, POSITIONS)[0])(model), expected)
  plain, _ = AutoModel.from_pretrained(str(base))
  loaded = load_adapter(str(adapter), plain)
  family = family_of_config(plain.config, "model")
  save_peft_adapter(loaded, tmp_path / "again", family, plain.config, base_model=str(base))
  assert_close(peft_logits(torch_model(base), tmp_path / "again"), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [120, 90], ids=["more tokens", "fewer tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
  "more", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["saved", "trained"]
)
def test_a_resized_vocabulary(size, tied, more, tmp_path):
  """peft stores embedding and head; the model's configuration and its config.json have the new size."""
  base = write_base(tmp_path / "base", "llama", tie_word_embeddings=tied)

  def resized():
    model = torch_model(base)
    torch.manual_seed(2)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model

  adapter = write_adapter(tmp_path / "adapter", resized(), **TARGETS, **more)
  tokens = TOKENS % size
  with torch.no_grad():
    theirs = peft.PeftModel.from_pretrained(resized(), adapter).eval()
    expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
  model, path = AutoModel.from_pretrained(str(adapter))
  assert (model.config.vocab_size, model.config.weight_tying) == (size, tied and not more)
  assert_close(model(tokens, POSITIONS)[0], expected)
  AutoModel.save_pretrained(model, tmp_path / "merged", base=path)
  with torch.no_grad():
    merged = torch_model(tmp_path / "merged")(torch.from_numpy(tokens).long()).logits.numpy()
  assert_close(merged, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_language_model_of_one_with_a_vision_tower(tmp_path, caplog):
  """Both are adapted: the tower's factors are left out and named; written again, peft loads the language model's."""
  torch.manual_seed(0)
  vision = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
  }
  text = transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, sliding_window=8)
  config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
  both = transformers.Gemma3ForConditionalGeneration(config).eval()
  both.save_pretrained(tmp_path / "base")
  load = lambda: transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
  adapter = write_adapter(
    tmp_path / "adapter", load(), **{**TARGETS, "target_modules": ["q_proj", "down_proj"]}
  )
  expected = peft_logits(load(), adapter)
  model, _ = AutoModel.from_pretrained(str(adapter))
  assert "tensors not loaded: the vision tower; only the language model is loaded" in caplog.text
  assert_close(model(TOKENS, POSITIONS)[0], expected)
  plain, _ = AutoModel.from_pretrained(str(tmp_path / "base"))
  family = family_of_config(plain.config, "model")
  save_peft_adapter(
    load_adapter(adapter, plain), tmp_path / "again", family, plain.config, base=tmp_path / "base"
  )
  again = peft.PeftModel.from_pretrained(load(), tmp_path / "again").eval()
  assert not any("vision" in name for name, _ in again.named_parameters() if "lora_" in name)
  assert_close(torch_logits(again), expected)


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


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
def test_experts_named_by_their_modules(tmp_path, targets):
  """peft turns these names into those of fused tensors, with ranks and alphas of their own."""
  base = write_experts(tmp_path / "base")
  adapter = write_adapter(tmp_path / "adapter", torch_model(base), r=3, lora_alpha=5, target_modules=targets)
  expected = peft_logits(torch_model(base), adapter)
  model, _ = AutoModel.from_pretrained(str(adapter))
  assert_close(jax.jit(lambda m: m(TOKENS, POSITIONS)[0])(model), expected)


def test_every_key_of_peft_is_known(tmp_path):
  """A key that a newer version has is refused until somebody says what it does."""

  def complaint(key):
    (tmp_path / "adapter_config.json").write_text(json.dumps({key: ["something"]}))
    try:
      read_peft_config(LocalFiles(str(tmp_path)))
    except AdapterError as error:
      return str(error)
    return ""

  keys = [field.name for field in dataclasses.fields(peft.LoraConfig)]
  assert "not known. If the merged" in complaint("something")
  assert [key for key in keys if "not known. If the merged" in complaint(key)] == []


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
