"""Writes golden/: tiny checkpoints of transformers with its float32 logits. Needs torch and transformers.

python packages/models-llama/tests/make_golden.py
"""

import pathlib

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "golden"
NEW = 16

BASE = {
  "vocab_size": 53,
  "hidden_size": 24,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "rms_norm_eps": 1e-3,
  "max_position_embeddings": 256,
  "bos_token_id": None,
  "eos_token_id": None,
}
SCALING = {
  "rope_type": "llama3",
  "rope_theta": 700.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
# name -> what differs from BASE, and the dtype of the file. The logits are float32's.
CHECKPOINTS = {
  "llama3": ({"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}, torch.bfloat16),
  "llama3p1": ({"rope_parameters": SCALING | {"factor": 8.0}}, torch.float32),
  "llama3p2": ({"rope_parameters": SCALING | {"factor": 32.0}, "tie_word_embeddings": True}, torch.float16),
}


def random_weights(model: torch.nn.Module) -> None:
  """Activations stay at O(1), attention picks, and no norm is 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
      else:
        weight.normal_(0, 1.5 * weight.shape[1] ** -0.5, generator=generator)


def main() -> None:
  tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 24), dtype=np.int32)
  for name, (fields, dtype) in CHECKPOINTS.items():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | fields))
    random_weights(model)
    model.to(dtype).save_pretrained(GOLDEN / name)
    (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    inputs = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
      logits = model(inputs).logits.numpy()
    greedy = model.generate(
      inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    greedy = greedy[:, inputs.shape[1] :].numpy().astype(np.int32)
    np.savez_compressed(GOLDEN / name / "reference.npz", tokens=tokens, logits=logits, greedy=greedy)


if __name__ == "__main__":
  main()
