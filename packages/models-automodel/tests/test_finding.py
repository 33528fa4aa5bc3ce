"""Which files of a folder count, and how often a source is asked."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel, Where
from models_automodel.convert import convert
from models_core.config import gguf_config
from models_core.formats import LocalFiles, read_gguf
from models_llama.llama3 import FAMILY


def same(a, b):
  equal = jax.tree.map(lambda x, y: bool((x == y).all()), nnx.state(a), nnx.state(b))
  return all(jax.tree.leaves(equal))


def test_a_gguf_file_beside_its_config_json(write_gguf, tmp_path):
  alone = write_gguf(tmp_path / "alone.gguf")
  (tmp_path / "both").mkdir()
  (tmp_path / "both" / "m.gguf").write_bytes(alone.read_bytes())
  raw = FAMILY.write_config(FAMILY.read_config(gguf_config(read_gguf(LocalFiles(str(alone))))))
  (tmp_path / "both" / "config.json").write_text(json.dumps(raw))
  expected, _ = AutoModel.from_pretrained(alone, progress=False)
  model, _ = AutoModel.from_pretrained(tmp_path / "both", progress=False)
  assert same(model, expected)


def test_safetensors_are_preferred_where_config_json_describes_them(checkpoint, write_gguf, edit_config):
  directory = edit_config()
  write_gguf(directory / "other.gguf")
  expected, _ = AutoModel.from_pretrained(checkpoint[0], progress=False)
  model, _ = AutoModel.from_pretrained(directory, progress=False)
  assert same(model, expected)


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_converting_asks_the_source_once(checkpoint, to, tmp_path, monkeypatch):
  """A branch may move between two questions: weights and configuration are of one answer."""
  open_files, asked = Where.open_files, []

  def counted(where):
    asked.append(where)
    return open_files(where)

  monkeypatch.setattr(Where, "open_files", counted)
  convert(checkpoint[0], tmp_path / "out", to=to, progress=False)
  assert len(asked) == 1
  model, _ = AutoModel.from_pretrained(tmp_path / "out", progress=False)
  embedding = np.asarray(model.embedder.input_embedding[...])
  np.testing.assert_array_equal(embedding, checkpoint[1]["model.embed_tokens.weight"])
