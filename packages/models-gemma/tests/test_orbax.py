"""Google's Orbax trees: the same model as from Hugging Face's files, bit by bit."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from models_core.dummy_model_creator import create_dummy_model
from models_core.errors import CheckpointError
from models_core.loading import abstract_model
from models_core.saving import flatten, save_parameters_to_orbax
from models_core.saving.plan import plan_save
from models_core.testing import MESHES, POSITIONS, TOKENS
from models_core.weights import letter_sizes, pieces, put_back
from models_gemma import gemma, gemma3
from models_gemma.gemma import params as gemma_params
from models_gemma.gemma.model import AttentionType, Gemma, ModelConfig
from models_gemma.gemma3 import params as gemma3_params
from models_gemma.gemma3.model import Gemma3
from models_gemma.gemma3.model import ModelConfig as Gemma3Config

SIZES = {
  "num_layers": 4,
  "num_embed": 67,
  "embed_dim": 48,
  "hidden_dim": 60,
  "num_heads": 6,
  "head_dim": 10,
  "norm_eps": 1e-6,
  "rope_theta": 700.0,
  "query_pre_attn_scalar": 7,
  "attention_types": (AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL) * 2,
  "sliding_window_size": 3,
}
GEMMA_2 = ModelConfig(
  **SIZES,
  num_kv_heads=3,
  final_logit_softcap=3.0,
  attn_logits_soft_cap=2.0,
  use_post_attn_norm=True,
  use_post_ffw_norm=True,
)
GEMMA_7B = dataclasses.replace(
  GEMMA_2,
  num_kv_heads=6,
  final_logit_softcap=None,
  attn_logits_soft_cap=None,
  use_post_attn_norm=False,
  use_post_ffw_norm=False,
)
GEMMA_1 = dataclasses.replace(GEMMA_7B, num_kv_heads=1)
GEMMA_3 = Gemma3Config(**SIZES, num_kv_heads=3, local_rope_theta=30.0)

# Which of a row's layouts a model is saved in, by the ending of the tensor's name.
QKV = {"attn/qkv_einsum.w"}
D_F = {"0/2 d f -> f d", "1/2 d f -> f d"}
MODELS = {
  "gemma 2b": (gemma, gemma_params, Gemma, GEMMA_1, D_F),
  "gemma 7b": (gemma, gemma_params, Gemma, GEMMA_7B, QKV | D_F),
  "gemma 2": (gemma, gemma_params, Gemma, GEMMA_2, set()),
  "gemma 3": (gemma3, gemma3_params, Gemma3, GEMMA_3, set()),
}
VISION = {
  "SigLiPFromPatches_0/siglip_encoder/embedding": {"kernel": np.ones((2, 3), np.float32)},
  "transformer/embedder/mm_input_projection": {"w": np.ones((2, 3), np.float32)},
  "transformer/embedder/mm_soft_embedding_norm": {"scale": np.ones(2, np.float32)},
}


def google_tensors(model, table, choice):
  """A model's parameters by the names of a tree: `transformer/layer_0/attn/q_einsum.w`."""
  tensors = {}
  for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name, value = ".".join(map(str, path)), np.asarray(variable.get_value())
    ((row, at),) = [(row, at) for row in table.rows if (at := row.match(name)) is not None]
    flat = [form for form in row.forms if form.name.startswith("transformer/")]
    chosen = [f for f in flat if f.layout in choice or any(f.name.endswith(c) for c in choice)]
    for piece in pieces(row, (chosen or flat)[0], at, value.shape, letter_sizes(model.config)):
      put_back(
        value[piece.target], piece, tensors.setdefault(piece.tensor, np.zeros(piece.shape, value.dtype))
      )
  return tensors


def flat(tensors):
  tree = {}
  for name, tensor in tensors.items():
    key, _, leaf = name.rpartition(".")
    tree.setdefault(key, {})[leaf] = tensor
  return tree


def nested(tensors):
  """As Google's library saves a fine-tuned model."""
  tree = {}
  for name, tensor in tensors.items():
    name = name.removeprefix("transformer/")
    *path, leaf = (name.removesuffix(".w") if "/mlp/" in name else name).replace("/", ".").split(".")
    place = tree
    for key in path:
      place = place.setdefault(key, {})
    place[leaf] = tensor
  return tree


