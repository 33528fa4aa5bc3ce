"""Names under which a checkpoint may hold weights, and values that GGUF files store differently."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import CheckpointError
from models_core.safetensors_saver import save_model_to_safetensors
from models_core.testing import to_tensors
from models_gemma import gemma, gemma3
from models_gemma.gemma3.model import AttentionType, Gemma3, ModelConfig
from models_gemma.gemma3.params_safetensors import create_model_from_safe_tensors

CONFIG = ModelConfig(
  num_layers=2,
  num_embed=32,
  embed_dim=16,
  hidden_dim=24,
  num_heads=2,
  head_dim=4,
  num_kv_heads=1,
  attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
  rope_theta=1e4,
  local_rope_theta=1e3,
  norm_eps=1e-6,
  query_pre_attn_scalar=4,
  sliding_window_size=3,
)
VISION = {
  "vision_tower.layers.0.weight": np.ones((2, 2), np.float32),
  "multi_modal_projector.w": np.ones(3, np.float32),
}
VISION_NEWER = {f"model.{name}": tensor for name, tensor in VISION.items()}


@pytest.fixture(scope="module")
def tensors():
  """Of a language model alone, norms included at random."""
  found = to_tensors(create_dummy_model(Gemma3, CONFIG), gemma3.FAMILY.weights["huggingface"])
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=tensor.shape).astype(np.float32) for name, tensor in found.items()}


def renamed(tensors, prefix):
  return {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def load(directory, tensors):
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  return create_model_from_safe_tensors(directory, CONFIG)


@pytest.mark.parametrize(
  ("prefix", "others"),
  [("model.", {}), ("language_model.model.", VISION), ("model.language_model.", VISION_NEWER)],
)
def test_every_prefix_gives_the_same_model(tensors, prefix, others, tmp_path):
  model = load(tmp_path, renamed(tensors, prefix) | others)
  assert to_tensors(model, gemma3.FAMILY.weights["huggingface"]).keys() == tensors.keys()
  for name, tensor in to_tensors(model, gemma3.FAMILY.weights["huggingface"]).items():
    np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
  ("prefix", "head"),
  [
    ("model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
  ],
)
def test_a_head_must_repeat_the_embedding(tensors, prefix, head, tmp_path):
  whole = renamed(tensors, prefix)
  table = whole[f"{prefix}embed_tokens.weight"]
  load(tmp_path, whole | {head: table.copy()})
  with pytest.raises(CheckpointError, match=head):
    load(tmp_path, whole | {head: table + 1})


def test_what_belongs_to_nothing_is_an_error(tensors, tmp_path):
  with pytest.raises(CheckpointError, match="audio_tower"):
    load(tmp_path, tensors | {"audio_tower.w": np.ones(3, np.float32)})


@pytest.mark.parametrize("family", [gemma.FAMILY, gemma3.FAMILY], ids=["gemma", "gemma3"])
def test_norms_of_gguf_hold_one_more(family):
  rows = family.weights["gguf"].rows
  norms = [row for row in rows if row.ours.endswith("norm.w")]
  assert len(norms) == sum("norm" in row.ours for row in rows)
  for row in norms:
    stored = np.array([1.0, 0.25, 3.0], np.float32)
    np.testing.assert_array_equal(row.conversion.load(stored), [0.0, -0.75, 2.0])
    np.testing.assert_array_equal(row.conversion.save(row.conversion.load(stored)), stored)
    assert row.conversion.load(stored.astype(np.float16)).dtype == np.float32
  assert all(row.conversion is None for row in rows if row not in norms)


def test_attention_mask_for_trainers():
  model = create_dummy_model(Gemma3, CONFIG)
  tokens = jnp.ones((2, 3), jnp.int32)
  causal = np.tril(np.ones((3, 3), bool))
  np.testing.assert_array_equal(model.get_attention_mask(tokens), [causal, causal])
  inputs = jnp.array([[False, True, True], [True, True, True]])
  expected = [causal & np.array([False, True, True]), causal]
  np.testing.assert_array_equal(model.get_attention_mask(tokens, inputs_mask=inputs), expected)


def test_the_embedding_s_factor_is_rounded_to_its_dtype():
  # sqrt(3072) = 55.4256 is 55.5 in bfloat16.
  assert jnp.asarray(3072**0.5, jnp.bfloat16) == 55.5


TEXT_CONFIG = {
  "model_type": "gemma3_text",
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 4,
  "vocab_size": 32,
  "query_pre_attn_scalar": 4,
  "sliding_window": 3,
  "layer_types": ["sliding_attention", "full_attention"],
  "rope_theta": 1e4,
  "rope_local_base_freq": 1e3,
  "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
  ("prefix", "others"), [("language_model.model.", VISION), ("model.language_model.", VISION_NEWER)]
)
def test_a_vision_tower_is_copied_through(tensors, prefix, others, head, tmp_path):
  whole = renamed(tensors, prefix) | others
  if head:
    name = "language_model.lm_head.weight" if prefix.startswith("language_model.") else "lm_head.weight"
    whole[name] = whole[f"{prefix}embed_tokens.weight"].copy()
  base = tmp_path / "base"
  base.mkdir()
  vision = {"vision_config": {"hidden_size": 2}, "image_token_index": 5, "eoi_token_index": 7}
  outer = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "torch_dtype": "bfloat16",
  }
  (base / "config.json").write_text(json.dumps(outer | vision | {"text_config": TEXT_CONFIG}))
  model = load(base, whole)
  options = {"family": gemma3.FAMILY, "config": CONFIG, "base": base}
  save_model_to_safetensors(nnx.state(model), tmp_path / "out", 2000, **options)
  found = {}
  for file in (tmp_path / "out").glob("*.safetensors"):
    found |= safetensors.numpy.load_file(file)
  assert found.keys() == whole.keys()
  for name, tensor in whole.items():
    np.testing.assert_array_equal(found[name], tensor, name)
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  text = raw.pop("text_config")
  assert raw == outer | vision | {"torch_dtype": "float32", "dtype": "float32"}
  assert text.items() >= (TEXT_CONFIG | {"torch_dtype": "float32"}).items()
  assert "architectures" not in text
  assert gemma3.FAMILY.read_config(raw | {"text_config": text}) == CONFIG
