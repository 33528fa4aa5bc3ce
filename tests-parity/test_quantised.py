"""Logits of quantised checkpoints: those of a transformers model that holds the numbers of the codes and scales."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from models_automodel import AutoModel

# Sizes that blocks of 128 and groups of 32 do not divide evenly among rows and words.
SIZES = {
  "vocab_size": 136,
  "hidden_size": 160,
  "intermediate_size": 352,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 40,
}
IDS = torch.tensor([[3, 17, 99, 5, 120, 64, 2, 7]])


def fp8(weight):
  """Blocks of 128 x 128, the last ones partial."""
  rows, columns = (-(-size // 128) for size in weight.shape)
  scale = torch.zeros(rows, columns)
  spread = lambda grid: grid.repeat_interleave(128, 0).repeat_interleave(128, 1)[
    : weight.shape[0], : weight.shape[1]
  ]
  for row in range(rows):
    for column in range(columns):
      scale[row, column] = (
        weight[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128].abs().max() / 448
      )
  codes = (weight / spread(scale)).to(torch.float8_e4m3fn)
  return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread(scale)


def gptq(weight):
  """4 bits along the inputs, in groups of 32 whose members are anywhere, zero points less 1."""
  outputs, inputs = weight.shape
  owner = torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) // 32
  groups = inputs // 32
  low = torch.stack([weight[:, owner == g].amin(1) for g in range(groups)])
  high = torch.stack([weight[:, owner == g].amax(1) for g in range(groups)])
  scale = ((high - low) / 15).half()
  zero = (-low / scale.float()).round().clamp(1, 15).int()
  codes = (weight.T / scale.float()[owner] + zero[owner]).round().clamp(0, 15).int()
  shifts = torch.arange(0, 32, 4)
  along_rows = (
    (codes.reshape(-1, 8, outputs).long() << shifts[:, None]).sum(1).to(torch.uint32).view(torch.int32)
  )
  along_columns = (
    ((zero - 1).reshape(groups, -1, 8).long() << shifts).sum(-1).to(torch.uint32).view(torch.int32)
  )
  stored = {"qweight": along_rows, "qzeros": along_columns, "scales": scale, "g_idx": owner.int()}
  return stored, ((codes - zero[owner]).float() * scale.float()[owner]).T.contiguous()


CASES = {
  "fp8": (Qwen3ForCausalLM, Qwen3Config, fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
  "gptq": (
    LlamaForCausalLM, LlamaConfig, gptq,
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path):
  model_class, config_class, quantise, said = CASES[name]
  torch.manual_seed(0)
  config = config_class(**SIZES, tie_word_embeddings=False)
  model = model_class(config).eval()
  tensors, numbers = {}, {}
  for key, weight in model.state_dict().items():
    if key.endswith("_proj.weight"):
      stored, numbers[key] = quantise(weight.float())
      tensors |= {f"{key.removesuffix('weight')}{end}": tensor.contiguous() for end, tensor in stored.items()}
    else:
      tensors[key] = weight.contiguous()
  model.load_state_dict(numbers, strict=False)
  save_file(tensors, tmp_path / "model.safetensors")
  raw = config.to_dict() | {"architectures": [model_class.__name__], "quantization_config": said}
  (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
  with torch.no_grad():
    expected = model(IDS).logits.numpy()
  ours, _ = AutoModel.from_pretrained(str(tmp_path), dtype="float32")
  positions = np.arange(IDS.shape[1], dtype=np.int32)[None]
  logits = np.asarray(ours(IDS.numpy().astype(np.int32), positions)[0])
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
