"""Writes golden/: a tiny checkpoint of transformers with its float32 logits. Needs torch and transformers.

python tests/make_golden.py
"""

import pathlib

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "golden"
CONFIG = transformers.Olmo2Config(
  vocab_size=53,
  hidden_size=24,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=6,
  num_key_value_heads=2,
  rms_norm_eps=1e-3,
  max_position_embeddings=256,
  rope_parameters={"rope_type": "default", "rope_theta": 700.0},
  pad_token_id=None,
  bos_token_id=None,
  eos_token_id=None,
)


def main() -> None:
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24), dtype=np.int32)
  model = transformers.Olmo2ForCausalLM(CONFIG).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      # Activations stay at O(1), attention picks, and no norm is 1.
      if weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
      else:
        weight.normal_(0, 1.5 * weight.shape[1] ** -0.5, generator=generator)
    logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  model.save_pretrained(GOLDEN)
  (GOLDEN / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(GOLDEN / "reference.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
  main()
