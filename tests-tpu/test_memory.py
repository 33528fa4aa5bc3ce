"""Temporaries of Llama 3.2 1B in bfloat16 on one device, by the compiler's account: nothing is run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models_core.layers import RematConfig, explain_attention
from models_core.loading import abstract_model
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3.model import Llama3, ModelConfig

GB = 1e9


class Account:
  """A model without weights, on one device, and what its programs need."""

  def __init__(self, devices, model, config, **fields):
    # Unrolled layers take long to compile: two of them need what a layer needs.
    scans = "scan_layers" in {field.name for field in dataclasses.fields(config)}
    fields = ({"scan_layers": True} if scans else {"num_layers": 2}) | fields
    self.mesh = Mesh(np.array(devices[:1]).reshape(1, 1), ("fsdp", "tp"))
    self.model = abstract_model(model, dataclasses.replace(config, **fields), self.mesh)
    self.parameters = {
      name: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=p.sharding)
      for name, p in self.model.parameters.items()
    }

  def tokens(self, T):
    return self.place(jax.ShapeDtypeStruct((1, T), jnp.int32))

  def place(self, tree):
    sharding = NamedSharding(self.mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  def prefill(self, parameters, tokens):
    return self.model.fill(parameters)(tokens, skip_lm_head=True)[0]

  def loss_without_head(self, parameters, tokens):
    return self.prefill(parameters, tokens).astype(jnp.float32).sum()

  def temporaries(self, function, *args, **options):
    program = jax.jit(function, **options).lower(self.parameters, *args).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.fixture
def account(devices):
  return lambda **fields: Account(devices, Llama3, ModelConfig.llama3p2_1b(), **fields)


KINDS = ("splash", "blockwise")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "bound"), [(8192, 0.5), (32768, 2.2)])
def test_prefill(account, T, bound, kind):
  llama = account(attn_implementation=kind)
  assert llama.temporaries(llama.prefill, llama.tokens(T)) <= bound * GB


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(account, kind):
  llama = account(remat_config=RematConfig.DECODER, attn_implementation=kind)
  assert llama.temporaries(jax.grad(llama.loss_without_head), llama.tokens(8192)) <= 2.5 * GB


def test_a_training_step(account):
  llama = account(remat_config=RematConfig.DECODER)

  def loss(parameters, tokens):
    model = llama.model.fill(parameters)
    hidden, _ = model(tokens, skip_lm_head=True)
    return model.mean_cross_entropy(hidden[:, :-1], tokens[:, 1:])

  def step(parameters, tokens):
    value, gradients = jax.value_and_grad(loss)(parameters, tokens)
    return value, jax.tree.map(lambda p, g: p - (1e-3 * g).astype(p.dtype), parameters, gradients)

  tokens = llama.tokens(8192)
  without_head = llama.temporaries(jax.grad(llama.loss_without_head), tokens)
  assert llama.temporaries(jax.grad(loss), tokens) <= without_head + 0.5 * GB
  # The gradients are kept until they are applied; the embedding has one as an embedding and one as the head.
  nbytes = sum(2 * math.prod(p.shape) for p in llama.parameters.values())
  embedding = 2 * math.prod(llama.parameters["embedder.input_embedding"].shape)
  assert llama.temporaries(step, tokens, donate_argnums=0) <= without_head + nbytes + embedding + 0.5 * GB


def test_a_step_of_decoding_copies_no_cache(account):
  llama = account(scan_layers=False, num_layers=2)

  def step(parameters, tokens, cache):
    return llama.model.fill(parameters)(tokens, None, cache, skip_lm_head=True)

  def temporaries(rows, slots):
    cache = jax.eval_shape(
      lambda parameters: llama.model.fill(parameters).init_cache(rows, slots), llama.parameters
    )
    tokens = llama.place(jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    return llama.temporaries(step, tokens, llama.place(cache), donate_argnums=2)

  # Products of 8 rows and 32 heads with as many more keys, in float32 and as weights.
  assert temporaries(8, 16384) - temporaries(8, 1024) <= 8 * 32 * (16384 - 1024) * (4 + 2)


def chunk_of(llama, slots):
  """Temporaries of a chunk of tokens in a cache of so many slots, and the bytes of one layer's keys and values."""

  def chunk(parameters, tokens, cache):
    return llama.model.fill(parameters)(tokens, None, cache, skip_lm_head=True)

  cache = jax.eval_shape(
    lambda parameters: llama.model.fill(parameters).init_cache(1, slots), llama.parameters
  )
  layer = sum(x.size * x.dtype.itemsize for name, x in cache["layer_0"].items() if name in ("k", "v"))
  return llama.temporaries(chunk, llama.tokens(1024), llama.place(cache), donate_argnums=2), layer


def test_a_chunk_of_a_long_cache(account):
  llama = account(scan_layers=False, num_layers=2)
  (short, _), (long, _) = chunk_of(llama, 16384), chunk_of(llama, 131072)
  assert long <= 0.1 * GB
  assert long - short <= 0.01 * GB


def test_a_chunk_of_a_long_cache_in_stacked_layers(account):
  # In a scan each layer sees a copy of its keys and values.
  long, copied = chunk_of(account(scan_layers=True, num_layers=2), 131072)
  assert long <= copied + 0.02 * GB


def test_a_sliding_window_takes_no_more(devices, account):
  gemma, llama = Account(devices, Gemma3, Gemma3Config.gemma3_1b()), account()
  T = 32768
  assert gemma.temporaries(gemma.prefill, gemma.tokens(T)) <= llama.temporaries(
    llama.prefill, llama.tokens(T)
  )


def test_the_kernel_is_taken_on_its_own(account):
  llama = account()
  (found,) = explain_attention(llama.prefill, llama.parameters, llama.tokens(8192))
  assert found.taken == "splash"
  positions = jnp.broadcast_to(jnp.arange(8192), (1, 8192))
  call = lambda parameters, tokens: llama.model.fill(parameters)(tokens, positions)
  (found,) = explain_attention(call, llama.parameters, llama.tokens(8192))
  assert found.taken == "blockwise"
