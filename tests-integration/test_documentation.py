"""The Python blocks of READMEs and of the site run, one after the other, with tiny models under the published names."""

import dataclasses
import pathlib
import re

import jax.numpy as jnp
import pytest

from models_automodel.families import load_family
from models_core import dummy_model_creator
from models_core.testing import write_checkpoint
from models_gemma.gemma3.model import ModelConfig as GemmaConfig
from models_llama.llama3.model import Llama3, ModelConfig
from models_qwen.qwen3.model import ModelConfig as QwenConfig
from models_sources.testing import HubServer

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
  "path/to/gemma-3-1b-it": ("gemma3", GEMMA),
  "Qwen3-30B-A3B": ("qwen3", QWEN),
}
PRESETS = (
  (ModelConfig, "llama3p2_1b", LLAMA),
  (GemmaConfig, "gemma3_1b", GEMMA),
  (QwenConfig, "qwen3_30b_a3b", QWEN),
)
PAGES = ("README.md", *(f"packages/models-{name}/README.md" for name in ("gemma", "llama", "naming", "qwen")))
# Beginning of a block that does not run here -> why.
ELSEWHERE = {
  "from models_gemma.gemma3 import model, params": "Google's trees: tests of models-gemma",
  "from models_automodel import load_text_model": "a tokenizer: tests of models-automodel",
  "from models_automodel.text import load_tokenizer": "a tokenizer: tests of models-automodel, with SmolLM2's",
}
# Page -> names that its text takes for granted.
TAKEN_FOR_GRANTED = {"docs/pages/migration.md": ("model",)}


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


# qwix uses older names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)])
def test_the_blocks_of_a_page_run(page, hub, checkpoints, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for config_class, preset, tiny in PRESETS:
    monkeypatch.setattr(config_class, preset, lambda tiny=tiny: tiny)
  for place, (name, _) in PLACES.items():
    folder = tmp_path / place
    folder.mkdir(parents=True)
    for file in checkpoints[name].iterdir():
      (folder / file.name).write_bytes(file.read_bytes())
  names = {"tokens": jnp.arange(8)[None], "positions": jnp.arange(8)[None], "__name__": "documentation"}
  if "model" in TAKEN_FOR_GRANTED.get(page, ()):
    names["model"] = dummy_model_creator.create_dummy_model(Llama3, LLAMA)
  for block in blocks(page):
    if not any(block.startswith(beginning) for beginning in ELSEWHERE):
      exec(compile(block, page, "exec"), names)


def test_each_exception_is_a_block():
  starts = [block for page in pages() for block in blocks(page)]
  for beginning in ELSEWHERE:
    assert any(block.startswith(beginning) for block in starts), beginning
