"""The Python blocks of READMEs and of the site run, one after the other, with tiny models under the published names."""

import concurrent.futures
import dataclasses
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from safetensors.numpy import save_file

from models_automodel import AutoModel
from models_automodel.families import load_family
from models_core import dummy_model_creator
from models_core.formats import LocalFiles, read_safetensors
from models_core.layers import CausalLM, Rotary, rotary
from models_core.loading import abstract_model, plan_load
from models_core.sharding import ShardingConfig
from models_core.testing import write_checkpoint
from models_gemma.gemma3.model import ModelConfig as GemmaConfig
from models_llama.llama3 import FAMILY
from models_llama.llama3.model import Llama3, ModelConfig
from models_qwen.qwen3.model import ModelConfig as QwenConfig
from models_qwen.qwen3.model import Qwen3
from models_sources.testing import HubServer, StoreServer

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
TINY = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 8, "head_dim": 8, "num_kv_heads": 4}
LLAMA = dataclasses.replace(ModelConfig.llama3p2_1b(), **TINY)
GEMMA = dataclasses.replace(GemmaConfig.gemma3_1b(), **TINY, num_embed=64, sliding_window_size=8)
QWEN = dataclasses.replace(
  QwenConfig.qwen3_30b_a3b(), **TINY, vocab_size=64, num_experts=4, num_experts_per_tok=2, moe_hidden_dim=16
)
# Where a block finds it, in the folder in which the blocks of a page run -> family and configuration.
PLACES = {
  "path/to/Llama-3.2-1B": ("llama3", LLAMA),
  "path/to/base": ("llama3", LLAMA),
  "path/to/checkpoint": ("llama3", LLAMA),
  "path/of/the/original": ("llama3", LLAMA),
  "path/to/gemma-3-1b-it": ("gemma3", GEMMA),
  "Qwen3-30B-A3B": ("qwen3", QWEN),
}
PRESETS = (
  (ModelConfig, "llama3p1_8b", LLAMA),
  (ModelConfig, "llama3p2_1b", LLAMA),
  (GemmaConfig, "gemma3_1b", GEMMA),
  (QwenConfig, "qwen3_30b_a3b", QWEN),
)
# In a bucket -> the name of the family.
STORED = {"llama-3.1-8b": "llama3", "gemma3-checkpoints": "gemma3", "qwen3-0.6b": "qwen3"}
PAGES = (
  "README.md",
  *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("packages/*/README.md")),
)
# Beginning of a block that does not run here -> why.
ELSEWHERE = {
  "from models_gemma.gemma3 import model, params": "Google's trees: tests of models-gemma",
  "from models_automodel import load_text_model": "a tokenizer: tests of models-automodel",
  "from models_automodel.text import load_tokenizer": "a tokenizer: tests of models-automodel, with SmolLM2's",
  "tokenizer.render(messages, tools": "a tokenizer: tests of models-automodel",
  'model, _ = AutoModel.from_pretrained("path/to/run"': "trees of trainers: tests of models-automodel",
  "from models_core.adapters import load_orbax_adapter": "a trainer's adapter: tests of models-core",
  '"""models_modelscope.py': "a client that is not installed: tests of models-automodel have another source",
  "from models_sources.testing import HubServer": "a test that is left open: the tests of models-sources",
  "from models_sources.testing import StoreServer": "a test that is left open: the tests of models-sources",
}


class MyModel(nnx.Module):
  """The model that the README of core loads."""

  def __init__(self, config, *, rngs):
    make = lambda *shape: nnx.Param(jnp.zeros(shape))
    self.embed = nnx.Dict(w=make(8, 4))
    self.layers = nnx.List([nnx.Dict(q=nnx.Dict(w=make(6, 4)), up=nnx.Dict(w=make(5, 4)))])


