"""A language model of attention alone, with values that need no compilation."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from models_core.layers.attention import attend, join_heads, split_heads
from models_core.layers.cache import extend_cache
from models_core.layers.causal_lm import CausalLM
from models_core.layers.linear import Embedder, Projection
from models_core.layers.norm import RMSNorm
from models_core.layers.remat import RematConfig
from models_core.layers.rope import rotary, rotate
from models_core.layers.scan import decoder_layers
from models_core.loading.abstract import abstract_model
from models_core.sharding import ShardingConfig

V, D, N, K, H = 16, 8, 4, 2, 4
T = 4
SHARDING = ShardingConfig.get_default_sharding()


@dataclasses.dataclass(frozen=True)
class Config:
  windows: tuple[int | None, ...] = (None,)
  vocab_size: int = V
  embed_dim: int = D
  num_kv_heads: int = K
  head_dim: int = H
  shd_config: Any = SHARDING
  remat_config: RematConfig = RematConfig.NONE
  scan_layers: bool = False


class Layer(nnx.Module):
  def __init__(self, config, *, rngs):
    shd = config.shd_config
    self.spec = shd.spec("act_btnh", "b t n h")
    q, kv = shd.spec("q_weight_dnh", "(n h) d"), shd.spec("kv_weight_dnh", "(k h) d")
    self.q = Projection(N * H, D, q, heads=(N, None), rngs=rngs)
    self.k = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.v = Projection(K * H, D, kv, heads=(K, None), rngs=rngs)
    self.o = Projection(D, N * H, shd.spec("o_weight_nhd", "d (n h)"), heads=(None, N), rngs=rngs)

  def __call__(self, x, positions, rotary, cache, mask):
    q = rotate(split_heads(self.q(x), N), positions, rotary)
    k = rotate(split_heads(self.k(x), K), positions, rotary)
    cache, k, v = extend_cache(cache, k, split_heads(self.v(x), K), positions)
    return x + self.o(join_heads(attend(q, k, v, mask, scale=0.5, spec=self.spec))), cache


class Model(CausalLM):
  def __init__(self, config, *, rngs):
    shd = config.shd_config
    self.config = config
    self.embedder = Embedder(V, D, shd.spec("emb_vd", "v d"), rngs=rngs)
    self.layers = decoder_layers(config, config.windows, lambda _: Layer(config, rngs=rngs))
    self.final_norm = RMSNorm(D, 1e-6, shd.spec("rms_norm_weight", "d"), rngs=rngs)

  def windows(self):
    return self.config.windows

  def _rotary(self, window):
    return rotary(H, 10.0 if window is None else 100.0)

  def _logits(self, hidden):
    return self.embedder.decode(hidden)


TOKENS = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
POSITIONS = np.broadcast_to(np.arange(T), (2, T))


@nnx.jit
def run(model, *args, **kwargs):
  return model(*args, **kwargs)


def make(mesh, config=Config()):
  """A model with values that need no compilation."""
  model, rng = abstract_model(Model, config, mesh), np.random.default_rng(0)
  arrays = {
    name: jax.device_put(rng.normal(size=p.shape).astype(np.float32) * 0.5, p.sharding)
    for name, p in model.parameters.items()
  }
  return model.fill(arrays)
