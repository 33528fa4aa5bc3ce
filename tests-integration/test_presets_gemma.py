"""Every known Gemma has a preset with its published numbers, written down here once more, and its stored size."""

import math

import pytest

import models_naming
from models_automodel import call_model_config
from models_automodel.families import load_family
from models_automodel.presets import presets
from models_core.loading import abstract_model

# preset: layers, width, feed-forward width, heads, KV heads, head width, vocabulary, query scalar, window, parameters.
# Parameters of sizes that also see images are those of the language model.
PUBLISHED = {
  "gemma_2b": (18, 2048, 16384, 8, 1, 256, 256000, 256, None, 2_506_172_416),
  "gemma_7b": (28, 3072, 24576, 16, 16, 256, 256000, 256, None, 8_537_680_896),
  "gemma2_2b": (26, 2304, 9216, 8, 4, 256, 256000, 256, 4096, 2_614_341_888),
  "gemma2_9b": (42, 3584, 14336, 16, 8, 256, 256000, 256, 4096, 9_241_705_984),
  "gemma2_27b": (46, 4608, 36864, 32, 16, 128, 256000, 144, 4096, 27_227_128_320),
  "gemma3_270m": (18, 640, 2048, 4, 1, 256, 262144, 256, 512, 268_098_176),
  "gemma3_1b": (26, 1152, 6912, 4, 1, 256, 262144, 256, 512, 999_885_952),
  "gemma3_4b": (34, 2560, 10240, 8, 4, 256, 262208, 256, 1024, 3_880_263_168),
  "gemma3_12b": (48, 3840, 15360, 16, 8, 256, 262208, 256, 1024, 11_766_034_176),
  "gemma3_27b": (62, 5376, 21504, 32, 16, 128, 262208, 168, 1024, 27_009_346_304),
  # The language model of gemma3_27b with 64 rows less.
  "medgemma_27b_text": (62, 5376, 21504, 32, 16, 128, 262144, 168, 1024, 27_009_346_304 - 64 * 5376),
}
SAME = {
  "gemma1p1_2b": "gemma_2b",
  "gemma1p1_7b": "gemma_7b",
  "codegemma_2b": "gemma_2b",
  "codegemma_7b": "gemma_7b",
  "codegemma1p1_2b": "gemma_2b",
  "codegemma1p1_7b": "gemma_7b",
  "shieldgemma_2b": "gemma2_2b",
  "shieldgemma_9b": "gemma2_9b",
  "shieldgemma_27b": "gemma2_27b",
  "functiongemma_270m": "gemma3_270m",
}
KNOWN = [
  (family, model_id)
  for family, ids in models_naming.known_model_ids().items()
  if "gemma" in family
  for model_id in ids
]


def preset(name):
  """By any name: an id, a model's name, a config id."""
  return call_model_config(models_naming.ModelNaming(name).model_name)


def published(config_id):
  """The row of a config id, whose size may be followed by a variant's name."""
  names = [name for name in (*PUBLISHED, *SAME) if config_id == name or config_id.startswith(f"{name}_")]
  (name,) = names
  return PUBLISHED[SAME.get(name, name)]


@pytest.mark.parametrize(("family", "model_id"), KNOWN, ids=[model_id for _, model_id in KNOWN])
def test_a_known_model_has_its_published_numbers(family, model_id):
  config = preset(model_id)
  naming = models_naming.ModelNaming(model_id)
  row = published(naming.model_config_id)
  layers, width, hidden, heads, kv_heads, head_dim, vocabulary, scalar, window, _ = row
  assert config.num_layers == layers
  assert config.embed_dim == width
  assert config.hidden_dim == hidden
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (heads, kv_heads, head_dim)
  assert config.num_embed == vocabulary
  assert config.query_pre_attn_scalar == scalar
  assert config.sliding_window_size == window
  assert config.norm_eps == 1e-6
  slides = [kind.name == "LOCAL_SLIDING" for kind in config.attention_types]
  if naming.model_config_category == "gemma3":
    assert slides == [i % 6 != 5 for i in range(layers)]
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.final_logit_softcap is None
    assert (config.rope_scaling and config.rope_scaling.factor) == (8.0 if layers > 26 else None)
    return
  second = window is not None
  assert slides == [second and i % 2 == 0 for i in range(layers)]
  assert config.rope_theta == 1e4
  assert (config.attn_logits_soft_cap, config.final_logit_softcap) == (
    (50.0, 30.0) if second else (None, None)
  )
  assert (config.use_post_attn_norm, config.use_post_ffw_norm) == (second, second)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_stored_number_of_parameters(name):
  config = preset(name)
  family = load_family("gemma3" if hasattr(config, "local_rope_theta") else "gemma", name)
  parameters = abstract_model(family.model_class, config).parameters
  assert sum(math.prod(parameter.shape) for parameter in parameters.values()) == PUBLISHED[name][-1]


def test_every_preset_is_written_down_here():
  names = {n for category in ("gemma", "gemma3") for n in presets(load_family(category, "").config_class)}
  assert names == {*PUBLISHED, *SAME}


@pytest.mark.parametrize(("name", "same"), SAME.items())
def test_other_names_mean_the_same_numbers(name, same):
  assert preset(name) == preset(same)
