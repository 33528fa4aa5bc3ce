"""Heads that are the embedding, or are said to be: as transformers takes them."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from models_automodel import AutoModel
from models_core.errors import CheckpointError

SIZES = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
}
ONE = pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
# Architecture, and the field of our configuration.
FAMILIES = [
  ("Llama", "weight_tying"),
  ("Qwen3", "use_tied_embedding"),
  ("Gemma", "weight_tying"),
  ("Gemma3", "weight_tying"),
]


def make(architecture):
  """A random model whose head is its embedding."""
  torch.manual_seed(0)
  name = "Gemma3Text" if architecture == "Gemma3" else architecture
  config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=True, initializer_range=0.2)
  return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


def logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens), dtype=torch.long), use_cache=False).logits.float().numpy()


@ONE
@pytest.mark.parametrize(("architecture", "field"), FAMILIES)
def test_a_head_that_is_stored_alone(architecture, field, placement, tokens, tmp_path, assert_parity):
  model = make(architecture)
  model.save_pretrained(tmp_path)
  safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
  names = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
  assert "lm_head.weight" in names
  assert "model.embed_tokens.weight" not in names
  ours, _ = AutoModel.from_pretrained(tmp_path, dtype="float32", progress=False)
  assert_parity(placement.logits(ours, tokens), logits(model, tokens))


@ONE
@pytest.mark.parametrize(("architecture", "field"), FAMILIES)
def test_the_remedy_for_two_heads_gives_the_logits_of_transformers_5(
  architecture, field, placement, tokens, tmp_path, assert_parity
):
  model = make(architecture)
  model.save_pretrained(tmp_path)
  file = tmp_path / "model.safetensors"
  tensors = safetensors.torch.load_file(file)
  head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
  safetensors.torch.save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
  with pytest.raises(CheckpointError, match=rf"pass {field}=False to load both"):
    AutoModel.from_pretrained(tmp_path, progress=False)
  ours, _ = AutoModel.from_pretrained(tmp_path, dtype="float32", progress=False, **{field: False})
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  assert_parity(placement.logits(ours, tokens), logits(theirs, tokens))


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_an_untied_model_is_saved_for_transformers(architecture, tokens, tmp_path, assert_parity):
  make(architecture).save_pretrained(tmp_path / "tied")
  raw = json.loads((tmp_path / "tied" / "config.json").read_text())
  torch.manual_seed(1)
  config = transformers.AutoConfig.for_model(**raw | {"tie_word_embeddings": False})
  untied = transformers.AutoModelForCausalLM.from_config(config).eval()
  untied.save_pretrained(tmp_path / "untied")
  ours, base = AutoModel.from_pretrained(tmp_path / "untied", progress=False)
  AutoModel.save_pretrained(ours, tmp_path / "again", base=base, progress=False)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
  assert not again.config.tie_word_embeddings
  assert_parity(logits(again, tokens), logits(untied, tokens))