def stacked(tensors, cycle):
  """Layers of one attention type in one array."""
  tree, layers = {}, {}
  for name, tensor in tensors.items():
    if "/layer_" not in name:
      tree[name] = tensor
      continue
    number, _, tail = name.partition("/layer_")[2].partition("/")
    layers.setdefault(f"transformer/stacked_layers/attention_type_{int(number) % cycle}/{tail}", []).append(
      (int(number), tensor)
    )
  return flat(
    tree | {name: np.stack([t for _, t in sorted(own, key=lambda p: p[0])]) for name, own in layers.items()}
  )


def save(directory, tree, **options):
  ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(directory, tree)
  return directory


def bits(model):
  return {
    path: np.asarray(v.get_value()).view(np.uint8)
    for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }


def assert_same(loaded, model):
  ours, theirs = bits(loaded), bits(model)
  assert ours.keys() == theirs.keys()
  for path, expected in theirs.items():
    np.testing.assert_array_equal(ours[path], expected, err_msg=str(path))


@pytest.fixture(scope="module")
def models():
  return {name: create_dummy_model(cls, config, scale=0.3) for name, (_, _, cls, config, _) in MODELS.items()}


@pytest.fixture
def tensors(models):
  def make(name):
    family, _, _, _, choice = MODELS[name]
    return google_tensors(models[name], family.FAMILY.weights["orbax"], choice)

  return make


