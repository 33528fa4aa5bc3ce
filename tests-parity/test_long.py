"""Sequences of thousands of tokens, whose attention is computed block by block."""

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh

from models_automodel import AutoModel

T, WINDOW = 4096, 700
SIZES = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": T,
  "initializer_range": 32**-0.5,
}
MODELS = {
  "Llama": {},
  "Gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
  "Gemma3Text": {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"],
  },
}


def explicit_mesh(devices, axes):
  return jax.make_mesh(devices.shape, axes, devices=devices.flatten())


@pytest.mark.parametrize(("name", "kind"), [("Llama", None), ("Gemma2", explicit_mesh), ("Gemma3Text", Mesh)])
def test_left_padding_and_packed_sequences(name, kind, tmp_path, assert_parity):
  torch.manual_seed(0)
  config = getattr(transformers, f"{name}Config")(**SIZES | MODELS[name])
  theirs = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
  theirs = theirs._from_config(config, attn_implementation="eager").eval()
  theirs.save_pretrained(tmp_path)
  mesh = kind and kind(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))
  model, _ = AutoModel.from_pretrained(tmp_path, mesh, dtype="float32", progress=False)
  call = nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs)[0])
  tokens = np.random.default_rng(0).integers(0, 96, (2, T))
  padding, length = 300, 1500
  with torch.no_grad():
    whole = theirs(torch.tensor(tokens[:1])).logits[0].numpy()
    short = theirs(torch.tensor(tokens[1:, padding:])).logits[0].numpy()
    parts = [theirs(torch.tensor(part[None])).logits[0].numpy() for part in np.split(tokens[0], [length])]
  positions = np.stack([np.arange(T), np.maximum(np.arange(T) - padding, -1)])
  logits = np.asarray(call(model, tokens, positions))
  assert_parity(logits[0], whole, what="a whole sequence")
  assert_parity(logits[1, padding:], short, what="left padding")
  packed = np.concatenate([np.arange(length), np.arange(T - length)])[None].repeat(2, 0)
  segments = (np.arange(T) >= length).astype(np.int32)[None].repeat(2, 0)
  logits = np.asarray(call(model, tokens, packed, segment_ids=segments))
  assert_parity(logits[0], np.concatenate(parts), what="packed")


def test_blocks_are_as_exact_as_attention_at_once(tmp_path):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**SIZES)
  theirs = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
  theirs.save_pretrained(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 96, (1, 1024))
  with torch.no_grad():
    exact = theirs.double()(torch.tensor(tokens)).logits.numpy()

  def error(kind):
    model, _ = AutoModel.from_pretrained(tmp_path, dtype="float32", progress=False, attn_implementation=kind)
    logits = nnx.jit(lambda model, tokens: model(tokens)[0])(model, tokens)
    return np.abs(np.asarray(logits, np.float64) - exact).mean()

  assert error("blockwise") <= 1.5 * error("dense")
