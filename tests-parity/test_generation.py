"""Greedy decoding of batches of unequal prompts in every family, and each filter of the sampling."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from models_core.generation import Sampling, generate, score
from models_core.generation.sampling import distribution, numbers_of, penalise, steps_of

SIZES = {
  "vocab_size": 101,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "rms_norm_eps": 1e-2,
  "max_position_embeddings": 512,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
GEMMA = {"query_pre_attn_scalar": 9, "sliding_window": 20}
# family -> (architecture, class of its configuration, what differs from SIZES).
FAMILIES = {
  "llama3": ("Llama", "Llama", {}),
  "gemma": ("Gemma", "Gemma", {}),
  "gemma2": ("Gemma2", "Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0}),
  "gemma3": ("Gemma3", "Gemma3Text", GEMMA | {"sliding_window_pattern": 2}),
  "qwen2": ("Qwen2", "Qwen2", {"head_dim": 8}),
  "qwen3": ("Qwen3", "Qwen3", {}),
  "qwen3 experts": (
    "Qwen3Moe",
    "Qwen3Moe",
    {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
  ),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, SIZES["vocab_size"], n).tolist() for n in (5, 41, 1, 23)]
NEW = 64
# Where the two likeliest tokens are closer than this, rounding decides, and rows may part.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, open_checkpoint):
  @functools.cache
  def write(family):
    architecture, config, fields = FAMILIES[family]
    config = getattr(transformers, f"{config}Config")(**SIZES | fields)
    model = getattr(transformers, f"{architecture}ForCausalLM")._from_config(
      config, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for weight in model.parameters():
        if weight.ndim == 1:
          weight.normal_(0.0 if "Gemma" in architecture else 1.0, 0.2, generator=generator)
        else:
          # Larger than at initialisation, so that attention picks and texts do not repeat one token.
          weight.normal_(0, 1.6 * weight.shape[-1] ** -0.5, generator=generator)
    path = tmp_path_factory.mktemp("family")
    model.eval().save_pretrained(path)
    return open_checkpoint(path), model

  return write


def continued(model):
  """Greedy tokens [B, NEW] of transformers, by one call with padding on the left, and its logits [B, NEW, V]."""
  longest = max(map(len, PROMPTS))
  tokens = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
  mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
  out = model.generate(
    tokens,
    attention_mask=mask,
    do_sample=False,
    max_new_tokens=NEW,
    pad_token_id=0,
    output_logits=True,
    return_dict_in_generate=True,
  )
  return out.sequences[:, longest:].numpy(), torch.stack(out.logits, 1).numpy()


@pytest.mark.parametrize("placement", ["one-jit"], indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding(checkpoint, family, placement, assert_parity):
  source, reference = checkpoint(family)
  theirs, logits = continued(reference)
  model = source.model(placement)
  ours = generate(model, PROMPTS, max_new_tokens=NEW)
  compared = 0
  for row, (tokens, expected) in enumerate(zip(ours.tokens, theirs, strict=True)):
    second, first = np.sort(logits[row], -1)[:, -2:].T
    certain = np.append(first - second > NEAR_TIE, False)
    n = int(np.argmin(certain))
    compared += n
    assert tokens[:n].tolist() == expected[:n].tolist()
    expected_log_probs = torch.log_softmax(torch.tensor(logits[row, :n]), -1).numpy()[
      np.arange(n), expected[:n]
    ]
    assert_parity(ours.log_probs[row][:n], expected_log_probs, what=family)
  assert compared >= 0.9 * theirs.size
  scored = score(model, PROMPTS, list(theirs))
  for row, found in enumerate(scored):
    expected = torch.log_softmax(torch.tensor(logits[row]), -1).numpy()[np.arange(NEW), theirs[row]]
    assert_parity(found.log_probs, expected, what=f"{family} scores")
    assert found.is_likeliest.mean() >= 0.9


LOGITS = RNG.normal(size=(5, 1000)).astype(np.float32) * 3
# Our numbers and transformers' processors, in its order.
FILTERS = {
  "temperature": (Sampling(temperature=0.7), [transformers.TemperatureLogitsWarper(0.7)]),
  "top-k": (Sampling(temperature=1.0, top_k=7), [transformers.TopKLogitsWarper(7)]),
  "top-p": (Sampling(temperature=1.0, top_p=0.6), [transformers.TopPLogitsWarper(0.6)]),
  "min-p": (Sampling(temperature=1.0, min_p=0.05), [transformers.MinPLogitsWarper(0.05)]),
  "all": (
    Sampling(temperature=1.4, top_k=300, top_p=0.85, min_p=0.02),
    [
      transformers.TemperatureLogitsWarper(1.4),
      transformers.TopKLogitsWarper(300),
      transformers.TopPLogitsWarper(0.85),
      transformers.MinPLogitsWarper(0.02),
    ],
  ),
}


@pytest.mark.parametrize(("sampling", "processors"), FILTERS.values(), ids=FILTERS)
def test_filters(sampling, processors):
  theirs = torch.tensor(LOGITS)
  for processor in processors:
    theirs = processor(None, theirs)
  scores, ids = jax.jit(distribution, static_argnums=1)(LOGITS, steps_of(sampling), numbers_of(sampling))
  ours = np.asarray(scores)
  if ids is not None:
    ours = np.full(LOGITS.shape, -np.inf, np.float32)
    np.put_along_axis(ours, np.asarray(ids), np.asarray(scores), 1)
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_repetition_penalty():
  rows = RNG.integers(0, 1000, (5, 30))
  theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(rows), torch.tensor(LOGITS))
  seen = np.zeros(LOGITS.shape, bool)
  np.put_along_axis(seen, rows, True, 1)
  np.testing.assert_allclose(penalise(LOGITS, seen, np.float32(1.3)), theirs.numpy(), rtol=1e-6)
