"""transformers, old and new, reads what `AutoModel.save_pretrained` writes: names, config.json and numbers."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from models_automodel import AutoModel
from models_core.dummy_model_creator import create_dummy_model
from models_core.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from models_gemma import gemma, gemma3
from models_gemma.attention_types import AttentionType
from models_llama import llama3
from models_qwen import qwen2, qwen3

SIZES = {
  "num_layers": 4,
  "embed_dim": 48,
  "hidden_dim": 88,
  "num_heads": 6,
  "num_kv_heads": 2,
  "norm_eps": 1e-2,
}
SPAN, SLIDE = AttentionType.GLOBAL, AttentionType.LOCAL_SLIDING
COMMON = SIZES | {"vocab_size": 101, "head_dim": 16, "rope_theta": 321.5}
GEMMA = SIZES | {"num_embed": 101, "head_dim": 16, "rope_theta": 321.5, "query_pre_attn_scalar": 9}
GEMMA3 = GEMMA | {"local_rope_theta": 33.0, "sliding_window_size": 5}
EXPERTS = {
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "moe_hidden_dim": 24,
  "norm_topk_prob": True,
  "decoder_sparse_step": 1,
  "mlp_only_layers": (),
}
YARN = YarnScaling(4.0, 16)
GEMMA1 = {
  "query_pre_attn_scalar": 16,
  "attention_types": (SPAN,) * 4,
  "final_logit_softcap": None,
  "attn_logits_soft_cap": None,
  "sliding_window_size": None,
  "use_post_attn_norm": False,
  "use_post_ffw_norm": False,
}
GEMMA2 = {
  "attention_types": (SLIDE, SPAN, SLIDE, SPAN),
  "final_logit_softcap": 6.0,
  "attn_logits_soft_cap": 1.5,
  "sliding_window_size": 5,
  "use_post_attn_norm": True,
  "use_post_ffw_norm": True,
}

# case -> (family, fields of its configuration).
CASES = {
  "llama": (llama3, COMMON),
  "llama, tied": (llama3, COMMON | {"weight_tying": True}),
  "llama, scaling": (llama3, COMMON | {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 32)}),
  "llama, linear": (llama3, COMMON | {"rope_scaling": LinearScaling(2.5)}),
  "qwen2": (qwen2, COMMON | {"head_dim": 8}),
  "qwen2, window": (qwen2, COMMON | {"head_dim": 8, "sliding_window": 5, "max_window_layers": 2}),
  "qwen2, yarn": (qwen2, COMMON | {"head_dim": 8, "rope_scaling": YARN, "use_tied_embedding": True}),
  "qwen3": (qwen3, COMMON),
  "qwen3, window": (qwen3, COMMON | {"sliding_window": 5, "max_window_layers": 1}),
  "qwen3, yarn": (
    qwen3,
    COMMON | {"rope_scaling": YarnScaling(4.0, 16, attention_factor=1.3, beta_fast=3.0)},
  ),
  "qwen3, experts": (qwen3, COMMON | EXPERTS),
  "qwen3, some dense": (qwen3, COMMON | EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": False}),
  "gemma": (gemma, GEMMA | GEMMA1),
  "gemma2": (gemma, GEMMA | GEMMA2),
  "gemma2, other layers": (gemma, GEMMA | GEMMA2 | {"attention_types": (SPAN, SLIDE, SLIDE, SPAN)}),
  "gemma3": (gemma3, GEMMA3 | {"attention_types": (SLIDE, SPAN, SLIDE, SPAN)}),
  "gemma3, scaling": (
    gemma3,
    GEMMA3 | {"attention_types": (SLIDE, SLIDE, SLIDE, SPAN), "rope_scaling": LinearScaling(3.0)},
  ),
}


def theirs(path, tokens, kind=transformers.AutoModelForCausalLM):
  """transformers' logits, from the directory alone."""
  model, info = kind.from_pretrained(path, output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  with torch.no_grad():
    return model.eval()(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def ours(model, tokens):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return np.asarray(model(tokens, positions)[0])


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_is_saved(case, size, tokens, tmp_path, assert_parity):
  module, fields = CASES[case]
  family = module.FAMILY
  model = create_dummy_model(family.model_class, family.config_class(**fields), scale=0.2)
  AutoModel.save_pretrained(model, tmp_path / "out", max_shard_size=size)
  assert (tmp_path / "out" / "model.safetensors").exists() == (size == "5GB")
  assert_parity(ours(model, tokens), theirs(tmp_path / "out", tokens))


@pytest.mark.parametrize("case", ["llama, tied", "qwen3, experts", "gemma2"])
def test_sharded_models_too(case, tokens, tmp_path, assert_parity):
  module, fields = CASES[case]
  family = module.FAMILY
  mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
  model = create_dummy_model(family.model_class, family.config_class(**fields), mesh, scale=0.2)
  AutoModel.save_pretrained(model, tmp_path / "out")
  assert_parity(ours(model, tokens), theirs(tmp_path / "out", tokens))


def test_a_model_beside_its_vision_tower(tokens, tmp_path, assert_parity):
  """The base is transformers' own; its text model is changed, saved, and read by it again."""
  text = {"rms_norm_eps": 1e-2, "sliding_window": 5, "query_pre_attn_scalar": 9, "vocab_size": 128}
  text |= {"hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 6}
  text |= {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
  }
  vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
  config = transformers.Gemma3Config(
    text_config=text,
    vision_config=vision | {"image_size": 28, "patch_size": 14},
    mm_tokens_per_image=1,
    image_token_index=120,
    boi_token_index=121,
    eoi_token_index=122,
  )
  transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
  model, path = AutoModel.from_pretrained(str(tmp_path / "base"), progress=False)
  AutoModel.save_pretrained(model, tmp_path / "same", base=path)
  first, same = (safetensors.numpy.load_file(tmp_path / d / "model.safetensors") for d in ("base", "same"))
  assert {name: array.tobytes() for name, array in same.items()} == {n: a.tobytes() for n, a in first.items()}
  model.final_norm.w.set_value(model.final_norm.w.get_value() + 0.5)
  AutoModel.save_pretrained(model, tmp_path / "out", base=path)
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  assert raw["vision_config"] == json.loads((tmp_path / "base" / "config.json").read_text())["vision_config"]
  kind = transformers.Gemma3ForConditionalGeneration
  assert_parity(ours(model, tokens), theirs(tmp_path / "out", tokens, kind))
