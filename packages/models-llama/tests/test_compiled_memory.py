"""Models of published sizes, by the compiler's account: traced and compiled, but not made."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import pytest

from models_core.loading import abstract_model
from models_llama.llama3.model import Llama3, ModelConfig

T, GB = 8192, 1e9


def abstract(dtype="float32", **config):
  """Llama 3.2 1B without weights, and its parameters as shapes."""
  model = abstract_model(Llama3, dataclasses.replace(ModelConfig.llama3p2_1b(), **config))
  return model, {name: jax.ShapeDtypeStruct(p.shape, dtype) for name, p in model.parameters.items()}


def compiled(function, dtype="float32", tokens=T, **config):
  """The account of a program of Llama 3.2 1B's shape, all of whose layers are stacked unless `config` says otherwise."""
  model, parameters = abstract(dtype, **{"scan_layers": True} | config)
  tokens = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

  def hidden(parameters, tokens):
    return model.fill(parameters)(tokens, skip_lm_head=True)[0]

  return jax.jit(function(hidden)).lower(parameters, tokens).compile().memory_analysis()


def test_a_prefill_has_the_temporaries_of_one_layer():
  account = compiled(lambda hidden: hidden)
  assert account.temp_size_in_bytes <= 1.2 * GB


@pytest.mark.parametrize(("tokens", "bound"), [(8192, 1.5), (32768, 6)])
def test_a_prefill_of_bfloat16_converts_no_weight(tokens, bound):
  account = compiled(lambda hidden: hidden, "bfloat16", tokens, scan_layers=False)
  assert account.temp_size_in_bytes <= bound * GB


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 1), ("float32", 1024), ("bfloat16", 1)])
def test_a_cache_is_read_and_written_in_place(dtype, tokens):
  model, parameters = abstract(dtype, num_layers=4)

  def temporaries(slots):
    call = lambda parameters, tokens, cache: model.fill(parameters)(tokens, None, cache, skip_lm_head=True)
    cache = jax.eval_shape(lambda parameters: model.fill(parameters).init_cache(1, slots), parameters)
    new = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    account = jax.jit(call, donate_argnums=2).lower(parameters, new, cache).compile().memory_analysis()
    return account.temp_size_in_bytes

  scores_of_a_token = 32 * 16384 * 4
  assert temporaries(16384) - temporaries(1024) <= 2.3 * scores_of_a_token


def test_a_gradient_keeps_the_inputs_of_the_layers_and_the_activations_of_one():
  gradient = lambda hidden: jax.grad(lambda parameters, tokens: hidden(parameters, tokens).mean())
  few, all_layers = (
    compiled(gradient, num_layers=n, remat_config="decoder").temp_size_in_bytes for n in (2, 16)
  )
  assert all_layers - few <= 1.01 * 14 * T * 2048 * 4
  # Of several orders, a CPU takes one that runs much at once: seven arrays of the feed-forward block are there together.
  assert all_layers <= 4 * GB


def test_an_abstract_model_of_405b_parameters_takes_about_a_second():
  config = dataclasses.replace(ModelConfig.llama3p1_405b(), scan_layers=True)
  start = time.process_time()
  parameters = abstract_model(Llama3, config).parameters
  assert time.process_time() - start < 2
  assert sum(math.prod(p.shape) for p in parameters.values()) == 405_853_388_800
  assert parameters["layers.0:126.attn.q_proj.w"].shape == (126, 16384, 16384)


@pytest.mark.parametrize("layers", [16, 80])
def test_a_program_does_not_grow_with_the_number_of_layers(layers):
  narrow = {
    "vocab_size": 64,
    "embed_dim": 16,
    "hidden_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
  }
  config = dataclasses.replace(ModelConfig.llama3p1_8b(), **narrow, num_layers=layers, scan_layers=True)
  model = abstract_model(Llama3, config)
  parameters = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in model.parameters.items()}
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  text = (
    jax.jit(lambda parameters, tokens: model.fill(parameters)(tokens)[0]).lower(parameters, tokens).as_text()
  )
  # Four projections, three of the feed-forward block, two of attention, and the head.
  assert text.count("dot_general") == 10