@pytest.mark.parametrize("mesh", [None, "explicit", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_a_tree_is_the_model(name, mesh, models, tensors, tmp_path):
  _, params, _, config, _ = MODELS[name]
  save(tmp_path / "2b", flat(tensors(name)) | (VISION if name == "gemma 3" else {}))
  (tmp_path / "tokenizer.model").write_bytes(b"")
  loaded = params.create_model_from_checkpoint(tmp_path, config, mesh and MESHES[mesh]())
  assert_same(loaded, models[name])
  if mesh is None:
    np.testing.assert_array_equal(loaded(TOKENS, POSITIONS)[0], models[name](TOKENS, POSITIONS)[0])


@pytest.mark.parametrize(
  ("tree", "options"),
  [
    (flat, {"use_ocdbt": False}),
    (flat, {"use_zarr3": True}),
    (nested, {}),
    (lambda t: {"params": flat(t), "step": np.int32(7)}, {}),
    (lambda t: {"params": nested(t), "step": np.int32(7), "opt_state": {"mu": np.zeros(3, np.float32)}}, {}),
    (lambda t: stacked(t, 2), {}),
  ],
  ids=["directories", "zarr 3", "nested", "wrapped", "a training run", "stacked layers"],
)
def test_every_way_to_save_it(tree, options, models, tensors, tmp_path):
  save(tmp_path / "tree", tree(tensors("gemma 2")), **options)
  loaded = gemma_params.create_model_from_checkpoint(tmp_path / "tree", GEMMA_2)
  assert_same(loaded, models["gemma 2"])


def test_bfloat16_is_kept_and_cast(tensors, tmp_path):
  half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors("gemma 2").items()}
  save(tmp_path / "tree", flat(half))
  linear = half["transformer/layer_3/mlp/linear.w"].T
  loaded = gemma_params.create_model_from_checkpoint(tmp_path, GEMMA_2)
  np.testing.assert_array_equal(np.asarray(loaded.layers[3].mlp.down_proj.w.get_value()), linear)
  wide = gemma_params.create_model_from_checkpoint(tmp_path, GEMMA_2, dtype="float32")
  np.testing.assert_array_equal(
    np.asarray(wide.layers[3].mlp.down_proj.w.get_value()), linear.astype(np.float32)
  )


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_tree_is_the_model(name, models, tmp_path):
  family, params, _, config, _ = MODELS[name]
  parameters = flatten(nnx.state(models[name], nnx.Param))
  save_parameters_to_orbax(
    parameters, parameters.__getitem__, tmp_path / "tree", family=family.FAMILY, config=config
  )
  assert_same(params.create_model_from_checkpoint(tmp_path / "tree", config), models[name])


def test_rows_of_the_embedding_are_the_tree_s(tensors, tmp_path):
  padded = tensors("gemma 2")
  table = padded["transformer/embedder.input_embedding"]
  save(
    tmp_path / "tree",
    flat(padded | {"transformer/embedder.input_embedding": np.pad(table, ((0, 5), (0, 0)))}),
  )
  loaded = gemma_params.create_model_from_checkpoint(tmp_path, GEMMA_2)
  assert loaded.num_embed == GEMMA_2.num_embed + 5


# As Google's library builds the models of these sizes: query heads, and F or D first in the feed-forward weights.
PUBLISHED = {
  "gemma_2b": ({"q_einsum": (8, 2048, 256), "kv_einsum": (2, 1, 2048, 256)}, (2, 2048, 16384)),
  "gemma_7b": ({"qkv_einsum": (3, 16, 3072, 256)}, (2, 3072, 24576)),
  "gemma2_2b": ({"q_einsum": (8, 2304, 256), "kv_einsum": (2, 4, 2304, 256)}, (2, 2304, 9216)),
  "gemma2_9b": ({"q_einsum": (16, 3584, 256), "kv_einsum": (2, 8, 3584, 256)}, (2, 14336, 3584)),
  "gemma2_27b": ({"q_einsum": (32, 4608, 128), "kv_einsum": (2, 16, 4608, 128)}, (2, 36864, 4608)),
  "gemma3_270m": ({"q_einsum": (4, 640, 256), "kv_einsum": (2, 1, 640, 256)}, (2, 2048, 640)),
  "gemma3_1b": ({"q_einsum": (4, 1152, 256), "kv_einsum": (2, 1, 1152, 256)}, (2, 6912, 1152)),
  "gemma3_27b": ({"q_einsum": (32, 5376, 128), "kv_einsum": (2, 16, 5376, 128)}, (2, 21504, 5376)),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_saved_as_google_s(size):
  family = gemma3.FAMILY if size.startswith("gemma3") else gemma.FAMILY
  config = getattr(family.config_class, size)()
  shapes = {
    name: jax.ShapeDtypeStruct(parameter.shape, ml_dtypes.bfloat16)
    for name, parameter in abstract_model(family.model_class, config).parameters.items()
  }
  tensors = {
    tensor.name: tensor.shape for tensor in plan_save(shapes, family.weights["orbax"], config=config)
  }
  heads, gating = PUBLISHED[size]
  last = f"transformer/layer_{config.num_layers - 1}"
  found = {
    kind: tensors[f"{last}/attn/{kind}.w"]
    for kind in ("q_einsum", "kv_einsum", "qkv_einsum")
    if f"{last}/attn/{kind}.w" in tensors
  }
  assert found == heads
  assert tensors[f"{last}/mlp/gating_einsum.w"] == gating
  assert tensors["transformer/embedder.input_embedding"] == (config.num_embed, config.embed_dim)


def test_square_feed_forward_weights_are_ambiguous(tmp_path):
  config = dataclasses.replace(GEMMA_2, hidden_dim=GEMMA_2.embed_dim)
  model = create_dummy_model(Gemma, config)
  save(tmp_path / "tree", flat(google_tensors(model, gemma.FAMILY.weights["orbax"], set())))
  with pytest.raises(CheckpointError, match=r"gating_einsum.w .* is ambiguous"):
    gemma_params.create_model_from_checkpoint(tmp_path, config)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: t.pop("transformer/layer_1/mlp/linear.w"), "layer_1/mlp/linear.w is missing"),
    (lambda t: t.update({"transformer/audio.w": np.ones(3, np.float32)}), "transformer/audio.w .* is unexpected"),
    (lambda t: t.update({"transformer/final_norm.scale": np.ones(3, np.float32)}), "final_norm.scale has shape"),
    (lambda t: t.update({"transformer/layer_0/attn/qkv_einsum.w": np.ones((3, 6, 48, 10), np.float32)}), "occurs twice: the checkpoint holds it as"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message, tensors, tmp_path):
  changed = tensors("gemma 2")
  change(changed)
  save(tmp_path / "tree", flat(changed))
  with pytest.raises(CheckpointError, match=message):
    gemma_params.create_model_from_checkpoint(tmp_path, GEMMA_2)
