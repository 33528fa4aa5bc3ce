import json

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def config():
  from models_core.rope_scaling import Llama3Scaling
  from models_llama.llama3.model import ModelConfig

  return ModelConfig(
    num_layers=2,
    vocab_size=64,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    rope_theta=1e4,
    norm_eps=1e-5,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32),
  )


@pytest.fixture(scope="session")
def checkpoint(config, tmp_path_factory):
  """A directory with a random model, and its tensors."""
  from models_core.dummy_model_creator import create_dummy_model
  from models_core.testing import write_checkpoint
  from models_llama.llama3 import FAMILY

  directory = tmp_path_factory.mktemp("my-own-llama")
  tensors = write_checkpoint(directory, FAMILY, config, create_dummy_model(FAMILY.model_class, config))
  return directory, tensors


@pytest.fixture
def edit_config(checkpoint, tmp_path):
  """A copy of the checkpoint with another config.json."""

  def edit(**changes):
    directory, _ = checkpoint
    raw = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    return tmp_path

  return edit
