"""Which modules a pattern matches, against the modules that qwix adapts, for every family."""

import dataclasses

import pytest
import qwix
from flax import nnx

from models_core.adapters import match_modules, unmatched
from models_core.dummy_model_creator import create_dummy_model
from models_gemma.gemma.model import Gemma
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3.model import Llama3
from models_llama.llama3.model import ModelConfig as LlamaConfig
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen2.model import Qwen2
from models_qwen.qwen3.model import ModelConfig as Qwen3Config
from models_qwen.qwen3.model import Qwen3

TINY = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_hidden_dim": 8}
FAMILIES = {
  "gemma": (Gemma, dataclasses.replace(GemmaConfig.gemma2_2b(), **TINY, num_embed=32)),
  "gemma3": (Gemma3, dataclasses.replace(Gemma3Config.gemma3_1b(), **TINY, num_embed=32)),
  "llama3": (Llama3, dataclasses.replace(LlamaConfig.llama3p1_8b(), **TINY, vocab_size=32)),
  "qwen2": (Qwen2, dataclasses.replace(Qwen2Config.qwen2p5_0p5b(), **TINY, vocab_size=32)),
  "qwen3": (Qwen3, dataclasses.replace(Qwen3Config.qwen3_0p6b(), **TINY, vocab_size=32)),
}
SPARSE = dataclasses.replace(Qwen3Config.qwen3_30b_a3b(), **TINY, **EXPERTS, vocab_size=32)

# qwix uses older names of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def adapted(model, pattern):
  """Paths of the modules to which qwix adds factors."""
  provider = qwix.LoraProvider(module_path=pattern, rank=2, alpha=2.0)
  model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
  state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
  return {"/".join(map(str, path[:-1])) for path, _ in state}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_that_match_are_those_that_qwix_adapts(family):
  for pattern in (".*", ".*q_proj|.*down_proj", "layers/1/.*", ".*q_einsum", "q_proj"):
    model = create_dummy_model(*FAMILIES[family])
    expected = set(match_modules(model, pattern))
    if hasattr(model, "lm_head"):
      # A lookup of tokens is no product.
      expected.discard("embedder")
    assert adapted(model, pattern) == expected, pattern


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suggestion_is_adapted(family):
  model = create_dummy_model(*FAMILIES[family])
  found = unmatched(model, ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum")
  assert found == {
    ".*q_einsum": (".*q_proj",),
    ".*kv_einsum": (".*k_proj", ".*v_proj"),
    ".*attn_vec_einsum": (".*o_proj",),
  }
  meant = "|".join(one for near in found.values() for one in near)
  assert len(adapted(model, meant)) == 4 * model.config.num_layers


def test_the_experts_of_a_layer_are_one_module():
  model = create_dummy_model(Qwen3, SPARSE)
  experts = (".*experts",)
  found = unmatched(model, ".*gate_proj|.*up_proj|.*experts|.*router")
  assert found == {".*gate_proj": experts, ".*up_proj": experts}
  assert adapted(model, ".*gate_proj") == set()
  model = create_dummy_model(Qwen3, SPARSE)
  assert adapted(model, ".*") == set(match_modules(model, ".*")) - {"embedder"}
  assert "layers/1/mlp/experts" in match_modules(model, ".*")


def test_quantised_weights_keep_the_paths_of_their_modules():
  model = create_dummy_model(*FAMILIES["llama3"])
  rule = qwix.QuantizationRule(module_path=".*q_proj", weight_qtype="int8")
  quantised = qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())
  assert match_modules(quantised, ".*") == match_modules(model, ".*")
