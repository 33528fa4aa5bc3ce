"""Qwen 3 with experts as MLX stores it: experts in one tensor, and embedding, router and head quantised, too."""

import json

import numpy as np
import pytest
from flax import nnx

from models_core.formats import LocalFiles, file_layout, read_safetensors
from models_core.loading import abstract_model, load, plan_load
from models_core.testing import MESHES
from models_qwen.qwen3 import FAMILY
from models_qwen.qwen3.model import ModelConfig

D, F, E, V, GROUP = 64, 32, 4, 48, 32
CONFIG = ModelConfig(
  num_layers=1,
  vocab_size=V,
  embed_dim=D,
  hidden_dim=F,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  norm_eps=1e-6,
  rope_theta=1e4,
  num_experts=E,
  num_experts_per_tok=2,
  moe_hidden_dim=F,
  norm_topk_prob=True,
)
M = "model.layers.0"
# Our parameter -> the module in the file, and the shape there.
QUANTISED = {
  "embedder.input_embedding": ("model.embed_tokens", (V, D)),
  "lm_head.w": ("lm_head", (V, D)),
  "layers.0.attn.q_proj.w": (f"{M}.self_attn.q_proj", (64, D)),
  "layers.0.attn.k_proj.w": (f"{M}.self_attn.k_proj", (32, D)),
  "layers.0.attn.v_proj.w": (f"{M}.self_attn.v_proj", (32, D)),
  "layers.0.attn.o_proj.w": (f"{M}.self_attn.o_proj", (D, 64)),
  "layers.0.mlp.router.w": (f"{M}.mlp.gate", (E, D)),
  "layers.0.mlp.experts.gate_proj": (f"{M}.mlp.switch_mlp.gate_proj", (E, F, D)),
  "layers.0.mlp.experts.up_proj": (f"{M}.mlp.switch_mlp.up_proj", (E, F, D)),
  "layers.0.mlp.experts.down_proj": (f"{M}.mlp.switch_mlp.down_proj", (E, D, F)),
}
NORMS = {
  f"{M}.input_layernorm": D, f"{M}.post_attention_layernorm": D, "model.norm": D,
  f"{M}.self_attn.q_norm": 16, f"{M}.self_attn.k_norm": 16,
}  # fmt: skip


def quantised(rng, shape):
  """Codes of 8 bits, and the numbers that they stand for."""
  codes = rng.integers(0, 256, shape, np.uint8)
  scales, biases = (rng.normal(size=(*shape[:-1], shape[-1] // GROUP)).astype(np.float16) for _ in range(2))
  spread = lambda numbers: np.repeat(numbers.astype(np.float32), GROUP, -1)
  stored = {"weight": codes.view(np.uint32), "scales": scales, "biases": biases}
  return stored, codes.astype(np.float32) * spread(scales) + spread(biases)


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_experts_in_one_tensor(tmp_path, mesh):
  rng, tensors, expected = np.random.default_rng(0), {}, {}
  for name, (module, shape) in QUANTISED.items():
    stored, expected[name] = quantised(rng, shape)
    tensors |= {f"{module}.{end}": tensor for end, tensor in stored.items()}
  tensors |= {f"{module}.weight": np.ones(size, np.float16) for module, size in NORMS.items()}
  beginning, starts = file_layout({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
  with open(tmp_path / "model.safetensors", "wb") as file:
    file.write(beginning)
    for name in sorted(starts, key=lambda name: starts[name]):
      file.write(tensors[name].tobytes())
  (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": GROUP, "bits": 4}}))
  model = abstract_model(FAMILY.model_class, CONFIG, mesh and MESHES[mesh]())
  checkpoint = read_safetensors(LocalFiles(str(tmp_path)))
  loaded = load(plan_load(checkpoint, model, FAMILY.huggingface, dtype=np.dtype(np.float32)))
  state = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(loaded, nnx.Param))}
  for name, numbers in expected.items():
    np.testing.assert_array_equal(state[name].get_value(), numbers, name)
