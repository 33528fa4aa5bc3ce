"""tunix's Sampler, and GRPO with its vanilla rollout."""

import contextlib
import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.generate import sampler
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from models_core.testing import assert_close

from .subjects import AXES, Snapshot, T, Tokenizer, cells, every_cell, logits, some_cells, with_lora

PROMPTS = ["tunix", "abc"]
NEW = 6
STEPS = 12


def greedy(model, prompts):
  """Greedy continuations without padding and their logits, each from a pass over all tokens, without a cache."""
  tokens, ends = np.zeros((len(prompts), T + NEW), np.int32), [len(prompt) for prompt in prompts]
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  steps = []
  for step in range(NEW):
    steps.append(
      np.asarray(logits(model, jnp.asarray(tokens)))[range(len(ends)), [end + step - 1 for end in ends]]
    )
    tokens[range(len(ends)), [end + step for end in ends]] = steps[-1][:, 1:].argmax(-1) + 1
  return [row[end : end + NEW] for row, end in zip(tokens, ends, strict=True)], np.stack(steps, 1)


@every_cell("sampler")
def test_greedy_sampling(subject):
  model, tokenizer = subject.model(), Tokenizer()
  prompts = [[tokenizer.bos_id(), *tokenizer.encode(text)] for text in PROMPTS]
  with subject.context():
    expected, expected_logits = greedy(model, prompts)
    config = sampler.CacheConfig(
      T + NEW, model.config.num_layers, model.config.num_kv_heads, model.config.head_dim
    )
    sample = sampler.Sampler(model, tokenizer, config)
    # No token ends a sequence, and the sampler would hide padding from later tokens.
    kwargs = {"eos_tokens": [-1], "forbidden_tokens": [tokenizer.pad_id()]}
    out = sample(PROMPTS, max_generation_steps=NEW, max_prompt_length=T, return_logits=True, **kwargs)
  np.testing.assert_array_equal(out.tokens, expected)
  assert out.text == [tokenizer.decode(tokens) for tokens in expected]
  assert_close(np.stack(out.logits), expected_logits)


def reward(prompts, completions, **kwargs):
  """The share of capital letters."""
  return [sum(map(str.isupper, completion)) / NEW for completion in completions]


@nnx.jit
def probability(model):
  """Of a capital letter after the first prompt."""
  tokenizer = Tokenizer()
  prompt = jnp.array([[tokenizer.bos_id(), *tokenizer.encode(PROMPTS[0])]])
  capitals = jnp.array(tokenizer.encode(string.ascii_uppercase))
  return jax.nn.softmax(logits(model, prompt)[0, -1])[capitals].sum()


def train_by_rewards(subject, mesh):
  """Trains LoRA factors, with all roles on one mesh."""
  actor, reference = with_lora(subject.model()), subject.model()
  roles = rl_cluster.Role
  config = rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=optax.adamw(3e-2), eval_every_n_steps=100, max_steps=STEPS
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=NEW, max_prompt_length=T, kv_cache_size=T + NEW, temperature=1.0
    ),
  )
  cluster = rl_cluster.RLCluster(
    actor=actor, reference=reference, tokenizer=Tokenizer(), cluster_config=config
  )
  before, first = Snapshot.of(cluster.actor_trainer.model), probability(cluster.rollout.model())
  learner = grpo_learner.GRPOLearner(cluster, grpo_learner.GRPOConfig(num_generations=16), reward)
  learner.train([{"prompts": np.array(PROMPTS)}] * STEPS)
  after = Snapshot.of(cluster.actor_trainer.model)
  assert before.changed(after) == before.factors
  before.assert_same_places(after)
  # The rollout samples with the new factors.
  last = probability(cluster.rollout.model())
  print(f"a capital letter had the probability {first:.2f}, and has {last:.2f}")
  assert last > 1.2 * first


@some_cells("GRPO", 3)
def test_grpo(subject):
  # One device is a mesh, too: tunix asks for one.
  mesh = subject.mesh or Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES)
  with contextlib.nullcontext() if subject.placement == "Auto" else subject.context():
    train_by_rewards(subject, mesh)


@cells("GRPO, on the Auto mesh", ("llama3", "Explicit"))
def test_grpo_on_another_mesh(subject):
  # tunix moves the models to the mesh of their role.
  train_by_rewards(subject, Mesh(subject.mesh.devices, AXES))
