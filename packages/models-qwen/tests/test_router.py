"""Logits of Qwen 3's routers, and the loss that spreads tokens over experts."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from models_core.dummy_model_creator import create_dummy_model
from models_core.layers import RematConfig, load_balancing_loss, mean_cross_entropy
from models_qwen.qwen3.model import ModelConfig, Qwen3

CONFIG = ModelConfig(
  num_layers=2,
  vocab_size=48,
  embed_dim=32,
  hidden_dim=48,
  num_heads=4,
  head_dim=8,
  num_kv_heads=2,
  rope_theta=700.0,
  norm_eps=1e-3,
  num_experts=8,
  num_experts_per_tok=3,
  moe_hidden_dim=16,
  norm_topk_prob=True,
  mlp_only_layers=(0,),
)
B, T = 4, 6
TOKENS = np.random.default_rng(0).integers(0, 48, (B, T))
MASK = np.arange(T) < np.array([6, 4, 6, 1])[:, None]


def make(remat, kind):
  devices = np.array(jax.devices()).reshape(2, 2)
  mesh = {
    "one": lambda: None,
    "auto": lambda: Mesh(devices, ("fsdp", "tp")),
    "explicit": lambda: jax.make_mesh((2, 2), ("fsdp", "tp")),
  }[kind]()
  config = dataclasses.replace(CONFIG, remat_config=remat)
  return create_dummy_model(Qwen3, config, mesh, random_seed=1)


def loss(model):
  logits, _ = model(TOKENS, output_router_logits=True)
  routers = nnx.pop(model, nnx.Intermediate)["all_router_logits"].get_value()
  balance = load_balancing_loss(routers, CONFIG.num_experts_per_tok, MASK)
  return mean_cross_entropy(logits[:, :-1], TOKENS[:, 1:]) + balance, (routers, balance)


@pytest.fixture(scope="module")
def expected():
  return nnx.jit(nnx.value_and_grad(loss, has_aux=True))(make(RematConfig.NONE, "one"))


@pytest.mark.parametrize(("remat", "kind"), [("BLOCK", "auto"), ("DECODER", "explicit")])
def test_training_with_the_loss_is_the_same_on_meshes_and_with_rematerialisation(expected, remat, kind):
  model = make(RematConfig[remat], kind)
  before = nnx.graphdef(model)
  results = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model)
  assert nnx.graphdef(model) == before
  for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_stacked_layers_keep_the_logits_of_each_layer():
  deep = dataclasses.replace(CONFIG, num_layers=5, decoder_sparse_step=2, mlp_only_layers=())
  found = []
  for scan in (False, True):
    model = create_dummy_model(
      Qwen3, dataclasses.replace(deep, scan_layers=scan), jax.make_mesh((2, 2), ("fsdp", "tp"))
    )
    found.append(nnx.jit(loss)(model)[1])
    assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))
  (routers, balance), (again, ours) = found
  assert len(routers) == len(again) == 2
  for one, other in zip([*again, ours], [*routers, balance], strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def test_eager_calls_keep_the_logits_of_layers_with_experts():
  model = make(RematConfig.NONE, "one")
  model(TOKENS, output_router_logits=True, output_hidden_states=True)
  kept = nnx.pop(model, nnx.Intermediate)
  routers, (hidden,) = (kept[f"all_{name}"].get_value() for name in ("router_logits", "hidden_states"))
  assert [r.shape for r in routers] == [(B, T, 8)]
  assert hidden.shape == (B, T, 32)
  _, captured = nnx.capture(model, nnx.Intermediate)(TOKENS, output_router_logits=True)
  for ours, theirs in zip(routers, captured["all_router_logits"].get_value(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
  assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))


def test_a_model_without_experts_has_no_routers():
  model = create_dummy_model(Qwen3, dataclasses.replace(CONFIG, mlp_only_layers=(0, 1)), None)
  with pytest.raises(ValueError, match="this model has no experts: leave it out"):
    model(TOKENS, output_router_logits=True)


def test_the_loss_counts_choices_and_probabilities():
  rng = np.random.default_rng(2)
  routers = [rng.normal(size=(2, 5, 4)).astype(np.float32) for _ in range(2)]
  mask = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0]], np.float32)
  chosen, given = np.zeros(4), np.zeros(4)
  for layer in routers:
    for row in layer[mask > 0].astype(np.float64):
      p = np.exp(row) / np.exp(row).sum()
      given += p
      chosen[np.argsort(-p)[:2]] += 1
  rows = 2 * mask.sum()
  expected = 4 * (chosen / rows) @ (given / rows)
  assert float(load_balancing_loss(routers, 2, mask)) == pytest.approx(expected, rel=1e-6)
  spoilt = [np.where(mask[..., None] == 0, np.nan, layer).astype(np.float32) for layer in routers]
  assert float(load_balancing_loss(spoilt, 2, mask != 0)) == pytest.approx(expected, rel=1e-6)
  assert float(load_balancing_loss(routers, 2, 0 * mask)) == 0
  assert float(load_balancing_loss([np.zeros((1, 3, 8), np.float32)], 3)) == pytest.approx(3)


@pytest.mark.parametrize(
  ("routers", "top_k", "mask", "message"),
  [
    ([], 1, None, "expected .B, T, E. for each layer"),
    ([np.zeros((6, 8))], 1, None, "expected .B, T, E. for each layer"),
    (
      [np.zeros((2, 3, 8))],
      9,
      None,
      "top_k is 9, expected the number of experts of a token, between 1 and 8",
    ),
    ([np.zeros((2, 3, 8))], 1, np.ones((3, 2)), "mask has shape .3, 2., expected .B, T., here .2, 3."),
  ],
)
def test_wrong_arguments_of_the_loss(routers, top_k, mask, message):
  with pytest.raises(ValueError, match=message):
    load_balancing_loss(routers, top_k, mask)
