"""Every published Qwen model by its name alone: the values of its config.json and its stored parameters."""

import math

import pytest

import models_naming
from models_automodel.presets import call_model_config
from models_core.loading import abstract_model
from models_core.rope_scaling import YarnScaling
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen2.model import Qwen2
from models_qwen.qwen3.model import Qwen3

# What config.json states, by size: hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
# intermediate_size, vocab_size, tie_word_embeddings; num_experts, num_experts_per_tok, moe_intermediate_size. Then the
# parameters that the checkpoint stores, a tied head once.
SIZES = {
  "Qwen2.5-0.5B":    (896,  24, 14, 2, 64,  4864,  151936, True,  494_032_768),
  "Qwen2.5-1.5B":    (1536, 28, 12, 2, 128, 8960,  151936, True,  1_543_714_304),
  "R1-1.5B":         (1536, 28, 12, 2, 128, 8960,  151936, False, 1_777_088_000),
  "Qwen2.5-3B":      (2048, 36, 16, 2, 128, 11008, 151936, True,  3_085_938_688),
  "Qwen2.5-7B":      (3584, 28, 28, 4, 128, 18944, 152064, False, 7_615_616_512),
  "Qwen2.5-14B":     (5120, 48, 40, 8, 128, 13824, 152064, False, 14_770_033_664),
  "Qwen2.5-32B":     (5120, 64, 40, 8, 128, 27648, 152064, False, 32_763_876_352),
  "Qwen2.5-72B":     (8192, 80, 64, 8, 128, 29568, 152064, False, 72_706_203_648),
  "Qwen3-0.6B":      (1024, 28, 16, 8, 128, 3072,  151936, True,  596_049_920),
  "Qwen3-1.7B":      (2048, 28, 16, 8, 128, 6144,  151936, True,  1_720_574_976),
  "Qwen3-4B":        (2560, 36, 32, 8, 128, 9728,  151936, True,  4_022_468_096),
  "Qwen3-8B":        (4096, 36, 32, 8, 128, 12288, 151936, False, 8_190_735_360),
  "Qwen3-14B":       (5120, 40, 40, 8, 128, 17408, 151936, False, 14_768_307_200),
  "Qwen3-32B":       (5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264),
  "Qwen3-30B-A3B":   (2048, 48, 32, 4, 128, 6144,  151936, False, 30_532_122_624, 128, 8, 768),
  "Qwen3-235B-A22B": (4096, 94, 64, 4, 128, 12288, 151936, False, 235_093_634_560, 128, 8, 1536),
  "Qwen3-480B-A35B": (6144, 62, 96, 8, 128, 8192,  151936, False, 480_154_875_392, 160, 8, 2560),
}  # fmt: skip

