"""orbax.checkpoint by itself: a model and its optimiser are saved, and restored into another placement, too."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from .subjects import TOKENS, Snapshot, Subject, logits, some_cells


@nnx.jit
def step(model, optimizer):
  """One step of training."""

  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(model, TOKENS)[:, :-1], TOKENS[:, 1:]
    ).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def make(subject, seed):
  model = subject.model(seed)
  return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


def restore(path, subject):
  """Another model with the saved numbers, where the subject has its own."""
  model, optimizer = make(subject, 1)
  state = nnx.state((model, optimizer))
  # The optimiser's counter lies on one device, and must not stay there.
  everywhere = subject.mesh and NamedSharding(subject.mesh, PartitionSpec())
  place = lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else everywhere or x.sharding
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)
  with ocp.StandardCheckpointer() as checkpointer:
    nnx.update((model, optimizer), checkpointer.restore(path, target))
  return model, optimizer


@some_cells("Orbax", 1)
def test_saving_and_resuming(subject, tmp_path):
  with subject.context():
    model, optimizer = make(subject, 0)
    step(model, optimizer)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(tmp_path / "saved", nnx.state((model, optimizer)))
    before, expected = Snapshot.of(model), step(model, optimizer)
    resumed, its_optimizer = restore(tmp_path / "saved", subject)
    assert not before.changed(Snapshot.of(resumed))
    before.assert_same_places(Snapshot.of(resumed))
    np.testing.assert_allclose(step(resumed, its_optimizer), expected, rtol=1e-6)
    after = Snapshot.of(model)
    for name, value in Snapshot.of(resumed).values.items():
      np.testing.assert_allclose(value, after.values[name], rtol=1e-5, atol=1e-6)
  alone, its_optimizer = restore(tmp_path / "saved", Subject(subject.case, subject.family, "one device"))
  assert not before.changed(Snapshot.of(alone))
  np.testing.assert_allclose(step(alone, its_optimizer), expected, rtol=1e-4)
