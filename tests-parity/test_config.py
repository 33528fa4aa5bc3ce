"""config.json in every spelling, read and written."""

import json

import numpy as np
import pytest

from models_automodel.families import family_of_model_type
from models_core.errors import ConfigError

SCALING = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
OLD = {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "llama3", **SCALING}}
OLDEST = {"rope_theta": 1000.0, "rope_scaling": {"type": "llama3", **SCALING}}
NEW = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1000.0, **SCALING}}
LINEAR_OLD = {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}}
LINEAR_OLDEST = {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.5}}

# A variant of the same numbers, and the keys of RoPE.
SPELLINGS = {
  "old": ("llama3-8", OLD),
  "old-type": ("llama3-8", OLDEST),
  "old-both-types": ("llama3-8", OLD | {"rope_scaling": OLDEST["rope_scaling"] | OLD["rope_scaling"]}),
  "old-null": ("untied", {"rope_theta": 321.5, "rope_scaling": None}),
  "old-without": ("untied", {"rope_theta": 321.5}),
  "new": ("llama3-8", NEW),
  "new-default": ("untied", {"rope_parameters": {"rope_type": "default", "rope_theta": 321.5}}),
  "both": ("llama3-8", OLD | NEW),
  "both-default": ("untied", {"rope_theta": 321.5, "rope_parameters": {"rope_type": "default", "rope_theta": 321.5}}),
  "linear": ("linear", LINEAR_OLD),
  "linear-type": ("linear", LINEAR_OLDEST),
}  # fmt: skip

CONTRADICTIONS = {
  "theta": (OLD | {"rope_theta": 999.0} | NEW, "theta"),
  "factor": (OLD | {"rope_parameters": NEW["rope_parameters"] | {"factor": 32.0}}, "scaling"),
  "scaled-and-default": (
    OLD | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "scaling",
  ),
  "types": (OLD | {"rope_scaling": OLD["rope_scaling"] | {"type": "linear"}}, "type"),
  "no-type": ({"rope_theta": 1e4, "rope_scaling": SCALING}, "rope_type is missing"),
  "unknown-type": ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
  "length-beside": (OLD | {"original_max_position_embeddings": 64}, "beside it"),
}

# What transformers writes for other computations than ours.
REFUSED = {"hidden_act": "gelu"}


def _respell(rope):
  return lambda raw: {k: v for k, v in raw.items() if not k.startswith("rope_")} | rope


@pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_rope(checkpoint, edit, spelling, placement, tokens, assert_parity):
  """Equal to transformers on the same file, and on the file that it wrote itself."""
  variant, rope = SPELLINGS[spelling]
  source = edit(variant, config=_respell(rope))
  logits = placement.logits(source.model(placement), tokens)
  assert_parity(logits, checkpoint(variant).logits(tokens), what=spelling)
  assert_parity(logits, source.logits(tokens), what=spelling)


@pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_errors(edit, case, placement):
  rope, words = CONTRADICTIONS[case]
  with pytest.raises(ConfigError, match=words):
    edit("llama3-8", config=_respell(rope)).model(placement)


@pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
@pytest.mark.parametrize("key", REFUSED)
def test_other_computations_are_refused(edit, key, placement):
  with pytest.raises(ConfigError, match=key):
    edit("untied", config=lambda raw: raw | {key: REFUSED[key]}).model(placement)


@pytest.mark.parametrize("placement", ["one-eager"], indirect=True)
def test_config_round_trip(checkpoint, edit, variant, placement, tokens, assert_parity):
  """What is written here reads the same here and in transformers."""
  raw = json.loads((checkpoint(variant).path / "config.json").read_text())
  family = family_of_model_type(raw["model_type"], variant)
  config = family.read_config(raw)
  written = family.write_config(config)
  assert family.read_config(json.loads(json.dumps(written))) == config
  source, expected = edit(variant, config=lambda _: written), checkpoint(variant).logits(tokens)
  np.testing.assert_array_equal(source.logits(tokens), expected)
  assert_parity(placement.logits(source.model(placement), tokens), expected)
