"""Tokens and log-probabilities of models that qwix gave LoRA factors to, or quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from models_core.generation import generate, score

from .subjects import PROJECTIONS, cells, logits, with_lora

PROMPTS = [[3, 1, 4, 1, 5], [2, 7]]
NEW = 6


def check(subject, model):
  """Compares with passes over whole rows without a cache."""
  out = generate(model, PROMPTS, max_new_tokens=NEW)
  scored = score(model, PROMPTS, out.tokens)
  for prompt, tokens, found, again in zip(PROMPTS, out.tokens, out.log_probs, scored, strict=True):
    row = jnp.asarray([[*prompt, *tokens.tolist()]], jnp.int32)
    with subject.context():
      full = np.asarray(jax.nn.log_softmax(np.asarray(logits(model, row))[0]))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(found, full[np.arange(NEW), tokens], atol=2e-4)
    np.testing.assert_allclose(found, full.max(-1), atol=2e-4)
    np.testing.assert_allclose(again.log_probs, found, atol=2e-4)


@cells("generation with LoRA factors", ("llama3", "Auto"), ("llama3", "Explicit"))
def test_with_lora_factors(subject):
  with subject.context():
    model = with_lora(subject.model())
    before = generate(model, PROMPTS, max_new_tokens=NEW)
    factors = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, factors))
  after = generate(model, PROMPTS, max_new_tokens=NEW)
  assert any((a != b).any() for a, b in zip(before.log_probs, after.log_probs, strict=True))
  check(subject, model)


@cells("generation, int8", ("llama3", "one device"), ("llama3", "Auto"))
def test_quantised(subject):
  model = subject.model()
  with subject.context():
    rule = qwix.QuantizationRule(module_path=PROJECTIONS, weight_qtype="int8")
    small = qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())
  check(subject, small)
