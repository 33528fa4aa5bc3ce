"""Score models with LoRA factors of qwix: adapted with their head, trained and merged, on every kind of mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

from models_core.adapters import match_modules, merge_lora
from models_core.dummy_model_creator import create_dummy_model
from models_core.score_model import ScoreModel, score_family
from models_core.testing import assert_close
from models_gemma.gemma import FAMILY as GEMMA
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_llama.llama3 import FAMILY as LLAMA
from models_llama.llama3.model import ModelConfig as LlamaConfig

TINY = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 8, "head_dim": 8, "num_kv_heads": 4}
# With the embedding as its head, and with a head of its own.
FAMILIES = {
  "gemma": (GEMMA, dataclasses.replace(GemmaConfig.gemma2_2b(), **TINY, num_embed=64)),
  "llama3": (LLAMA, dataclasses.replace(LlamaConfig.llama3p1_8b(), **TINY, vocab_size=64)),
}
MESHES = {
  "one device": lambda: None,
  "auto": lambda: jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 4), ("fsdp", "tp")),
}
ALPHA, PATTERN = 4.0, ".*q_proj|.*down_proj|score"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 6), np.int32)
POSITIONS = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)).copy()
# qwix uses older names of flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@nnx.jit
def scores(model):
  return model(TOKENS, POSITIONS)[0]


@nnx.jit
def step(model, optimizer):
  loss = lambda model: jnp.square(model(TOKENS, POSITIONS)[0] - 1.0).mean()
  value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
  optimizer.update(model, grads)
  return value


@functools.cache
def trained(family, mesh):
  """A score model after three steps of its factors, their losses, and the scores before."""
  family, config = FAMILIES[family]
  model = create_dummy_model(family.model_class, config, MESHES[mesh](), scale=0.3)
  scored = ScoreModel(model, rngs=nnx.Rngs(0))
  before = np.asarray(scores(scored))
  provider = qwix.LoraProvider(module_path=PATTERN, rank=2, alpha=ALPHA)
  adapted = qwix.apply_lora_to_model(scored, provider, **scored.get_model_input(), rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(adapted, optax.adam(0.1), wrt=nnx.LoRAParam)
  return adapted, [float(step(adapted, optimizer)) for _ in range(3)], before


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_factors_learn_and_merge(family, mesh):
  adapted, losses, before = trained(family, mesh)
  assert losses[2] < losses[0]
  state = nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))
  assert {"/".join(map(str, path[:-1])) for path, _ in state} == set(match_modules(adapted, PATTERN))
  expected = np.asarray(scores(adapted))
  assert np.abs(expected - before).max() > 0.1 * np.abs(before).max()
  merged = merge_lora(adapted, score_family(FAMILIES[family][0]), alpha=ALPHA)
  assert isinstance(merged, ScoreModel)
  assert_close(scores(merged), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_learns_the_same(family):
  one, *others = (trained(family, mesh)[1] for mesh in MESHES)
  for losses in others:
    np.testing.assert_allclose(losses, one, rtol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_trainer_may_put_its_own_head_in_place_of_the_model_s(mesh):
  family, config = FAMILIES["llama3"]
  model = create_dummy_model(family.model_class, config, MESHES[mesh](), scale=0.3)
  hidden = np.asarray(model(TOKENS, POSITIONS, skip_lm_head=True)[0])
  model.lm_head = nnx.Linear(model.lm_head.in_features, 1, use_bias=False, rngs=nnx.Rngs(0))
  assert_close(scores(model), hidden @ np.asarray(model.lm_head.kernel[...]))
