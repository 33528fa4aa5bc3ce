"""What people keep outside of this project: names and shapes of parameters, and digests.

Checkpoints of trainers, Orbax trees and logs hold them, so that none may change. `promises.json` was written
once from the models; a new model adds to it.
"""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from models_core.digest import digest
from models_core.loading import abstract_model
from models_gemma.gemma import model as gemma
from models_gemma.gemma3 import model as gemma3
from models_llama.llama3 import model as llama3
from models_qwen.qwen2 import model as qwen2
from models_qwen.qwen3 import model as qwen3

MODELS = {
  "gemma_2b": gemma.Gemma,
  "gemma2_2b": gemma.Gemma,
  "gemma3_270m": gemma3.Gemma3,
  "llama3_8b": llama3.Llama3,
  "llama3p2_1b": llama3.Llama3,
  "qwen2p5_0p5b": qwen2.Qwen2,
  "qwen2p5_7b": qwen2.Qwen2,
  "qwen3_0p6b": qwen3.Qwen3,
  "qwen3_8b": qwen3.Qwen3,
  "qwen3_30b_a3b": qwen3.Qwen3,
}
KEPT = json.loads((pathlib.Path(__file__).parent / "promises.json").read_text())

TINY = llama3.ModelConfig(
  num_layers=1,
  vocab_size=6,
  embed_dim=8,
  hidden_dim=12,
  num_heads=2,
  head_dim=4,
  num_kv_heads=1,
  rope_theta=1e4,
  norm_eps=1e-5,
)


def parameters(preset, model_class):
  """Shapes of all parameters, of the layers as `layers.*`; each name once."""
  config = getattr(__import__(model_class.__module__, fromlist=["ModelConfig"]).ModelConfig, preset)()
  found = abstract_model(model_class, config).parameters
  return {re.sub(r"\.\d+\.", ".*.", name): list(p.shape) for name, p in found.items()}


@pytest.mark.parametrize("preset", MODELS)
def test_names_and_shapes_of_parameters(preset):
  assert parameters(preset, MODELS[preset]) == KEPT[preset]


@pytest.fixture(scope="module")
def numbered():
  """A model whose elements are numbered from 0 in each parameter, modulo 251."""
  abstract = abstract_model(llama3.Llama3, TINY)
  number = lambda shape: jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 251, jnp.float32)
  return abstract.fill({name: number(p.shape) for name, p in abstract.parameters.items()})


def test_digests(numbered):
  found = digest(numbered)
  assert {name: str(value) for name, value in found.parameters.items()} == KEPT["digests"]
