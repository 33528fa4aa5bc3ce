"""Checkpoints that tunix's trainer wrote: of our models, of tunix's own models, and of the LoRA factors of either."""

import dataclasses
import importlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

from models_automodel import AutoModel, CheckpointError
from models_core.adapters import adapter_of, load_orbax_adapter, merge_into
from models_core.dummy_model_creator import create_dummy_model
from models_gemma import gemma, gemma3
from models_llama import llama3
from models_qwen import qwen2, qwen3

# tunix imports deprecated names of jax.
with warnings.catch_warnings(action="ignore"):
  tunix_gemma, tunix_gemma3, tunix_llama3, tunix_qwen2, tunix_qwen3 = (
    importlib.import_module(f"tunix.models.{name}.model")
    for name in ("gemma", "gemma3", "llama3", "qwen2", "qwen3")
  )
  from tunix.sft.checkpoint_manager import CheckpointManager

# The clients use older names of jax and flax.
pytestmark = pytest.mark.filterwarnings("ignore")

V, D, F, N, K, H = 64, 32, 48, 4, 2, 8
SIZES = {"num_layers": 2, "embed_dim": D, "hidden_dim": F, "num_heads": N, "head_dim": H, "num_kv_heads": K}
VOCABULARY = {"vocab_size": V, "norm_eps": 1e-5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# tunix's Llama and Qwen 3 rotate with this base whatever their configuration says.
FIXED_THETA = 1_000_000
SLIDING = {"sliding_window_size": 3}
NO_POST_NORMS = {"use_post_attn_norm": False, "use_post_ffw_norm": False}
POST_NORMS = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
SOFTCAPS = {"final_logit_softcap": 20.0, "attn_logits_soft_cap": 10.0}
NO_SOFTCAPS = dict.fromkeys(SOFTCAPS)


def types(kind, *names):
  return {"attention_types": tuple(kind[name] for name in names)}


def gemma_pair(names, **fields):
  """Configurations of tunix and of ours. tunix fixes what its Gemma has no field for."""
  theirs = tunix_gemma.ModelConfig(
    **SIZES | fields, num_embed=V, **types(tunix_gemma.AttentionType, *names), **SLIDING
  )
  fixed = {"norm_eps": 1e-6, "rope_theta": 10_000.0, "query_pre_attn_scalar": H}
  ours = gemma.model.ModelConfig(
    **SIZES | fields, num_embed=V, **types(gemma.model.AttentionType, *names), **SLIDING, **fixed
  )
  return theirs, ours


def gemma3_pair():
  # Five sliding layers and a global one.
  sizes = SIZES | {"num_layers": 6}
  theirs = tunix_gemma3.ModelConfig(
    **sizes,
    num_embed=V,
    local_base_frequency=100,
    global_base_frequency=1000,
    param_dtype=jnp.float32,
    **SLIDING,
  )
  ours = dataclasses.replace(
    gemma3.model.ModelConfig.gemma3_270m(),
    **sizes, num_embed=V, local_rope_theta=100.0, rope_theta=1000.0, query_pre_attn_scalar=H, **SLIDING,
  )  # fmt: skip
  return theirs, ours


def pair(their_model, family, common, **differing):
  """tunix's class and configuration, our family and configuration; `differing` holds pairs (tunix's, ours)."""
  theirs = {name: values[0] for name, values in differing.items() if values[0] is not None}
  ours = {name: values[1] for name, values in differing.items() if values[1] is not None}
  return their_model.ModelConfig(**common, **theirs), family.model.ModelConfig(**common, **ours)


FLOATS = {"dtype": (jnp.float32, None), "param_dtype": (jnp.float32, None)}
LLAMA = SIZES | VOCABULARY | {"rope_theta": FIXED_THETA}
QWEN_2 = SIZES | VOCABULARY | {"rope_theta": 10_000, "use_tied_embedding": True}
QWEN_3 = SIZES | VOCABULARY | {"rope_theta": FIXED_THETA}
LOCAL, GLOBAL = "LOCAL_SLIDING", "GLOBAL"

MODELS = {
  "llama3": (tunix_llama3.Llama3, llama3, pair(tunix_llama3, llama3, LLAMA)),
  "llama3 tied": (tunix_llama3.Llama3, llama3, pair(tunix_llama3, llama3, LLAMA | {"weight_tying": True})),
  "qwen2": (tunix_qwen2.Qwen2, qwen2, pair(tunix_qwen2, qwen2, QWEN_2, **FLOATS)),
  "qwen3": (tunix_qwen3.Qwen3, qwen3, pair(tunix_qwen3, qwen3, QWEN_3, **FLOATS)),
  "qwen3 with experts": (
    tunix_qwen3.Qwen3,
    qwen3,
    pair(
      tunix_qwen3, qwen3, QWEN_3 | EXPERTS | {"use_tied_embedding": True}, **FLOATS,
      moe_hidden_dim=(None, F), norm_topk_prob=(None, True),
    ),
  ),
  "gemma 2b": (
    tunix_gemma.Gemma, gemma, gemma_pair([GLOBAL] * 2, num_kv_heads=1, **NO_POST_NORMS, **NO_SOFTCAPS),
  ),
  "gemma 7b": (
    tunix_gemma.Gemma, gemma, gemma_pair([GLOBAL] * 2, num_kv_heads=N, **NO_POST_NORMS, **NO_SOFTCAPS),
  ),
  "gemma 2": (tunix_gemma.Gemma, gemma, gemma_pair([LOCAL, GLOBAL], **POST_NORMS, **SOFTCAPS)),
  "gemma 3": (tunix_gemma3.Gemma3, gemma3, gemma3_pair()),
}  # fmt: skip

TOKENS = np.random.default_rng(1).integers(0, V, (2, 8)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8))
CAUSAL = np.broadcast_to(np.tri(8, dtype=bool), (2, 8, 8))


