"""tunix's DistillationTrainer: a student of one layer learns from a teacher of two."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import distillation_trainer, strategies

from .subjects import TOKENS, Snapshot, V, cells, model_input, some_cells

STEPS = 3


def forward(model, input_tokens, input_mask):
  return model(input_tokens, cache=None, **model_input(input_tokens, input_mask))[0]


def labels(input_tokens, input_mask):
  return jax.nn.one_hot(jnp.roll(input_tokens, -1, axis=1), V)


def distill(subject, make_strategy, rate=1e-2):
  student, teacher = subject.model(1, num_layers=1), subject.model()
  with subject.context():
    before, fixed = Snapshot.of(student), Snapshot.of(teacher)
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=STEPS)
    trainer = distillation_trainer.DistillationTrainer(
      student, teacher, make_strategy(type(teacher.layers[0])), optax.adamw(rate), config
    )
    batch = distillation_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
    trainer.train([batch] * STEPS)
    after = Snapshot.of(trainer.model)
  losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
  assert losses[-1] < 0.9 * losses[0]
  # Both are as they were, without wrappers.
  assert not fixed.changed(Snapshot.of(trainer.teacher_model))
  before.assert_same_places(after)
  return before.changed(after)


@some_cells("distillation, logits", 2)
def test_logits(subject):
  changed = distill(subject, lambda layer: strategies.LogitStrategy(forward, forward, labels))
  assert "embedder.input_embedding" in changed


@some_cells("distillation, features", 3)
def test_features(subject):
  # No part of the loss but the features.
  changed = distill(
    subject, lambda layer: strategies.FeaturePoolingStrategy(forward, forward, labels, layer, alpha=1.0)
  )
  assert any(name.startswith("layers.0.mlp") for name in changed)


def forward_with_features(model, input_tokens, input_mask):
  (out, _), features = model(input_tokens, cache=None, **model_input(input_tokens, input_mask))
  return out, features


@cells("distillation, projected features", ("llama3", "Auto"), ("qwen3", "Explicit"))
def test_projected_features(subject):
  example = {"tokens": TOKENS, **model_input(TOKENS, np.ones_like(TOKENS))}

  def make_strategy(layer):
    more = {"dummy_input": example, "rngs": nnx.Rngs(0), "alpha": 1.0}
    return strategies.FeatureProjectionStrategy(forward_with_features, forward, labels, layer, **more)

  changed = distill(subject, make_strategy, rate=1e-3)
  assert any(name.startswith("layers.0.mlp") for name in changed)
