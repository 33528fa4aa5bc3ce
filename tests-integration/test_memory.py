"""Temporaries of long sequences on CPU in float32, by the compiler's account: nothing is run."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

from models_core.loading import abstract_model
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3.model import Llama3, ModelConfig

LLAMA = Llama3, ModelConfig.llama3p2_1b()
GEMMA = Gemma3, Gemma3Config.gemma3_1b()


def shapes(model, config, layers):
  """A model without weights, and their shapes."""
  model = abstract_model(model, dataclasses.replace(config, num_layers=layers))
  return model, {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in model.parameters.items()}


def temporaries(function, *args, **options):
  return jax.jit(function, **options).lower(*args).compile().memory_analysis().temp_size_in_bytes


def chunk(slots, tokens):
  """Temporaries of a chunk of tokens in a cache of so many slots, in one layer of Llama 3.2 1B."""
  model, parameters = shapes(*LLAMA, 1)
  cache = jax.eval_shape(lambda parameters: model.fill(parameters).init_cache(1, slots), parameters)
  run = lambda parameters, tokens, cache: model.fill(parameters)(tokens, None, cache, skip_lm_head=True)
  tokens = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  return temporaries(run, parameters, tokens, cache, donate_argnums=2)


def test_a_chunk_takes_no_more_in_a_longer_cache():
  short, long = chunk(4096, 1024), chunk(131_072, 1024)
  assert long <= 0.12e9  # four activations of the feed-forward block are 0.13 GB
  assert long - short <= 32 * 131_072  # slots and positions, and nothing with heads


def prefill(model, config, tokens):
  """Temporaries of all layers: those of two layers, and for each further one what a third takes."""

  def of(layers):
    found, parameters = shapes(model, config, layers)
    run = lambda parameters, tokens: found.fill(parameters)(tokens, skip_lm_head=True)[0]
    return temporaries(run, parameters, jax.ShapeDtypeStruct((1, tokens), jnp.int32))

  two = of(2)
  return two + (config.num_layers - 2) * (of(3) - two)


def as_users_compile(expression):
  """The value of an expression of this module in a process without the settings of the tests."""
  settings = {"XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"}
  env = {name: value for name, value in os.environ.items() if name not in settings}
  command = [sys.executable, "-c", f"from test_memory import *; print({expression})"]
  folder = pathlib.Path(__file__).parent
  return int(subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE).stdout)


def test_sliding_windows_take_no_more_than_a_model_without():
  gemma, llama = (as_users_compile(f"prefill(*{name}, 32_768)") for name in ("GEMMA", "LLAMA"))
  assert gemma <= llama <= 4.7e9
