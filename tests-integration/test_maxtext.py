"""Trees that MaxText wrote (`maxtext/make.py`): the same logits as MaxText's, on every mesh, and the same tree again."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models_automodel import AutoModel, CheckpointError, ConfigError
from models_automodel.convert import convert
from models_core.formats import LocalFiles, read_orbax
from models_core.layers import dotted
from models_core.loading import abstract_model
from models_core.rope_scaling import Llama3Scaling
from models_core.saving import WRITERS
from models_core.testing import MESHES
from models_gemma.gemma3 import FAMILY as GEMMA_3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config
from models_llama.llama3 import FAMILY as LLAMA
from models_llama.llama3.model import ModelConfig as LlamaConfig
from models_qwen.qwen2 import FAMILY as QWEN_2
from models_qwen.qwen2.model import ModelConfig as Qwen2Config
from models_qwen.qwen3 import FAMILY as QWEN_3
from models_qwen.qwen3.model import ModelConfig as Qwen3Config

TREES = pathlib.Path(__file__).parent / "maxtext"
SIZES = {
  "num_layers": 3,
  "vocab_size": 16,
  "embed_dim": 8,
  "hidden_dim": 12,
  "num_heads": 4,
  "head_dim": 4,
  "num_kv_heads": 2,
  "rope_theta": 10_000.0,
  "norm_eps": 1e-5,
}
SCALED = LlamaConfig(**SIZES, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_hidden_dim": 12, "norm_topk_prob": True}
MODELS = {
  "llama3": (LLAMA, LlamaConfig(**SIZES)),
  "llama3.1": (LLAMA, SCALED),
  "llama3.1-unscanned": (LLAMA, SCALED),
  "qwen2": (QWEN_2, Qwen2Config(**SIZES, use_tied_embedding=True)),
  "qwen3": (QWEN_3, Qwen3Config(**SIZES, use_tied_embedding=True)),
  "qwen3-moe": (QWEN_3, Qwen3Config(**SIZES, **EXPERTS)),
}


def logits(model, tokens):
  count = tokens.shape[1]
  found = model(jnp.asarray(tokens), jnp.arange(count)[None], None, jnp.tri(count, dtype=bool)[None])
  return np.asarray(found[0] if isinstance(found, tuple) else found)


def bits(model):
  return {
    dotted(path): np.asarray(variable.get_value()).tobytes()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def tensors(directory):
  """The arrays of a tree below its two wrappings, without the state of the training."""
  checkpoint = read_orbax(LocalFiles(str(directory)))
  reader = checkpoint.open(())
  return {
    name: reader.read_box(info, info.everything)
    for name, info in checkpoint.tensors.items()
    if name.startswith(("decoder", "token_embedder"))
  }


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_maxtext_s(name):
  golden = np.load(TREES / name / "logits.npz")
  model, _ = AutoModel.from_pretrained(TREES / name, config=MODELS[name][1])
  np.testing.assert_allclose(logits(model, golden["tokens"]), golden["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["explicit", "auto"])
@pytest.mark.parametrize("name", ["llama3.1", "qwen3-moe"])
def test_the_model_is_the_same_on_every_mesh(name, mesh):
  config = MODELS[name][1]
  alone, _ = AutoModel.from_pretrained(TREES / name, config=config)
  spread, _ = AutoModel.from_pretrained(TREES / name, MESHES[mesh](), config=config)
  assert bits(spread) == bits(alone)


@pytest.mark.parametrize("name", MODELS)
def test_written_for_maxtext_it_is_the_same_tree(name, tmp_path):
  family, config = MODELS[name]
  # Beside a link to the tree, so that the configuration is found.
  (tmp_path / "theirs").mkdir()
  (tmp_path / "theirs" / "0").symlink_to(TREES / name / "0")
  (tmp_path / "theirs" / "config.json").write_text(json.dumps(family.write_config(config)))
  convert(tmp_path / "theirs", tmp_path / "huggingface", progress=False)
  convert(tmp_path / "huggingface", tmp_path / "ours", to="maxtext", progress=False)
  ours, theirs = tensors(tmp_path / "ours"), tensors(TREES / name.removesuffix("-unscanned"))
  if name.endswith("-unscanned"):
    # The tree of a model in Hugging Face's files has its layers stacked, whatever MaxText's had.
    assert ours.keys() == theirs.keys()
    convert(tmp_path / "theirs", tmp_path / "again", to="maxtext", progress=False)
    ours, theirs = tensors(tmp_path / "again"), tensors(TREES / name)
  assert ours.keys() == theirs.keys()
  for tensor, array in theirs.items():
    np.testing.assert_array_equal(ours[tensor], array, err_msg=tensor)
  (keys,) = {key.partition("decoder")[0] for key in metadata_names(tmp_path / "ours") if "decoder" in key}
  assert keys == "params.params."


def metadata_names(directory):
  tree = json.loads((directory / "_METADATA").read_text())["tree_metadata"]
  return [".".join(entry["key"] for entry in leaf["key_metadata"]) for leaf in tree.values()]


def test_the_first_layers(tmp_path):
  config = MODELS["qwen3"][1]
  whole, _ = AutoModel.from_pretrained(TREES / "qwen3", config=config)
  first, _ = AutoModel.from_pretrained(TREES / "qwen3", config=config, layers=range(2))
  expected = {name: value for name, value in bits(whole).items() if not name.startswith("layers.2.")}
  assert bits(first) == expected


def test_another_number_of_layers_is_refused():
  config = dataclasses.replace(MODELS["qwen3"][1], num_layers=2)
  with pytest.raises(
    CheckpointError,
    match=r"mlp\.wi_0\.kernel has shape \(8, 3, 12\), but the parameter layers\.0\.\S+ \(12, 8\) needs \(8, 2, 12\)",
  ):
    AutoModel.plan(TREES / "qwen3", config=config)


def test_gemma_is_not_written(tmp_path):
  config = Gemma3Config.gemma3_270m()
  shapes = abstract_model(GEMMA_3.model_class, config).parameters
  with pytest.raises(
    ConfigError, match="gemma3 has no weight table for the naming scheme 'maxtext', only for"
  ):
    WRITERS["maxtext"].save(shapes, shapes.get, tmp_path / "out", family=GEMMA_3, config=config)
  assert not (tmp_path / "out").exists()
