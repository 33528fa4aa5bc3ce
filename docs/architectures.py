"""The page of an architecture: its published sizes and its weight table, from the data that the code uses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from models_automodel.presets import presets
from models_core.family import Family
from models_core.layers import shapes_only

CONTEXT = 8192
# Column -> the field of a configuration that it shows.
SIZES = {
  "layers": "num_layers",
  "D": "embed_dim",
  "F": "hidden_dim",
  "heads": "num_heads",
  "KV heads": "num_kv_heads",
  "H": "head_dim",
  "experts": "num_experts",
  "F of an expert": "moe_hidden_dim",
}
_TITLES = {
  "gemma": "Gemma 1, 1.1 and 2",
  "gemma3": "Gemma 3",
  "llama3": "Llama 3",
  "qwen2": "Qwen 2.5",
  "qwen3": "Qwen 3",
}


def architecture_page(name: str, family: Family[Any, Any]) -> str:
  """Markdown of a family's page."""
  configs = {preset: getattr(family.config_class, preset)() for preset in presets(family.config_class)}
  types = ", ".join(f'`"{model_type}"`' for model_type in family.model_types)
  return "\n".join([
    f"# {_TITLES.get(name, name)}",
    "",
    (family.model_class.__doc__ or "").split("\n\n")[0].strip(),
    "",
    f"Loads every checkpoint whose config.json has the `model_type` {types}, and its GGUF files.",
    "",
    "## Sizes",
    "",
    f"A preset is a class method of `{family.config_class.__module__}.{family.config_class.__name__}`. The parameters' bytes",
    f"and those of the KV cache of one sequence of {CONTEXT:,} tokens are for bfloat16.",
    "",
    *sizes(family, configs),
    "",
    "## Parameters and tensors",
    "",
    "The name of a parameter in the model, the tensor of Hugging Face's files that it comes from, and how the tensor's axes",
    "become the parameter's: `(n h) d` is a matrix whose rows are the dimensions of all heads.",
    "",
    *weights(family),
    "",
    "## Parity",
    "",
    "The session `parity` compares the logits of tiny models of this architecture with those of transformers: in float32 at most",
    "2e-5 of the largest logit apart, on one device and on a mesh of eight.",
    "",
  ])  # fmt: skip


def sizes(family: Family[Any, Any], configs: Mapping[str, Any]) -> list[str]:
  """The table of presets. Presets with the same numbers share a row."""
  columns = {
    title: field for title, field in SIZES.items() if any(getattr(c, field, None) for c in configs.values())
  }
  same: dict[Any, list[str]] = {}
  for preset, config in configs.items():
    same.setdefault(config, []).append(f"`{preset}`")
  rows = []
  for config, names in same.items():
    parameters, cache = account(family, config)
    numbers = [str(getattr(config, field) or "") for field in columns.values()]
    memory = [f"{parameters / 1e9:,.2f} B", f"{2 * parameters / 1e9:,.1f} GB", f"{cache / 1e9:,.2f} GB"]
    rows.append([", ".join(names), *numbers, *memory])
  header = ["preset", *columns, "parameters", "bytes", "cache"]
  return table(header, rows)


def account(family: Family[Any, Any], config: Any) -> tuple[int, int]:
  """The number of parameters, and the bytes of keys and values of one sequence in bfloat16.

  Layers with a sliding window keep as many tokens as their window has.
  """
  make: Any = family.model_class
  with nnx.use_eager_sharding(False), shapes_only():
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(params=0)))
  parameters = sum(math.prod(array.shape) for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
  tokens = sum(min(window or CONTEXT, CONTEXT) for window in model.windows())
  return parameters, tokens * 2 * config.num_kv_heads * config.head_dim * 2


def weights(family: Family[Any, Any]) -> list[str]:
  """The weight table of Hugging Face's names."""
  rows = [
    [f"`{row.ours}`" if first else "or", f"`{form.name}`", f"`{form.layout}`"]
    for row in family.huggingface.rows
    for first, form in zip((True, *[False] * len(row.forms)), row.forms, strict=False)
  ]
  return table(["parameter", "tensor", "axes"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table."""
  return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