def their_model(model_class, config):
  """A model of tunix in which no parameter has a constant."""
  model = model_class(config, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  state = nnx.state(model, nnx.Param)
  random = lambda value: jnp.asarray(rng.normal(size=value.shape, scale=0.2), jnp.float32)
  nnx.update(model, jax.tree.map(random, state))
  return model


def train(directory, model, steps=(10, 20), **options):
  """Saves steps as tunix's trainer does, with the state of the optimizer."""
  manager = CheckpointManager(str(directory))
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  for step in steps:
    assert manager.save(step, model, optimizer, force=True, **options)
  manager.close()
  return directory


def logits(model):
  found = model(jnp.asarray(TOKENS), jnp.asarray(POSITIONS), None, jnp.asarray(CAUSAL))
  return np.asarray(found[0] if isinstance(found, tuple) else found)


def arrays(model):
  return {
    ".".join(map(str, path)): np.asarray(variable.get_value())
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def expected(theirs):
  """The parameters of our model that hold the weights of tunix's, written out by hand."""
  ours = {}
  for name, w in arrays(theirs).items():
    *module, last = name.split(".")
    at = ".".join(module)
    gemma_norm = {
      "pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attn_norm",
      "_query_norm": "q_norm", "_key_norm": "k_norm",
    }  # fmt: skip
    if last == "scale":
      ours[".".join([*module[:-1], gemma_norm.get(module[-1], module[-1]), "w"])] = w
    elif last == "kernel" or name == "lm_head.w":
      ours[f"{at}.w"] = w.T
    elif last in ("q_bias", "k_bias", "v_bias"):
      ours[f"{at}.{last[0]}_proj.b"] = w
    elif last in ("gate_proj", "up_proj", "down_proj"):
      ours[f"{at}.experts.{last}"] = w.swapaxes(1, 2)
    elif w.ndim == 3 and module[-1] in ("o_proj", "attn_vec_einsum"):
      ours[".".join([*module[:-1], "o_proj.w"])] = w.reshape(N * H, D).T
    elif w.ndim == 3 and module[-1] in ("q_proj", "k_proj", "v_proj"):
      ours[name] = w.reshape(D, -1).T
    elif module[-1].endswith("_einsum"):
      stacked = w if w.ndim == 4 else w[None]
      for letter, one in zip(module[-1].removesuffix("_einsum"), stacked, strict=True):
        ours[".".join([*module[:-1], f"{letter}_proj.w"])] = np.concatenate([head.T for head in one])
    else:
      ours[name] = w
  return ours


@pytest.fixture(params=MODELS)
def pairs(request):
  """A model of tunix, our family, and our configuration."""
  model_class, family, (theirs, ours) = MODELS[request.param]
  return their_model(model_class, theirs), family, ours


def test_a_model_of_tunix(pairs, tmp_path):
  model, family, config = pairs
  loaded, _ = AutoModel.from_pretrained(train(tmp_path, model), config=config)
  ours, theirs = arrays(loaded), expected(model)
  if family is gemma and not config.use_post_ffw_norm:
    # In Gemma 1 this norm has the name that Hugging Face gives it.
    theirs = {name.replace("pre_ffw_norm", "post_attention_layernorm"): w for name, w in theirs.items()}
  assert ours.keys() == theirs.keys()
  for name, weight in theirs.items():
    np.testing.assert_array_equal(ours[name], weight, err_msg=name)
  np.testing.assert_allclose(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_model_of_ours(pairs, tmp_path):
  _, family, config = pairs
  model = create_dummy_model(family.FAMILY.model_class, config, random_seed=3)
  train(tmp_path, model)
  (tmp_path / "config.json").write_text(json.dumps(family.FAMILY.write_config(config)))
  loaded, _ = AutoModel.from_pretrained(tmp_path)
  assert loaded.config == config
  assert arrays(loaded).keys() == arrays(model).keys()
  for name, weight in arrays(model).items():
    np.testing.assert_array_equal(arrays(loaded)[name], weight, err_msg=name)


RANK, ALPHA = 3, 5.0
PROJECTIONS = (
  ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|down_proj|attn_vec_einsum|q_einsum|kv_einsum|qkv_einsum)"
)


def with_factors(model):
  """The model with random LoRA factors of qwix."""
  provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=ALPHA)
  tuned = qwix.apply_lora_to_model(
    model, provider, jnp.asarray(TOKENS), jnp.asarray(POSITIONS), None, jnp.asarray(CAUSAL), rngs=nnx.Rngs(0)
  )
  rng = np.random.default_rng(5)
  random = lambda value: jnp.asarray(rng.normal(size=value.shape, scale=0.2), jnp.float32)
  nnx.update(tuned, jax.tree.map(random, nnx.state(tuned, nnx.LoRAParam)))
  return tuned


@pytest.mark.parametrize(("whose", "alone"), [("tunix's", True), ("ours", False)])
def test_lora_factors(pairs, tmp_path, whose, alone):
  model, family, config = pairs
  base, _ = AutoModel.from_pretrained(train(tmp_path / "base", model), config=config)
  tuned = with_factors(model if whose == "tunix's" else base)
  directory = train(tmp_path / "tuned", tuned, save_only_lora_params=alone)
  with pytest.raises(CheckpointError, match=r"it holds LoRA factors.*\.load_orbax_adapter"):
    AutoModel.from_pretrained(directory, config=config)
  adapter = load_orbax_adapter(directory, family.FAMILY, config, alpha=ALPHA)
  if whose == "ours":
    in_memory = adapter_of(tuned, alpha=ALPHA).factors
    assert in_memory.keys() == adapter.factors.keys()
    for name, factors in in_memory.items():
      np.testing.assert_array_equal(adapter.factors[name].a, factors.a, err_msg=name)
      np.testing.assert_array_equal(adapter.factors[name].b, factors.b, err_msg=name)
  changed = {name.partition(".attn.")[2] or name.partition(".mlp.")[2] for name in adapter.factors}
  attention = {"q_proj.w", "k_proj.w", "v_proj.w", "o_proj.w"}
  assert changed >= attention
  assert len(adapter.factors) % config.num_layers == 0
  np.testing.assert_allclose(
    logits(merge_into(base, adapter, family.FAMILY)), logits(tuned), rtol=2e-5, atol=2e-5
  )
