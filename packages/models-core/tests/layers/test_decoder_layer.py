"""The pre-norm layer, around blocks that are easy to predict."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.layers.decoder_layer import PreNormLayer
from models_core.layers.parameters import parameter
from models_core.layers.remat import RematConfig
from models_core.sharding import ShardingConfig

REMATS = [RematConfig.NONE, RematConfig.BLOCK, RematConfig.DECODER]
D, EPS = 4, 1e-3


class Scale(nnx.Module):
  """Multiplies by a parameter."""

  def __init__(self, *, rngs):
    self.w = parameter((D,), (None,), rngs=rngs)

  def __call__(self, x):
    return x * self.w[...]


class Attention(Scale):
  def __call__(self, x, positions, rotary, cache, mask):
    return super().__call__(x), (positions, rotary, cache, mask)


def make(remat, rngs):
  shd = ShardingConfig.get_default_sharding()
  config = types.SimpleNamespace(embed_dim=D, norm_eps=EPS, shd_config=shd, remat_config=remat)
  return PreNormLayer(config, Attention, Scale, rngs=rngs)


@pytest.mark.parametrize("remat", REMATS)
def test_each_block_adds_to_what_its_norm_got(remat):
  layer = make(remat, nnx.Rngs(0))
  x = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
  norm = lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
  expected = x + norm(x) * np.asarray(layer.attn.w[...])
  expected = expected + norm(expected) * np.asarray(layer.mlp.w[...])
  out, passed = layer(jnp.asarray(x), *map(jnp.asarray, (1, 2, 3, 4)))
  np.testing.assert_allclose(out, expected, rtol=1e-5)
  assert tuple(map(int, passed)) == (1, 2, 3, 4)


def test_parameters_draw_in_the_order_of_the_tokens_way():
  layer, rngs = make(RematConfig.NONE, nnx.Rngs(0)), nnx.Rngs(0)
  for found in (layer.input_layernorm, layer.attn, layer.post_attention_layernorm, layer.mlp):
    expected = parameter((D,), (None,), rngs=rngs, init=found.w.get_metadata()["init"])
    np.testing.assert_array_equal(found.w[...], expected[...])
