"""Files as they come: sharded, in half precision, of mixed dtypes, tied models with a head."""

import numpy as np
import pytest
import torch
from flax import nnx

from models_core.errors import CheckpointError

MESHES = pytest.mark.parametrize("placement", ["one-eager", "explicit-jit", "auto-eager"], indirect=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The dtypes that a checkpoint's tensors have in turn.
STORED = {
  "bfloat16": ["bfloat16"],
  "float16": ["float16"],
  "mixed": ["bfloat16", "float32", "float16"],
  "mixed-halves": ["bfloat16", "float16"],
}


def _store(names):
  return lambda state: {
    key: state[key].to(DTYPES[names[i % len(names)]]).contiguous() for i, key in enumerate(sorted(state))
  }


@MESHES
@pytest.mark.parametrize("variant", ["untied", "divisible-tied"], indirect=True)
def test_sharded_files(checkpoint, variant, placement, tokens, assert_parity):
  source = checkpoint(variant, max_shard_size="40KB")
  assert (source.path / "model.safetensors.index.json").exists()
  assert len(list(source.path.glob("*.safetensors"))) > 3
  assert_parity(placement.logits(source.model(placement), tokens), source.logits(tokens))


@MESHES
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("variant", ["untied", "tied"], indirect=True)
def test_stored_dtypes_loaded_as_float32(edit, variant, stored, placement, tokens, assert_parity):
  source = edit(variant, tensors=_store(STORED[stored]))
  assert_parity(placement.logits(source.model(placement), tokens), source.logits(tokens), what=stored)


@MESHES
@pytest.mark.parametrize("stored", STORED)
def test_stored_dtypes_loaded_as_stored(edit, stored, placement, tokens):
  """Every parameter keeps its dtype and numbers; the products of different dtypes stay near the reference."""
  source = edit("untied", tensors=_store(STORED[stored]))
  model, wide = source.model(placement, None), source.model(placement)
  parameters, widened = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, wide))
  dtypes = {str(p.get_value().dtype) for p in parameters.values()}
  assert dtypes == set(STORED[stored])
  for path, parameter in parameters.items():
    np.testing.assert_array_equal(np.asarray(parameter.get_value(), np.float32), widened[path].get_value())
  logits, expected = placement.logits(model, tokens), source.logits(tokens)
  assert logits.dtype == np.float32
  assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


@MESHES
def test_tied_model_with_an_equal_head(edit, placement, tokens, assert_parity):
  def with_head(state):
    return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

  source = edit("tied", tensors=with_head)
  assert_parity(placement.logits(source.model(placement), tokens), source.logits(tokens))


@MESHES
def test_tied_model_with_another_head(edit, placement):
  def with_head(state):
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-3
    return state | {"lm_head.weight": head}

  with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
    edit("tied", tensors=with_head).model(placement)
