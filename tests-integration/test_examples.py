"""The calls that users know, one after the other, on small checkpoints that a hub serves under the published names."""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_automodel import (
  AutoModel,
  ModelModule,
  ModelSource,
  SourceFilesError,
  call_model_config,
  get_model_module,
)
from models_automodel.families import load_family
from models_core import dummy_model_creator, safetensors_saver
from models_core.layers import RematConfig
from models_core.testing import write_checkpoint
from models_gemma.gemma.model import Gemma
from models_gemma.gemma.model import ModelConfig as GemmaConfig
from models_llama.llama3 import params
from models_llama.llama3.model import Llama3, ModelConfig, ShardingConfig
from models_naming import get_model_name_from_model_id, split
from models_qwen.qwen2.model import ModelConfig as QwenConfig
from models_sources.testing import HubServer

TINY = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 8, "head_dim": 8, "num_kv_heads": 4}
LLAMA = dataclasses.replace(ModelConfig.llama3p1_8b(), **TINY, vocab_size=64)
GEMMA = dataclasses.replace(GemmaConfig.gemma2_2b(), **TINY, num_embed=64, sliding_window_size=8)
QWEN = dataclasses.replace(QwenConfig.qwen2p5_0p5b(), **TINY, vocab_size=64)
R1 = dataclasses.replace(QwenConfig.deepseek_r1_distill_qwen_1p5b(), **TINY, vocab_size=64)

