"""What all of Google's Orbax trees of Gemma share: names, fused tensors, and tensors that the model does not need."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models_core.formats import TensorInfo
from models_core.weights import TRAINING, Form
from models_gemma import vision_tower

# A parameter and its forms, of which a checkpoint has one: (tensor below "transformer/", layout). Each form but the
# first has a third entry, a function that tells whether Google's checkpoint of a configuration has this form.
Forms = tuple[str, Sequence[tuple[Any, ...]]]

L, T = "layers.{i}", "layer_{i}"
ATTN, GATING = f"{T}/attn", f"{T}/mlp/gating_einsum.w"

# Values of D in Gemma 1 and Gemma 2 2B, whose feed-forward weights have D before F.
_D_BEFORE_F = frozenset({2048, 3072, 2304})


def _d_f(config: Any) -> bool:
  return config.embed_dim in _D_BEFORE_F


def _mha(config: Any) -> bool:
  return config.num_heads == config.num_kv_heads


COMMON: tuple[Forms, ...] = (
  # ours                          checkpoint, layout: checkpoint -> ours
  ("embedder.input_embedding",    [("embedder.input_embedding", "v d")]),
  (f"{L}.input_layernorm.w",      [(f"{T}/pre_attention_norm.scale", "d")]),
  (f"{L}.attn.q_proj.w",          [(f"{ATTN}/q_einsum.w", "n d h -> (n h) d"), (f"{ATTN}/qkv_einsum.w", "0/3 n d h -> (n h) d", _mha)]),
  (f"{L}.attn.k_proj.w",          [(f"{ATTN}/kv_einsum.w", "0/2 k d h -> (k h) d"), (f"{ATTN}/qkv_einsum.w", "1/3 k d h -> (k h) d", _mha)]),
  (f"{L}.attn.v_proj.w",          [(f"{ATTN}/kv_einsum.w", "1/2 k d h -> (k h) d"), (f"{ATTN}/qkv_einsum.w", "2/3 k d h -> (k h) d", _mha)]),
  (f"{L}.attn.o_proj.w",          [(f"{ATTN}/attn_vec_einsum.w", "n h d -> d (n h)")]),
  (f"{L}.mlp.gate_proj.w",        [(GATING, "0/2 f d -> f d"), (GATING, "0/2 d f -> f d", _d_f)]),
  (f"{L}.mlp.up_proj.w",          [(GATING, "1/2 f d -> f d"), (GATING, "1/2 d f -> f d", _d_f)]),
  (f"{L}.mlp.down_proj.w",        [(f"{T}/mlp/linear.w", "f d -> d f")]),
  ("final_norm.w",                [("final_norm.scale", "d")]),
  # Google publishes no tree of a model with a head of its own: this is our name for it.
  ("lm_head.w",                   [("lm_head.w", "v d")]),
)  # fmt: skip

IGNORED = (*vision_tower.ORBAX, *TRAINING)


# In Google's trees, in those that tunix saves, and in those of the model's own names.
_EMBEDDINGS = (
  "transformer/embedder.input_embedding",
  "embedder.input_embedding",
  "embedder.input_embedding.value",
)
_LAYER = re.compile(r"(?:(?:transformer/)?layer_|layers\.)(\d+)[./]")


def rows(forms: Iterable[Forms]) -> list[tuple[str, list[Form]]]:
  """Makes rows of a weight table, with two names for each tensor.

  `transformer/layer_0/mlp/linear.w` is the name in published trees, `layer_0.mlp.linear` the one in trees of fine-tuned
  models, as the library `gemma` saves them.
  """
  return [
    (
      ours,
      [
        form
        for name, layout, *when in own
        for form in (Form(f"transformer/{name}", layout, *when), Form(_nested(name), layout))
      ],
    )
    for ours, own in forms
  ]


def _nested(name: str) -> str:
  """Name of a tensor in a tree with a key for each level: `layer_0/mlp/linear.w` -> `layer_0.mlp.linear`."""
  dotted = name.replace("/", ".")
  return dotted.removesuffix(".w") if "/mlp/" in name else dotted


def fit_rows(config: Any, tensors: Mapping[str, TensorInfo]) -> Any:
  """Returns the configuration with the tree's number of rows of the embedding, which differs from Hugging Face's."""
  for name in _EMBEDDINGS:
    if name in tensors:
      return dataclasses.replace(config, num_embed=tensors[name].shape[0])
  return config


def fit_config(config: Any, tensors: Mapping[str, TensorInfo]) -> Any:
  """Returns what `fit_rows` returns, or None if the tree has another width or another number of layers."""
  layers = {found[1] for name in tensors if (found := _LAYER.match(name))}
  widths = {tensors[name].shape[1:] for name in _EMBEDDINGS if name in tensors}
  if len(layers) != config.num_layers or widths != {(config.embed_dim,)}:
    return None
  return fit_rows(config, tensors)
