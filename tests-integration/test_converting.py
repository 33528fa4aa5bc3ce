"""`automodel convert` on real weights, and between the naming schemes of every family."""

import jax
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel
from models_automodel.cli.generate import packaged_model
from models_automodel.convert import convert
from models_core.dummy_model_creator import create_dummy_model
from models_gemma.gemma.model import AttentionType, Gemma
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3.model import Llama3
from models_llama.llama3.model import ModelConfig as Llama3Config
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen2.model import Qwen2
from models_qwen.qwen3.model import ModelConfig as Qwen3Config
from models_qwen.qwen3.model import Qwen3

SIZES = {
  "num_layers": 2,
  "embed_dim": 64,
  "hidden_dim": 96,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 16,
  "norm_eps": 1e-6,
  "rope_theta": 1e4,
}
GEMMA = SIZES | {
  "num_embed": 128,
  "query_pre_attn_scalar": 16,
  "attention_types": (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
  "sliding_window_size": 8,
}
GEMMA_1 = {
  "attention_types": (AttentionType.GLOBAL,) * 2,
  "sliding_window_size": None,
  "final_logit_softcap": None,
  "use_post_attn_norm": False,
  "use_post_ffw_norm": False,
}
GEMMA_2 = {
  "final_logit_softcap": 30.0,
  "attn_logits_soft_cap": 50.0,
  "use_post_attn_norm": True,
  "use_post_ffw_norm": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_hidden_dim": 16, "norm_topk_prob": True}
MODELS = {
  "gemma 1": (Gemma, GemmaConfig(**GEMMA | GEMMA_1)),
  "gemma 1 7b": (Gemma, GemmaConfig(**GEMMA | GEMMA_1 | {"num_kv_heads": 4})),
  "gemma 2": (Gemma, GemmaConfig(**GEMMA | GEMMA_2)),
  "gemma 3": (Gemma3, Gemma3Config(**GEMMA, local_rope_theta=100.0)),
  "llama 3": (Llama3, Llama3Config(**SIZES, vocab_size=128)),
  "llama 3, tied": (Llama3, Llama3Config(**SIZES, vocab_size=128, weight_tying=True)),
  "qwen 2": (Qwen2, Qwen2Config(**SIZES, vocab_size=128)),
  "qwen 3": (Qwen3, Qwen3Config(**SIZES, vocab_size=128, use_tied_embedding=True)),
  "qwen 3 with experts": (Qwen3, Qwen3Config(**SIZES, vocab_size=128, **EXPERTS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_to_an_orbax_tree_and_back(name, tmp_path):
  model_class, config = MODELS[name]
  model = create_dummy_model(model_class, config, dtype="bfloat16")
  AutoModel.save_pretrained(model, tmp_path / "first", progress=False)
  convert(str(tmp_path / "first"), tmp_path / "tree", to="orbax", progress=False)
  convert(str(tmp_path / "tree"), tmp_path / "last", progress=False)
  files = sorted(path.name for path in (tmp_path / "first").iterdir())
  assert sorted(path.name for path in (tmp_path / "last").iterdir()) == files
  for file in files:
    assert (tmp_path / "last" / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file
  mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
  sharded, _ = AutoModel.from_pretrained(str(tmp_path / "tree"), mesh, progress=False)
  assert sharded.config == config
  pairs = zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, sharded)), strict=True)
  for (path, ours), (_, theirs) in pairs:
    assert np.asarray(ours.get_value()).tobytes() == np.asarray(theirs.get_value()).tobytes(), path


def test_a_gguf_file_becomes_a_directory(tmp_path):
  source = packaged_model()
  convert(source, tmp_path / "out", dtype="bfloat16", progress=False)
  model, _ = AutoModel.from_pretrained(str(tmp_path / "out"), progress=False)
  again, _ = AutoModel.from_pretrained(source, dtype="bfloat16", progress=False)
  assert model.config == again.config
  np.testing.assert_array_equal(
    model.layers[3].attn.q_proj.w.get_value(), again.layers[3].attn.q_proj.w.get_value()
  )
