"""Losses, gradients and optimizer steps equal torch's, on both kinds of mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from models_core.weights import arrange, part_shape, pieces
from models_llama.llama3 import FAMILY

# Of a gradient, relative to the largest number in the same tensor's.
TOLERANCE = 1e-4
STEPS, RATE = 3, 1e-2
# An epsilon far above float32's rounding of the gradients: Adam divides by their size.
ADAM = {"eps": 1e-3, "weight_decay": 0.1}

COMPILED = pytest.mark.parametrize(
  ("variant", "placement"),
  [
    ("untied", "one-jit"),
    ("untied", "explicit-jit"),
    ("untied", "auto-jit-inside"),
    ("divisible-tied", "explicit-jit-inside"),
    ("divisible-tied", "auto-jit"),
  ],
  indirect=True,
)


def _inputs(tokens):
  return tokens[:, :-1], tokens[:, 1:], np.broadcast_to(np.arange(39, dtype=np.int32), (4, 39))


def _loss(model, tokens, targets, positions):
  logits, _ = model(tokens, positions)
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _torch_loss(model, tokens):
  tokens = torch.tensor(tokens, dtype=torch.long)
  logits = model(tokens[:, :-1], use_cache=False).logits
  return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _ours(parameter_name, shape, tensors):
  """A parameter's worth of transformers' tensors, in our layout."""
  (row, at), *_ = [
    (row, at) for row in FAMILY.weights["huggingface"].rows if (at := row.match(parameter_name)) is not None
  ]
  out = np.zeros(shape, np.float32)
  for piece in pieces(row, row.forms[0], at, shape):
    out[piece.target] = arrange(tensors[piece.tensor], piece, part_shape(piece, shape))
  return out


@COMPILED
def test_loss_and_gradients(checkpoint, variant, placement, tokens, assert_parity):
  source, inputs = checkpoint(variant), _inputs(tokens)
  theirs = source.fresh_reference()
  loss = _torch_loss(theirs, tokens)
  loss.backward()
  expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  with placement.context():
    ours, gradients = nnx.jit(nnx.value_and_grad(_loss))(source.model(placement), *inputs)
  assert_parity(ours, loss.item(), what="loss")
  gradients = nnx.to_flat_state(gradients)
  assert len(gradients) == len(expected)
  for path, gradient in gradients:
    name, value = ".".join(map(str, path)), np.asarray(gradient.get_value())
    assert_parity(value, _ours(name, value.shape, expected), TOLERANCE, what="gradients")


@functools.cache
def _torch_losses(source, tokens):
  """Before and after each step of torch's AdamW."""
  tokens = np.frombuffer(tokens, np.int32).reshape(4, 40)
  model = source.fresh_reference()
  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, **ADAM)
  losses = []
  for _ in range(STEPS):
    optimizer.zero_grad()
    losses.append(_torch_loss(model, tokens))
    losses[-1].backward()
    optimizer.step()
  return [loss.item() for loss in losses]


@COMPILED
def test_nnx_optimizer(checkpoint, variant, placement, tokens, assert_parity):
  source, inputs = checkpoint(variant), _inputs(tokens)

  @nnx.jit
  def step(model, optimizer, *inputs):
    loss, gradients = nnx.value_and_grad(_loss)(model, *inputs)
    optimizer.update(model, gradients)
    return loss

  with placement.context():
    model = source.fresh_model(placement)
    optimizer = nnx.Optimizer(model, optax.adamw(RATE, **ADAM), wrt=nnx.Param)
    losses = [float(step(model, optimizer, *inputs)) for _ in range(STEPS)]
  assert losses[-1] < losses[0]
  assert_parity(losses, _torch_losses(source, tokens.tobytes()), TOLERANCE, what="losses")


@COMPILED
def test_optax_with_donated_state(checkpoint, variant, placement, tokens, assert_parity):
  source, inputs, optimizer = checkpoint(variant), _inputs(tokens), optax.adamw(RATE, **ADAM)
  with placement.context():
    graphdef, state = nnx.split(source.fresh_model(placement))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, optimizer_state, *inputs):
      loss, gradients = jax.value_and_grad(lambda s: _loss(nnx.merge(graphdef, s), *inputs))(state)
      updates, optimizer_state = optimizer.update(gradients, optimizer_state, state)
      return optax.apply_updates(state, updates), optimizer_state, loss

    optimizer_state, losses = optimizer.init(state), []
    for _ in range(STEPS):
      given = jax.tree.leaves(state)
      state, optimizer_state, loss = step(state, optimizer_state, *map(jnp.asarray, inputs))
      losses.append(float(loss))
      assert all(array.is_deleted() for array in given)
  assert [a.sharding for a in jax.tree.leaves(state)] == [a.sharding for a in given]
  assert_parity(losses, _torch_losses(source, tokens.tobytes()), TOLERANCE, what="losses")