# Repositories: their size, rope_theta, rms_norm_eps. `+` separates endings that share them.
PUBLISHED = {
  "Qwen/Qwen2.5-0.5B + -Instruct": ("Qwen2.5-0.5B", 1e6, 1e-6),
  "Qwen/Qwen2.5-1.5B + -Instruct": ("Qwen2.5-1.5B", 1e6, 1e-6),
  "Qwen/Qwen2.5-3B + -Instruct": ("Qwen2.5-3B", 1e6, 1e-6),
  "Qwen/Qwen2.5-7B + -Instruct": ("Qwen2.5-7B", 1e6, 1e-6),
  "Qwen/Qwen2.5-14B": ("Qwen2.5-14B", 1e6, 1e-5),
  "Qwen/Qwen2.5-14B-Instruct": ("Qwen2.5-14B", 1e6, 1e-6),
  "Qwen/Qwen2.5-32B": ("Qwen2.5-32B", 1e6, 1e-5),
  "Qwen/Qwen2.5-32B-Instruct": ("Qwen2.5-32B", 1e6, 1e-6),
  "Qwen/Qwen2.5-72B": ("Qwen2.5-72B", 1e6, 1e-5),
  "Qwen/Qwen2.5-72B-Instruct": ("Qwen2.5-72B", 1e6, 1e-6),
  "Qwen/Qwen2.5-7B-Instruct-1M": ("Qwen2.5-7B", 1e7, 1e-5),
  "Qwen/Qwen2.5-14B-Instruct-1M": ("Qwen2.5-14B", 1e7, 1e-5),
  "Qwen/Qwen2.5-Coder-0.5B + -Instruct": ("Qwen2.5-0.5B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Coder-1.5B + -Instruct": ("Qwen2.5-1.5B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Coder-3B + -Instruct": ("Qwen2.5-3B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Coder-7B + -Instruct": ("Qwen2.5-7B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Coder-14B": ("Qwen2.5-14B", 1e6, 1e-5),
  "Qwen/Qwen2.5-Coder-14B-Instruct": ("Qwen2.5-14B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Coder-32B": ("Qwen2.5-32B", 1e6, 1e-5),
  "Qwen/Qwen2.5-Coder-32B-Instruct": ("Qwen2.5-32B", 1e6, 1e-6),
  "Qwen/Qwen2.5-Math-1.5B + -Instruct": ("Qwen2.5-1.5B", 1e4, 1e-6),
  "Qwen/Qwen2.5-Math-7B + -Instruct": ("Qwen2.5-7B", 1e4, 1e-6),
  "Qwen/Qwen2.5-Math-72B": ("Qwen2.5-72B", 1e4, 1e-5),
  "Qwen/Qwen2.5-Math-72B-Instruct": ("Qwen2.5-72B", 1e4, 1e-6),
  "Qwen/QwQ-32B": ("Qwen2.5-32B", 1e6, 1e-5),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("R1-1.5B", 1e4, 1e-6),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("Qwen2.5-7B", 1e4, 1e-6),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("Qwen2.5-14B", 1e6, 1e-5),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": ("Qwen2.5-32B", 1e6, 1e-5),
  "Qwen/Qwen3-0.6B + -Base": ("Qwen3-0.6B", 1e6, 1e-6),
  "Qwen/Qwen3-1.7B + -Base": ("Qwen3-1.7B", 1e6, 1e-6),
  "Qwen/Qwen3-4B + -Base": ("Qwen3-4B", 1e6, 1e-6),
  "Qwen/Qwen3-8B + -Base": ("Qwen3-8B", 1e6, 1e-6),
  "Qwen/Qwen3-14B + -Base": ("Qwen3-14B", 1e6, 1e-6),
  "Qwen/Qwen3-32B": ("Qwen3-32B", 1e6, 1e-6),
  "Qwen/Qwen3-30B-A3B + -Base": ("Qwen3-30B-A3B", 1e6, 1e-6),
  "Qwen/Qwen3-235B-A22B": ("Qwen3-235B-A22B", 1e6, 1e-6),
  "Qwen/Qwen3-4B-Instruct-2507": ("Qwen3-4B", 5e6, 1e-6),
  "Qwen/Qwen3-4B-Thinking-2507": ("Qwen3-4B", 5e6, 1e-6),
  "Qwen/Qwen3-30B-A3B-Instruct-2507": ("Qwen3-30B-A3B", 1e7, 1e-6),
  "Qwen/Qwen3-30B-A3B-Thinking-2507": ("Qwen3-30B-A3B", 1e7, 1e-6),
  "Qwen/Qwen3-235B-A22B-Instruct-2507": ("Qwen3-235B-A22B", 5e6, 1e-6),
  "Qwen/Qwen3-235B-A22B-Thinking-2507": ("Qwen3-235B-A22B", 5e6, 1e-6),
  "Qwen/Qwen3-Coder-30B-A3B-Instruct": ("Qwen3-30B-A3B", 1e7, 1e-6),
  "Qwen/Qwen3-Coder-480B-A35B-Instruct": ("Qwen3-480B-A35B", 1e7, 1e-6),
  "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": ("Qwen3-8B", 1e6, 1e-6),
}
REPOSITORIES = {
  first + ending: values
  for key, values in PUBLISHED.items()
  for first, *endings in [key.split(" + ")]
  for ending in ("", *endings)
}
SCALINGS = {"deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": YarnScaling(factor=4.0, original_max_position=32768)}


def test_every_known_repository_is_in_the_table():
  known = models_naming.known_model_ids().values()
  category = lambda i: models_naming.get_model_config_category(models_naming.get_model_name_from_model_id(i))
  assert {i for ids in known for i in ids if category(i) in ("qwen2", "qwen3")} == REPOSITORIES.keys()


@pytest.mark.parametrize("repository", REPOSITORIES)
def test_preset_has_the_published_values(repository):
  size, theta, eps = REPOSITORIES[repository]
  hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied, _, *experts = SIZES[size]
  config = call_model_config(models_naming.get_model_name_from_model_id(repository))
  dense = ("num_layers", "vocab_size", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads")
  assert [getattr(config, n) for n in dense] == [
    layers,
    vocab,
    hidden,
    intermediate,
    heads,
    head_dim,
    kv_heads,
  ]
  assert (config.use_tied_embedding, config.rope_theta, config.norm_eps) == (tied, theta, eps)
  assert config.rope_scaling == SCALINGS.get(repository)
  assert config.sliding_window is None
  if experts:
    assert [config.num_experts, config.num_experts_per_tok, config.moe_hidden_dim] == experts
    assert (config.norm_topk_prob, config.decoder_sparse_step, config.mlp_only_layers) == (True, 1, ())
  elif not isinstance(config, Qwen2Config):
    assert config.num_experts is None


@pytest.mark.parametrize("size", SIZES)
def test_preset_has_as_many_parameters_as_are_stored(size):
  repository = next(i for i, values in REPOSITORIES.items() if values[0] == size)
  config = call_model_config(models_naming.get_model_name_from_model_id(repository))
  model = abstract_model(Qwen2 if isinstance(config, Qwen2Config) else Qwen3, config)
  assert sum(math.prod(parameter.shape) for parameter in model.parameters.values()) == SIZES[size][8]
