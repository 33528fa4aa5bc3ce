"""Writes config.json as the installed transformers does into the packages' `tests/transformers_configs`.

One run for each version that the tests know: 4.36.2, 4.46.3, 4.51.3, 4.57.1 and 5.24.0, each with torch.
"""

import json
import pathlib
import tempfile

import transformers

ROOT = pathlib.Path(__file__).parents[1] / "packages"
VERSION = transformers.__version__
SIZES = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-3,
  "max_position_embeddings": 512,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
NESTED = int(VERSION.partition(".")[0]) >= 5


def _rope(theta: float) -> dict:
  return {"rope_type": "default", "rope_theta": theta}


ROPE = {"rope_parameters": _rope(321.5)} if NESTED else {"rope_theta": 321.5}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 6.0}
WINDOW = {"query_pre_attn_scalar": 9, "sliding_window": 5}
ROPES = {"rope_theta": 321.5, "rope_local_base_freq": 33.0}
if NESTED:
  ROPES = {"rope_parameters": {"full_attention": _rope(321.5), "sliding_attention": _rope(33.0)}}
GEMMA3 = SIZES | WINDOW | ROPES
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

# model_type -> (package, name of the configuration, name of the model or None, fields).
KINDS = {
  "llama": ("llama", "LlamaConfig", "LlamaForCausalLM", SIZES | ROPE),
  "qwen2": ("qwen", "Qwen2Config", "Qwen2ForCausalLM", SIZES | ROPE | {"head_dim": 8}),
  "qwen3": ("qwen", "Qwen3Config", "Qwen3ForCausalLM", SIZES | ROPE),
  "qwen3_moe": ("qwen", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", SIZES | ROPE | EXPERTS),
  "gemma": ("gemma", "GemmaConfig", "GemmaForCausalLM", SIZES | ROPE),
  "gemma2": ("gemma", "Gemma2Config", "Gemma2ForCausalLM", SIZES | ROPE | WINDOW | CAPS),
  "gemma3_text": ("gemma", "Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA3),
  "gemma3": ("gemma", "Gemma3Config", None, {"text_config": GEMMA3, "vision_config": VISION}),
}


def write(model_type: str) -> None:
  """Adds what this version writes of a model that it loaded, and all that `to_dict` says of it."""
  package, config_name, model_name, fields = KINDS[model_type]
  if (config_class := getattr(transformers, config_name, None)) is None:
    return
  with tempfile.TemporaryDirectory() as directory:
    config = config_class(**fields)
    if model_name is not None:
      model_class = getattr(transformers, model_name)
      model_class(config).save_pretrained(directory)
      config = model_class.from_pretrained(directory, attn_implementation="eager").config
      config._name_or_path = "a/b"
    config.save_pretrained(directory)
    saved = json.loads((pathlib.Path(directory) / "config.json").read_text())
  full = json.loads(json.dumps(config.to_dict(), default=str))
  file = ROOT / f"models-{package}" / "tests" / "transformers_configs" / f"{model_type}.json"
  file.parent.mkdir(exist_ok=True)
  held = json.loads(file.read_text()) if file.exists() else {}
  held |= {VERSION: saved, f"{VERSION}, to_dict": full}
  file.write_text(json.dumps(dict(sorted(held.items())), indent=1) + "\n")


for model_type in KINDS:
  write(model_type)
