"""What the first layer sees: the embedding times sqrt(D), as the published models compute it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.dummy_model_creator import create_dummy_model

from . import test_contract

CONTRACTS = {
  "gemma": test_contract.TestGemma1,
  "gemma2": test_contract.TestGemma2,
  "gemma3": test_contract.TestGemma3,
}


def hidden_of_the_embedding_alone(contract, dtype):
  """A model whose layers add nothing, and the hidden states of each token of its vocabulary [1, V, D]."""
  # The large epsilon makes the final norm divide by a constant instead of normalising.
  config = dataclasses.replace(contract.config, norm_eps=1e4)
  model = create_dummy_model(contract.family.model_class, config, dtype=dtype, scale=1.0)
  for layer in model.layers:
    for projection in (layer.attn.o_proj, layer.mlp.down_proj):
      projection.w.set_value(jnp.zeros_like(projection.w[...]))
  tokens = np.arange(config.num_embed, dtype=np.int32)[None]
  return model, nnx.jit(lambda model, t: model(t, t, skip_lm_head=True)[0])(model, tokens)


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
@pytest.mark.parametrize(
  ("dtype", "factor"),
  [("bfloat16", 6.9375), ("float16", 6.9296875), ("float32", 6.928203105926514)],
)
def test_the_factor_is_rounded_to_the_dtype_of_the_embedding(contract, dtype, factor):
  """sqrt(48) = 6.92820323, rounded to each dtype."""
  assert contract.config.embed_dim == 48
  model, hidden = hidden_of_the_embedding_alone(contract, dtype)
  dtype = jnp.dtype(dtype)
  embedding = np.asarray(model.embedder.input_embedding[...])
  # The product of two numbers of few bits is exact in float64, and rounded once.
  expected = (embedding.astype(np.float64) * factor).astype(np.float32).astype(dtype)
  np.testing.assert_array_equal(hidden[0], model.final_norm(jnp.asarray(expected)))
