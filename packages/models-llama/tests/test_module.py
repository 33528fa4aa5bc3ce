"""What one does with any Flax module: export, copy, pickle, show, vectorise, call from Linen."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import Mesh

from models_core.dummy_model_creator import create_dummy_model
from models_llama.llama3.model import Llama3, ModelConfig

CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=64,
  embed_dim=32,
  hidden_dim=48,
  num_heads=4,
  head_dim=8,
  num_kv_heads=2,
  rope_theta=1e4,
  norm_eps=1e-5,
)
MESHES = {
  "none": lambda: None,
  "auto": lambda: Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp")),
  "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp"), devices=jax.devices()[:4]),
}
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)
POSITIONS = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))


@pytest.fixture(scope="module", params=MESHES)
def model(request):
  return create_dummy_model(Llama3, CONFIG, MESHES[request.param](), scale=0.3)


@pytest.fixture(scope="module")
def expected(model):
  return np.asarray(nnx.jit(lambda model: model(TOKENS, POSITIONS)[0])(model))


def close(actual, expected):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", ["b, t", "2*b, t"])
def test_export_with_symbolic_batch_and_length(model, expected, sizes):
  graphdef, state = nnx.split(model)
  call = jax.jit(
    lambda state, tokens, positions: nnx.merge(graphdef, state)(tokens, positions)[0].astype(jnp.float32)
  )
  tokens = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.int32)
  exported = export.export(call)(state, tokens, tokens)
  again = jax.jit(exported.call)
  close(again(state, TOKENS, POSITIONS), expected)
  longer = np.arange(18, dtype=np.int32).reshape(2, 9)
  assert again(state, longer, longer).shape == (2, 9, 64)


def test_copies_and_pickles(model, expected):
  close(copy.deepcopy(model)(TOKENS, POSITIONS)[0], expected)
  close(pickle.loads(pickle.dumps(model))(TOKENS, POSITIONS)[0], expected)
  close(nnx.clone(model)(TOKENS, POSITIONS)[0], expected)


def test_tables_and_displays(model, capsys):
  table = nnx.tabulate(model, TOKENS, POSITIONS)
  assert "PreNormLayer" in table
  assert "19,616" in table
  nnx.display(model)
  assert "q_proj" in capsys.readouterr().out


def test_a_call_from_linen(model, expected):
  linen = nnx.bridge.ToLinen(lambda rngs: model)
  variables = linen.init(jax.random.key(0), TOKENS, POSITIONS)
  close(linen.apply(variables, TOKENS, POSITIONS)[0], expected)


def test_vmap_and_gradients_by_embeddings(model, expected):
  graphdef, state = nnx.split(model)
  rows = jax.jit(
    jax.vmap(lambda state, row: nnx.merge(graphdef, state)(row[None], POSITIONS[:1])[0][0], (None, 0))
  )
  close(rows(state, TOKENS), expected)
  gradient = jax.jit(
    jax.grad(lambda embeds, state: nnx.merge(graphdef, state)(None, POSITIONS, inputs_embeds=embeds)[0].sum())
  )
  embeds = model.embed(TOKENS)
  found, step = np.asarray(gradient(embeds, state)), 1e-2
  assert found.shape == embeds.shape
  direction = np.zeros(embeds.shape, np.float32)
  direction[0, 1] = 1
  sums = [
    np.asarray(model(None, POSITIONS, inputs_embeds=embeds + sign * step * direction)[0], np.float64).sum()
    for sign in (1, -1)
  ]
  np.testing.assert_allclose((found * direction).sum(), (sums[0] - sums[1]) / (2 * step), rtol=2e-2)
