"""The logits and greedy continuations of every variant, on every kind of mesh."""

import jax
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

OUTSIDE = ["one-eager", "one-jit", "explicit-eager", "explicit-jit", "auto-eager", "auto-jit"]
INSIDE = ["explicit-eager-inside", "explicit-jit-inside", "auto-eager-inside", "auto-jit-inside"]


@pytest.mark.parametrize("placement", OUTSIDE, indirect=True)
def test_logits(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant)
  assert_parity(placement.logits(source.model(placement), tokens), source.logits(tokens))


@pytest.mark.parametrize("placement", INSIDE, indirect=True)
@pytest.mark.parametrize("variant", ["untied", "divisible-tied", "llama3-32"], indirect=True)
def test_logits_in_set_mesh(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant)
  assert_parity(placement.logits(source.model(placement), tokens), source.logits(tokens))


@pytest.mark.parametrize("placement", [*OUTSIDE[2:], *INSIDE], indirect=True)
@pytest.mark.parametrize("variant", ["untied", "divisible"], indirect=True)
def test_tokens_that_lie_on_the_mesh(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant)
  sharding = NamedSharding(placement.mesh, PartitionSpec("fsdp", None))
  placed = jax.device_put(tokens, sharding)
  positions = jax.device_put(np.broadcast_to(np.arange(40, dtype=np.int32), (4, 40)), sharding)
  assert_parity(placement.logits(source.model(placement), placed, positions), source.logits(tokens))


@pytest.mark.parametrize("placement", ["one-eager", "explicit-eager", "auto-eager"], indirect=True)
@pytest.mark.parametrize("variant", ["untied", "tied"], indirect=True)
def test_head_apart(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant)
  model, positions = source.model(placement), np.broadcast_to(np.arange(40, dtype=np.int32), (4, 40))
  hidden, _ = model(tokens, positions, skip_lm_head=True)
  assert_parity(model.compute_final_logits(hidden), source.logits(tokens))


@pytest.mark.parametrize("placement", ["one-jit", "explicit-jit", "auto-jit"], indirect=True)
def test_greedy_continuation(checkpoint, variant, placement, tokens):
  source, prompt = checkpoint(variant), tokens[:, :7]
  ours = placement.greedy_without_cache(source.model(placement), prompt, 40)
  np.testing.assert_array_equal(ours, source.greedy(prompt, 33))


@pytest.mark.parametrize(
  ("variant", "placement"),
  [
    ("mqa", "one-jit"),
    ("untied", "explicit-jit"),
    ("untied", "auto-jit-inside"),
    ("divisible-tied", "explicit-jit-inside"),
    ("divisible-tied", "auto-jit"),
  ],
  indirect=True,
)
def test_greedy_continuation_with_cache(checkpoint, variant, placement, tokens):
  source, prompt = checkpoint(variant), tokens[:, :7]
  np.testing.assert_array_equal(
    placement.greedy(source.model(placement), prompt, 24), source.greedy(prompt, 24)
  )


# A variant -> the configuration without what it is about.
WITHOUT = {
  "llama3-8": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
  "llama3-32": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
  "linear": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
  "theta-small": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
  "theta-large": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
  "untied": {"rms_norm_eps": 1e-5},
  "eps": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("variant", WITHOUT, indirect=True)
def test_a_variant_matters(random_reference, variant, tokens):
  """Without what it is about, transformers' logits differ by a thousand tolerances."""
  whole = random_reference(variant)(torch.tensor(tokens)).logits.detach().numpy()
  without = random_reference(variant, **WITHOUT[variant])(torch.tensor(tokens)).logits.detach().numpy()
  assert np.abs(whole - without).max() > 1000 * 2e-5 * np.abs(whole).max()
