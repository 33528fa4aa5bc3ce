"""The loss in chunks of tokens: the numbers of the whole, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_core.layers import mean_cross_entropy
from models_core.layers.chunked_loss import chunk_length

from .tiny_lm import POSITIONS, TOKENS, V, make

TARGETS = np.roll(TOKENS, -1, axis=1)
WEIGHTS = np.random.default_rng(0).random(TARGETS.shape).astype(np.float32)
WEIGHTS[:, 1] = 0


def whole(model, weights):
  return mean_cross_entropy(model(TOKENS, POSITIONS)[0], TARGETS, weights)


def in_chunks(model, weights, chunk):
  hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
  return model.mean_cross_entropy(hidden, TARGETS, weights, chunk=chunk)


def gradient(loss, *args):
  return nnx.jit(nnx.value_and_grad(lambda model: loss(model, *args)))


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["mean", "weighted"])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(mesh, chunk, weights):
  model = make(mesh)
  expected, actual = gradient(whole, weights)(model), gradient(in_chunks, weights, chunk)(model)
  np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
  ours, theirs = (jax.tree.leaves(nnx.state(found[1])) for found in (actual, expected))
  assert len(ours) == len(theirs) > 0
  for a, b in zip(ours, theirs, strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_it_may_be_called_without_jit_and_with_lists(mesh):
  model = make(mesh)
  expected = whole(model, None)
  hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
  np.testing.assert_allclose(model.mean_cross_entropy(hidden, TARGETS.tolist()), expected, rtol=1e-6)


def test_tokens_of_no_weight_may_have_any_target_and_all_may_have_none():
  model = make(None)
  hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
  odd = np.where(WEIGHTS == 0, -100, TARGETS)
  np.testing.assert_array_equal(
    model.mean_cross_entropy(hidden, odd, WEIGHTS), model.mean_cross_entropy(hidden, TARGETS, WEIGHTS)
  )
  assert np.isnan(model.mean_cross_entropy(hidden, np.full_like(TARGETS, V)))
  assert model.mean_cross_entropy(hidden, TARGETS, np.zeros_like(WEIGHTS)) == 0


def test_a_chunk_has_128_mib_of_logits():
  assert chunk_length(1, 128_256) == 261
  assert chunk_length(64, 262_144) == 2
  assert chunk_length(10_000, 262_144) == 1


def test_memory_does_not_grow_with_the_sequence():
  B, D, vocab = 1, 8, 4096
  w = jax.ShapeDtypeStruct((vocab, D), jnp.float32)

  def temporaries(T):
    from models_core.layers.chunked_loss import mean_loss_in_chunks

    def loss(w, hidden, targets, weights):
      return mean_loss_in_chunks(lambda x: jnp.einsum("btd,vd->btv", x, w), hidden, targets, weights, 16)

    arrays = [
      jax.ShapeDtypeStruct((B, T, *rest), dtype) for rest, dtype in (((D,), "f4"), ((), "i4"), ((), "f4"))
    ]
    return jax.jit(jax.grad(loss)).lower(w, *arrays).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(1024) - temporaries(256) < 4 * 16 * vocab


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"targets": TARGETS[:, 1:]}, ValueError, "targets have shape"),
    ({"weights": WEIGHTS[:1]}, ValueError, "weights have shape"),
    ({"targets": TARGETS.astype(np.float32)}, TypeError, "targets are float32, expected integers"),
    ({"chunk": 0}, ValueError, "chunk is 0, expected at least 1 token"),
  ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
  model = make(None)
  hidden, _ = model(TOKENS, POSITIONS, skip_lm_head=True)
  with pytest.raises(error, match=message):
    model.mean_cross_entropy(**{"hidden": hidden, "targets": TARGETS} | change)
