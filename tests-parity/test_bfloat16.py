"""In bfloat16 the error against float32 on the same weights is no larger than transformers' own."""

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("optimized")

SEEDS = range(16)
# Of one model's errors [B, T, V]. The largest is averaged over the models: that of a single one is chance.
STATISTICS = {
  "mean": np.mean,
  "largest": np.max,
  "99.9th percentile": lambda errors: np.quantile(errors, 0.999),
}


@pytest.mark.parametrize(
  ("variant", "placement"),
  [
    ("untied", "one-eager"),
    ("untied", "one-jit"),
    ("untied", "explicit-jit"),
    ("mqa", "one-jit"),
    ("llama3-8", "auto-jit"),
    ("divisible-tied", "one-jit"),
    ("divisible-tied", "explicit-jit-inside"),
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
  for name, statistic in STATISTICS.items():
    ratio = np.mean([*map(statistic, ours)]) / np.mean([*map(statistic, theirs)])
    assert ratio <= 1, f"the {name} of our errors is {ratio:.2f} of theirs"
