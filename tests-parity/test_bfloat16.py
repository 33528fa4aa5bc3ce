"""In bfloat16 the error against float32 on the same weights is no larger than transformers' own."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("optimized")

SEEDS = range(4)


@pytest.mark.parametrize(
  ("variant", "placement"),
  [
    ("untied", "one-eager"),
    ("untied", "one-jit"),
    ("untied", "explicit-jit"),
    ("divisible-tied", "one-jit"),
    ("divisible-tied", "explicit-jit-inside"),
    ("divisible-tied", "auto-jit"),
  ],
  indirect=True,
)
def test_error_of_bfloat16(checkpoint, variant, placement, tokens):
  ours, theirs = [], []
  for seed in SEEDS:
    source = checkpoint(variant, seed, "bfloat16")
    truth = source.logits(tokens)
    ours.append(np.abs(placement.logits(source.model(placement, "bfloat16"), tokens) - truth))
    theirs.append(np.abs(source.logits(tokens, dtype="bfloat16") - truth))
  assert np.mean(ours) <= np.mean(theirs)
  assert np.max(ours) <= np.max(theirs)
