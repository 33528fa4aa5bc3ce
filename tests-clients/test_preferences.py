"""tunix's DPOTrainer: a policy with LoRA factors, and its base as the reference."""

import math

import numpy as np
import optax
from tunix.sft.dpo import dpo_trainer

from .subjects import TOKENS, Snapshot, some_cells, with_lora

STEPS = 3


@some_cells("DPO", 1)
def test_dpo(subject):
  policy, reference = subject.model(), subject.model()
  config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=100, max_steps=STEPS, beta=0.5)
  prompts, chosen = np.split(TOKENS, 2, axis=1)
  rejected = chosen[::-1]
  # The first prompt and the last response are shorter than the others.
  prompt_mask, response_mask = np.ones_like(prompts), np.ones_like(chosen)
  prompt_mask[0, :2] = response_mask[-1, -1] = 0
  batch = dpo_trainer.TrainingInput(
    prompts * prompt_mask,
    prompt_mask,
    chosen * response_mask,
    response_mask,
    rejected,
    np.ones_like(rejected),
  )
  with subject.context():
    policy = with_lora(policy)
    before, base = Snapshot.of(policy), Snapshot.of(reference)
    trainer = dpo_trainer.DPOTrainer(policy, reference, optax.adamw(1e-2), config)
    trainer.train([batch] * STEPS)
    after = Snapshot.of(policy)
  losses, margins = (
    trainer.metrics_logger.get_metric_history("", name, "train") for name in ("loss", "rewards/margin")
  )
  # The policy begins as the reference.
  np.testing.assert_allclose(losses[0], math.log(2), rtol=1e-5)
  assert losses[-1] < 0.9 * losses[0]
  assert margins[-1] > margins[0]
  assert before.changed(after) == before.factors
  assert not base.changed(Snapshot.of(reference))
  before.assert_same_places(after)
