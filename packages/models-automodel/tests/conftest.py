import json

import jax
import numpy as np
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
def hub(monkeypatch, tmp_path):
  """A running hub, with an empty cache of its own."""
  from huggingface_hub import constants

  from models_sources.testing import HubServer

  # The client reads the variable once, when it is imported; other processes read it, too.
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  with HubServer() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server


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


@pytest.fixture
def write_gguf():
  """Writes a quantised GGUF file of a random Llama of one layer, with what `add(writer)` adds; returns its path."""
  gguf = pytest.importorskip("gguf")

  def write(path, add=lambda writer: None):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(32)
    add(writer)
    shapes = {"token_embd.weight": (32, 32), "output_norm.weight": (32,), "output.weight": (32, 32)}
    shapes |= {
      f"blk.0.{n}.weight": (32, 32) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    shapes |= {f"blk.0.{n}.weight": (16, 32) for n in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{n}.weight": (32,) for n in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
      tensor = rng.normal(size=shape).astype(np.float32)
      kind = gguf.GGMLQuantizationType.Q4_0
      if len(shape) == 2:
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
      else:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  return write
