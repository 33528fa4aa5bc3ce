"""How samplers name and lay out the tensors of Hugging Face's files, as mappings that tunix reads.

tunix copies a trainer's state into that of a sampler: it finds the place of a parameter by its name, transposes it,
passes it to a hook, and casts it. The mappings follow from a family's weight table and a `Backend`. The letters of a
layout tell what an axis is: v vocabulary, n and k heads, h dimension of a head, f feed-forward width, e experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from models_core.weights import WeightTable, parse_layout

# The axes that tensor parallelism shards, and the mesh axis of experts.
_SHARDED, _EXPERTS = "vnkf", "expert"


@dataclasses.dataclass(frozen=True)
class Backend:
  """The models of a sampler. A matrix [out, in] of Hugging Face's files is [in, out] there.

  Attributes:
    axis: mesh axis of tensor parallelism.
    names: `(end of Hugging Face's name, the sampler's)`; the first that fits counts. `(?:a|b)` stands for either. Other
      names stay. A parameter of several tensors that none of them names is unknown to the sampler.
    kept: ends of the names, in Hugging Face's files, of matrices that are the same there.
    has_heads: whether heads are an axis of their own: [D, N, H] instead of [D, N * H].
    lora: `(end of the parameter's name, a's, b's)`, where the factors of LoRA are.
    lora_order: order of the axes of a factor there, which then has an axis of size 1 in front; None is as it is.
  """

  axis: str
  names: tuple[tuple[str, str], ...] = ()
  kept: tuple[str, ...] = ("embed_tokens.weight",)
  has_heads: bool = False
  lora: tuple[str, str, str] = ("", "_lora_a", "_lora_b")
  lora_order: tuple[int, ...] | None = None


# Models of tpu-inference with Hugging Face's names, and those with the names of Flax.
VLLM = Backend("model", has_heads=True)
VLLM_FLAX = dataclasses.replace(
  VLLM,
  names=(
    ("lm_head.weight", "model.lm_head"),
    ("embed_tokens.weight", "embed.embedding"),
    ("norm.weight", "norm.scale"),
    (".weight", ".kernel"),
  ),
)

# Models of sglang-jax: norms of most of them have a scale, those of Gemma a weight.
SGLANG_GEMMA = Backend(
  "tensor",
  names=(
    ("lm_head.weight", "lm_head.embedding"),
    ("embed_tokens.weight", "embed_tokens.embedding"),
  ),
  kept=("embed_tokens.weight", "lm_head.weight"),
  lora=(".weight", ".A_buffer", ".B_buffer"),
  lora_order=(0, 2, 1),
)
SGLANG = dataclasses.replace(SGLANG_GEMMA, names=(*SGLANG_GEMMA.names, ("norm.weight", "norm.scale")))
SGLANG_EXPERTS = dataclasses.replace(
  SGLANG,
  names=(
    *SGLANG.names,
    ("self_attn.o_proj.weight", "self_attn.(?:o|c)_proj.weight"),
    ("mlp.gate.weight", "moe_gate.kernel"),
    ("mlp.experts.{e}.gate_proj.weight", "mlp.wi_0"),
    ("mlp.experts.{e}.up_proj.weight", "mlp.wi_1"),
    ("mlp.experts.{e}.down_proj.weight", "mlp.wo"),
  ),
)


def backend_mappings(
  table: WeightTable, *, vllm_jax: Backend = VLLM, sglang_jax: Backend = SGLANG
) -> dict[str, dict[str, Any]]:
  """The mappings of a family, by tunix' name of the sampler.

  Args:
    table: the family's weight table of Hugging Face's naming scheme. Its parameters have the axes of their tensors.
    vllm_jax: the family's models in tpu-inference.
    sglang_jax: the family's models in sglang-jax.

  Returns:
    For each sampler what tunix calls `to_hf_mappings`, `to_hf_transpose_keys`, `lora_to_hf_mappings` and
    `lora_to_hf_transpose_keys`; and `heads`, the axes of parameters whose heads become an axis, for the hooks.
  """
  return {
    name: _mapping(table, backend) for name, backend in (("vllm_jax", vllm_jax), ("sglang_jax", sglang_jax))
  }


Spec = tuple[str | None, ...]


def _mapping(table: WeightTable, backend: Backend) -> dict[str, Any]:
  names: dict[str, tuple[str, Spec]] = {}
  lora_names: dict[str, tuple[str, Spec]] = {}
  orders: dict[str, tuple[int, ...]] = {}
  lora_orders: dict[str, tuple[int, ...]] = {}
  heads: dict[str, tuple[str, ...]] = {}
  for row in table.rows:
    form, ours = row.forms[0], _starred(row.ours)
    target = _starred(_renamed(form.name, backend.names))
    if "{" in target:
      continue
    _, axes = parse_layout(form.layout)
    if ours.endswith("_proj.w"):
      for factor, place, spec in _factors(ours, target, axes, backend):
        lora_names[factor] = (_pattern(place), spec)
        if backend.lora_order is not None:
          # A regular expression for tunix. With a `*` it would be a pattern, for which tunix adds no axis.
          lora_orders[factor.replace(".", r"\.").replace("*", r"\d+")] = backend.lora_order
    if len(axes) > 1 and not form.name.endswith(backend.kept):
      *stacked, output, into = range(len(axes))
      orders[ours] = (*stacked, into, output)
      axes = [axes[axis] for axis in orders[ours]]
    if backend.has_heads and any(len(axis) > 1 for axis in axes):
      heads[ours] = tuple(letter for axis in axes for letter in axis)
      axes = [[letter] for letter in heads[ours]]
    names[ours] = (_pattern(target), _spec(axes, backend))
  return {
    "to_hf_mappings": names,
    # For factors tunix takes the first key that fits the beginning of their names, which that of the matrix does, too.
    "to_hf_transpose_keys": lora_orders | orders,
    "lora_to_hf_mappings": lora_names,
    "lora_to_hf_transpose_keys": lora_orders,
    "heads": heads,
  }


def _starred(name: str) -> str:
  """A name in which `*` stands for the number of the layer."""
  return name.replace("{i}", "*")


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
  for end, new in names:
    if name.endswith(end):
      return name.removesuffix(end) + new
  return name


def _pattern(target: str) -> str:
  """The target as tunix takes it: with alternatives it is a regular expression, otherwise `*` is a number."""
  return target.replace(".", r"\.").replace("*", r"(\d+)") if "(" in target else target


def _spec(axes: Sequence[Sequence[str]], backend: Backend) -> Spec:
  """The mesh axes of an array's axes, from the letters of each."""
  sharded = [backend.axis if any(letter in _SHARDED for letter in axis) else None for axis in axes]
  return (_EXPERTS, *sharded[1:]) if len(axes) == 3 and axes[0] == ["e"] else tuple(sharded)


def _factors(
  ours: str, target: str, axes: Sequence[Sequence[str]], backend: Backend
) -> Iterator[tuple[str, str, Spec]]:
  """Yields name, place and spec of both factors of a matrix [out, in]: a is [in, r] and b is [r, out]."""
  (output, into), (end, *ends) = axes, backend.lora
  for side, end_of_side, own in zip("ab", ends, ([into, "r"], ["r", output]), strict=True):
    spec = _spec(own, backend)
    if backend.lora_order is not None:
      spec = tuple((None, *spec)[axis] for axis in backend.lora_order)
    yield f"{ours}_lora_{side}", target.removesuffix(end) + end_of_side, spec
