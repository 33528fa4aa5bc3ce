"""tunix's PeftTrainer: full fine-tuning, LoRA, and checkpoints to resume from."""

import shutil

import numpy as np
import optax
import orbax.checkpoint as ocp
from tunix.sft import peft_trainer

from .subjects import TOKENS, Snapshot, every_cell, model_input, some_cells, with_lora

STEPS = 4


def make_trainer(model, **config):
  """A trainer with Adam; all batches are the same."""
  config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=STEPS, **config)
  return peft_trainer.PeftTrainer(model, optax.adamw(1e-2), config).with_gen_model_input_fn(
    lambda x: {
      "input_tokens": x.input_tokens,
      "input_mask": x.input_mask,
      **model_input(x.input_tokens, x.input_mask),
    }
  )


def train(trainer):
  """Trains to the end; the losses of all steps that were left."""
  batch = peft_trainer.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
  trainer.train([batch] * STEPS)
  return trainer.metrics_logger.get_metric_history("", "loss", "train")


@some_cells("full fine-tuning", 0, 2)
def test_full_fine_tuning(subject):
  model = subject.model()
  with subject.context():
    before = Snapshot.of(model)
    losses = train(make_trainer(model))
    after = Snapshot.of(model)
  assert len(losses) == STEPS
  assert losses[-1] < 0.8 * losses[0]
  assert before.changed(after) == before.values.keys()
  before.assert_same_places(after)


@every_cell("LoRA")
def test_lora(subject):
  model = subject.model()
  with subject.context():
    model = with_lora(model)
    before = Snapshot.of(model)
    losses = train(make_trainer(model))
    after = Snapshot.of(model)
  # Two for each of the seven projections of the two layers.
  assert len(before.factors) == 28
  assert losses[-1] < 0.9 * losses[0]
  assert before.changed(after) == before.factors
  before.assert_same_places(after)


def resume(make, root):
  """Trains to the end, again from the checkpoint of the second step, and compares."""
  options = ocp.CheckpointManagerOptions(save_interval_steps=2)
  trainer = make_trainer(make(0), checkpoint_root_directory=str(root), checkpointing_options=options)
  losses, expected = train(trainer), Snapshot.of(trainer.model)
  shutil.rmtree(root / str(STEPS))
  trainer = make_trainer(make(1), checkpoint_root_directory=str(root), checkpointing_options=options)
  assert trainer.train_steps == 2
  np.testing.assert_allclose(train(trainer), losses[2:], rtol=1e-6)
  resumed = Snapshot.of(trainer.model)
  for name, value in expected.values.items():
    np.testing.assert_allclose(resumed.values[name], value, rtol=1e-5, atol=1e-6)
  expected.assert_same_places(resumed)


@some_cells("resuming full fine-tuning", 0)
def test_resuming_full_fine_tuning(subject, tmp_path):
  with subject.context():
    resume(subject.model, tmp_path / "checkpoints")


@some_cells("resuming LoRA", 2)
def test_resuming_lora(subject, tmp_path):
  # The checkpoint holds the factors alone.
  with subject.context():
    resume(lambda seed: with_lora(subject.model()), tmp_path / "checkpoints")