PUBLISHED = {
  "meta-llama/Llama-3.1-8B": ("llama3", LLAMA),
  "Qwen/Qwen2.5-0.5B": ("qwen2", QWEN),
  "Qwen/Qwen2.5-1.5B": ("qwen2", dataclasses.replace(QWEN, num_layers=3)),
  "Qwen/Qwen2.5-3B": ("qwen2", dataclasses.replace(QWEN, num_layers=4)),
  "google/gemma-2-2b": ("gemma", GEMMA),
  "google/gemma-2-9b": ("gemma", dataclasses.replace(GEMMA, hidden_dim=64)),
  "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", R1),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Directories by the published name."""
  found = {}
  for model_id, (category, config) in PUBLISHED.items():
    found[model_id] = directory = tmp_path_factory.mktemp(model_id.split("/")[1])
    family = load_family(category, model_id)
    model = dummy_model_creator.create_dummy_model(family.model_class, config, scale=0.1)
    write_checkpoint(directory, family, config, model)
  return found


@pytest.fixture
def hub(checkpoints, monkeypatch, tmp_path):
  with HubServer() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for model_id, directory in checkpoints.items():
      server.add(model_id, {file.name: file.read_bytes() for file in directory.iterdir()})
    yield server


@pytest.fixture
def mesh():
  return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), axis_names=("fsdp", "tp"))


def test_load_from_the_hub(hub, mesh, tmp_path):
  model, model_path = AutoModel.from_pretrained(
    model_id="meta-llama/Llama-3.1-8B",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
    model_download_path=str(tmp_path / "hf_cache"),
  )
  assert model_path.startswith(str(tmp_path / "hf_cache"))
  assert type(model) is Llama3
  assert model.config.num_layers == 2
  assert model.layers[0].attn.q_proj.w[...].sharding.mesh == mesh


def test_load_several_sizes(hub, mesh):
  models = {}
  for size in ["0.5b", "1.5b", "3b"]:
    model, _ = AutoModel.from_pretrained(
      model_id=f"Qwen/Qwen2.5-{size.upper()}",
      mesh=mesh,
      model_source=ModelSource.HUGGINGFACE,
    )
    models[size] = model
  counts = [sum(x.size for x in jax.tree.leaves(nnx.state(model))) for model in models.values()]
  assert counts == sorted(set(counts))


def test_load_with_a_configuration_of_ones_own(checkpoints, mesh):
  base_config = ModelConfig.llama3p1_8b()
  custom_config = dataclasses.replace(base_config, **TINY, vocab_size=64)
  model = params.create_model_from_safe_tensors(
    file_dir=checkpoints["meta-llama/Llama-3.1-8B"],
    config=custom_config,
    mesh=mesh,
  )
  assert len(model.layers) == custom_config.num_layers


def test_create_a_dummy_model_and_train_it(mesh):
  config = dataclasses.replace(
    GemmaConfig.gemma2_2b(), **TINY, num_embed=64, sliding_window_size=4, remat_config=RematConfig.BLOCK
  )
  dummy_model = dummy_model_creator.create_dummy_model(
    model_class=Gemma,
    config=config,
    mesh=mesh,
    dtype=jnp.bfloat16,
    random_seed=42,
    scale=0.02,
  )
  assert {x.dtype for x in jax.tree.leaves(nnx.state(dummy_model))} == {jnp.dtype("bfloat16")}
  tokens, positions = jnp.ones((2, 8), jnp.int32), jnp.arange(8)[None].repeat(2, axis=0)
  loss = lambda model: -jax.nn.log_softmax(model(tokens, positions)[0]).mean()
  grads = nnx.jit(nnx.grad(loss))(dummy_model)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_load_with_a_sharding_of_ones_own(hub, mesh):
  custom_sharding = ShardingConfig(
    emb_vd=("tp", None),
    q_weight_dnh=(None, "tp", None),
    kv_weight_dnh=(None, "tp", None),
    o_weight_nhd=("tp", None, None),
    ffw_weight_df=(None, "tp"),
    ffw_weight_fd=("tp", None),
    rms_norm_weight=(None,),
    act_btd=(None, None, None),
    act_btf=(None, None, "tp"),
    act_btnh=(None, None, "tp", None),
  )
  model, _ = AutoModel.from_pretrained(
    model_id="meta-llama/Llama-3.1-8B",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
    shd_config=custom_sharding,
  )
  q_proj = model.layers[0].attn.q_proj.w[...]
  assert q_proj.sharding.shard_shape(q_proj.shape) == (16, 32)  # N on tp


def test_r1_distill(hub, mesh):
  model, _ = AutoModel.from_pretrained(
    model_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
  )
  assert model.config.rope_theta == 10_000
  assert model.config.use_tied_embedding is False


def test_inference_with_a_cache(hub, mesh):
  model, _ = AutoModel.from_pretrained("meta-llama/Llama-3.1-8B", mesh)
  batch_size = 4
  seq_len = 128
  tokens = jnp.ones((batch_size, seq_len), dtype=jnp.int32)
  positions = jnp.arange(seq_len)[None, :].repeat(batch_size, axis=0)
  cache = model.init_cache(batch_size, cache_size=2048)
  attention_mask = jnp.ones((batch_size, 1, seq_len), dtype=jnp.bool_)
  logits, updated_cache = model(tokens, positions, cache, attention_mask)
  assert logits.shape == (batch_size, seq_len, 64)
  assert len(updated_cache) == 2


def test_save_to_safetensors(hub, mesh, tmp_path):
  model, path = AutoModel.from_pretrained("meta-llama/Llama-3.1-8B", mesh)
  _, state = nnx.split(model)
  state_dict = nnx.to_pure_dict(state)
  save_dir = tmp_path / "saved"
  safetensors_saver.save_model_to_safetensors(
    state_dict=state_dict,
    save_dir=save_dir,
    max_shard_size="5GB",
  )
  assert os.listdir(save_dir) == ["model.safetensors"]
  AutoModel.save_pretrained(model, tmp_path / "again", base=path)
  again, _ = AutoModel.from_pretrained(str(tmp_path / "again"), mesh)
  for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, again)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_teacher_and_student(hub, mesh):
  teacher_model, _ = AutoModel.from_pretrained(
    model_id="google/gemma-2-9b",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
  )
  student_model, _ = AutoModel.from_pretrained(
    model_id="google/gemma-2-2b",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
  )
  tokens, positions = jnp.ones((2, 8), jnp.int32), jnp.arange(8)[None].repeat(2, axis=0)
  target = jax.nn.softmax(teacher_model(tokens, positions)[0])
  loss = lambda student: -jnp.mean(jnp.sum(target * jax.nn.log_softmax(student(tokens, positions)[0]), -1))
  value, grads = nnx.jit(nnx.value_and_grad(loss))(student_model)
  assert jnp.isfinite(value)
  assert any(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_inspect_a_model():
  model_name = "llama-3.1-8b"
  config = call_model_config(model_name)
  assert (config.num_layers, config.embed_dim, config.hidden_dim) == (32, 4096, 14336)
  assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 8, 128, 500_000)
  model_module = get_model_module(model_name, ModelModule.MODEL)
  assert model_module.Llama3 is Llama3
  presets = [
    attr
    for attr in dir(model_module.ModelConfig)
    if not attr.startswith("_") and callable(getattr(model_module.ModelConfig, attr))
  ]
  assert {"llama3p1_8b", "llama3p2_1b", "llama3_70b"} <= set(presets)


def test_memory_can_be_estimated():
  config = ModelConfig.llama3p1_8b()
  attention = config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
  total = config.vocab_size * config.embed_dim + config.num_layers * (
    attention + 3 * config.embed_dim * config.hidden_dim
  )
  assert 7e9 < total < 8e9


def test_names_come_from_ids():
  model_name = get_model_name_from_model_id("meta-llama/Llama-3.1-8B")
  assert model_name == "llama-3.1-8b"
  assert split(model_name) == ("llama-3.1-", "8b")
  with pytest.raises(ValueError, match="no-such-model"):
    split("no-such-model")


def test_parallel_loading(hub, mesh):
  model_ids = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B"]

  def load_model(model_id):
    return AutoModel.from_pretrained(model_id=model_id, mesh=mesh, model_source=ModelSource.HUGGINGFACE)

  with concurrent.futures.ThreadPoolExecutor(max_workers=3) as executor:
    models = list(executor.map(load_model, model_ids))
  assert [model.config.num_layers for model, _ in models] == [2, 3, 4]


def test_what_was_downloaded_is_kept(hub, mesh, tmp_path):
  load = lambda: AutoModel.from_pretrained(
    model_id="meta-llama/Llama-3.1-8B",
    mesh=mesh,
    model_source=ModelSource.HUGGINGFACE,
    model_download_path=str(tmp_path / "hf_cache"),
  )
  _, path = load()
  hub.requests.clear()
  _, path2 = load()
  assert path2 == path
  assert not [request for request in hub.requests if request.method == "GET" and request.host == "storage"]


def test_retry(hub, mesh):
  def load_model_with_retry(model_id, mesh, max_retries=3):
    for attempt in range(max_retries):
      try:
        return AutoModel.from_pretrained(
          model_id=model_id,
          mesh=mesh,
          model_source=ModelSource.HUGGINGFACE,
        )
      except Exception as e:
        logging.warning(f"Attempt {attempt + 1} failed: {e}")
        if attempt == max_retries - 1:
          raise
    return None, None

  hub.fail("GET .*model.safetensors", status=403)
  model, _ = load_model_with_retry("meta-llama/Llama-3.1-8B", mesh)
  assert type(model) is Llama3
  with pytest.raises(SourceFilesError, match="nobody/nothing"):
    load_model_with_retry("nobody/nothing", mesh)


def test_validate_weights(hub, mesh):
  def validate_weights(model):
    _, state = nnx.split(model)
    state_dict = nnx.to_pure_dict(state)
    has_nan = any(jnp.isnan(v).any() for v in jax.tree.leaves(state_dict))
    has_inf = any(jnp.isinf(v).any() for v in jax.tree.leaves(state_dict))
    return not (has_nan or has_inf)

  model, _ = AutoModel.from_pretrained("meta-llama/Llama-3.1-8B", mesh)
  assert validate_weights(model)
  norm = model.final_norm.w
  norm.set_value(norm[...].at[3].set(jnp.nan))
  assert not validate_weights(model)


@pytest.mark.parametrize("devices", [1])
def test_first_example_of_the_readme(tmp_path, devices):
  """As it stands, in a process of its own, with a vocabulary of the published size."""
  readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
  block = re.search(r"^```python\n(.*?)^```", readme, re.M | re.S)[1]
  config = dataclasses.replace(ModelConfig.llama3p1_8b(), **TINY)
  model = dummy_model_creator.create_dummy_model(Llama3, config, scale=0.1)
  (directory := tmp_path / "llama").mkdir()
  write_checkpoint(directory, load_family("llama3", "llama"), config, model)
  with HubServer() as server:
    server.add("meta-llama/Llama-3.1-8B", {file.name: file.read_bytes() for file in directory.iterdir()})
    env = os.environ | {
      "HF_ENDPOINT": server.endpoint,
      "HF_HUB_CACHE": str(tmp_path / "cache"),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    check = f"assert logits.shape == (1, 3, {config.vocab_size}) and jax.device_count() == {devices}"
    program = f"{block}\nassert jnp.isfinite(logits).all()\n{check}\n"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