def for_core():
  """Names of the README of core, and the checkpoint of its MyModel."""
  shapes = {"embed_tokens": (8, 4), "layers.0.q_proj": (4, 6), "layers.0.up_proj": (5, 4)}
  os.mkdir("path/to/directory")
  tensors = {f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
  save_file(tensors, "path/to/directory/model.safetensors")
  files = read_safetensors(LocalFiles("path/to/base"))
  plan = plan_load(files, abstract_model(Llama3, LLAMA), FAMILY.huggingface)
  mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
  model, trainer, sampler = (dummy_model_creator.create_dummy_model(Llama3, LLAMA, mesh) for _ in range(3))
  classes = (AutoModel, CausalLM, Llama3, ModelConfig, MyModel, Rotary, ShardingConfig)
  return {one.__name__: one for one in classes} | {
    "dataclasses": dataclasses,
    "jax": jax,
    "nnx": nnx,
    "qwix": qwix,
    "rotary": rotary,
    "send": lambda name, array: None,
    "FAMILY": FAMILY,
    "config": LLAMA,
    "mesh": mesh,
    "model": model,
    "trainer": trainer,
    "sampler": sampler,
    "plan": plan,
    "mask": jnp.ones((1, 8), bool),
  }


def for_automodel():
  """Names of the README of automodel."""
  mesh = jax.make_mesh((2, 4), ("fsdp", "tp"))
  lora_model = dummy_model_creator.create_dummy_model(Llama3, LLAMA, mesh)
  provider = qwix.LoraProvider(module_path=".*q_proj", rank=2, alpha=2.0)
  return {
    "concurrent": concurrent,
    "sampler": dummy_model_creator.create_dummy_model(Qwen3, QWEN, mesh),  # of the model that is loaded last
    "lora_model": qwix.apply_lora_to_model(
      lora_model, provider, jnp.ones((1, 8), jnp.int32), rngs=nnx.Rngs(0)
    ),
    "batch_size": 1,
    "attention_mask": jnp.tril(jnp.ones((1, 8, 8), bool)),
    "model_ids": ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"],
  }


# Page -> the names that its text takes for granted, and the files.
TAKEN_FOR_GRANTED = {
  "docs/pages/migration.md": lambda: {"model": dummy_model_creator.create_dummy_model(Llama3, LLAMA)},
  "packages/models-core/README.md": for_core,
  "packages/models-automodel/README.md": for_automodel,
  "packages/models-sources/README.md": lambda: {"nbytes": 4, "some_bytes": b"data"},
}


def pages():
  return [*PAGES, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs/pages").glob("*.md")))]


def blocks(page):
  return BLOCK.findall((ROOT / page).read_text())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Directories by the name of the family."""
  found = {}
  for name, config in {"llama3": LLAMA, "gemma3": GEMMA, "qwen3": QWEN}.items():
    family, found[name] = load_family(name, name), tmp_path_factory.mktemp(name)
    model = dummy_model_creator.create_dummy_model(family.model_class, config, scale=0.1)
    write_checkpoint(found[name], family, config, model)
  return found


@pytest.fixture
def hub(checkpoints, monkeypatch, tmp_path):
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
  with HubServer() as server:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    files = {file.name: file.read_bytes() for file in checkpoints["llama3"].iterdir()}
    for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"):
      server.add(name, files)
    yield server


@pytest.fixture
def store(checkpoints, monkeypatch, tmp_path):
  """A store with a bucket of checkpoints, and one without anything."""
  for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("MODELS_SOURCES_CACHE", str(tmp_path / "user-cache"))
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
  with StoreServer() as server:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    server.make("bucket")
    for folder, name in STORED.items():
      for file in checkpoints[name].iterdir():
        server.put(f"my-bucket/{folder}/{file.name}", file.read_bytes())
    yield server


# qwix uses older names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)])
def test_the_blocks_of_a_page_run(page, hub, store, checkpoints, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for config_class, preset, tiny in PRESETS:
    monkeypatch.setattr(config_class, preset, lambda tiny=tiny: tiny)
  for place, (name, _) in PLACES.items():
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for file in checkpoints[name].iterdir():
      (folder / file.name).write_bytes(file.read_bytes())
  names = {"tokens": jnp.arange(8)[None], "positions": jnp.arange(8)[None], "__name__": "documentation"}
  granted = TAKEN_FOR_GRANTED.get(page, dict)()
  for block in blocks(page):
    if not any(block.startswith(beginning) for beginning in ELSEWHERE):
      # Blocks go on with the names of those before, but a model that is taken for granted is the same for all.
      names |= {name: value for name, value in granted.items() if name not in names or name == "model"}
      exec(compile(block, page, "exec"), names)


def test_each_exception_is_a_block():
  starts = [block for page in pages() for block in blocks(page)]
  for beginning in ELSEWHERE:
    assert any(block.startswith(beginning) for block in starts), beginning
