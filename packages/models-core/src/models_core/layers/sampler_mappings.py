"""What samplers of RL trainers ask a model for, to take its weights: names, orders of axes, and hooks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models_core.errors import ConfigError
from models_core.layers.parameters import dotted

_DEFAULT = "vllm_jax"


class SamplerMappings:
  """The methods that `tunix.generate.mappings.MappingConfig` calls on a model. All return new dictionaries.

  The backend is tunix' name of a sampler: "vllm_jax", which is the default, or "sglang_jax".

  Attributes:
    BACKEND_MAPPINGS: the family's mappings, by backend; the family's package sets them, made by
      `models_core.rollout.backend_mappings`.
  """

  BACKEND_MAPPINGS: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

  config: Any

  def to_hf_mappings(self, backend: str | None = None) -> dict[str, tuple[str, tuple[str | None, ...]]]:
    """The name of each parameter in the sampler, and the mesh axes of its axes there; `*` is a layer's number.

    Raises:
      ConfigError: if the sampler has no place for one of the model's parameters, or the backend is unknown.
    """
    names = self._mapping(backend, "to_hf_mappings")
    patterns = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in names]
    for path, variable in nnx.to_flat_state(nnx.state(self, nnx.Param)):
      name = dotted(path)
      if not isinstance(variable, nnx.LoRAParam) and not any(one.fullmatch(name) for one in patterns):
        raise ConfigError(
          f"the models of {backend or _DEFAULT} have no place for {name}: hand the weights over as named arrays, with "
          "models_core.rollout.to_checkpoint"
        )
    return names

  def lora_to_hf_mappings(self, backend: str | None = None) -> dict[str, tuple[str, tuple[str | None, ...]]]:
    """The name of each LoRA factor in the sampler, and the mesh axes of its axes there."""
    return self._mapping(backend, "lora_to_hf_mappings")

  def to_hf_transpose_keys(self, backend: str | None = None) -> dict[str, tuple[int, ...]]:
    """The order of the axes in the sampler, for each parameter that has another order here."""
    return self._mapping(backend, "to_hf_transpose_keys")

  def lora_to_hf_transpose_keys(self, backend: str | None = None) -> dict[str, tuple[int, ...]]:
    """The order of the axes in the sampler, for each LoRA factor that has another order here."""
    return self._mapping(backend, "lora_to_hf_transpose_keys")

  def to_hf_hook_fns(self, backend: str | None = None) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Functions that split the heads of transposed parameters, for samplers in which heads are an axis."""
    config = self.config
    sizes = {"n": config.num_heads, "k": config.num_kv_heads, "h": config.head_dim}
    hooks: dict[str, Callable[[jax.Array], jax.Array]] = {}
    for name, letters in self._mapping(backend, "heads").items():
      split = functools.partial(jnp.reshape, shape=tuple(sizes.get(letter, -1) for letter in letters))
      hooks |= {name.replace("*", str(layer)): split for layer in range(config.num_layers)}
    return hooks

  def _mapping(self, backend: str | None, part: str) -> dict[str, Any]:
    if (mapping := self.BACKEND_MAPPINGS.get(backend or _DEFAULT)) is None:
      raise ConfigError(
        f"{type(self).__name__} has no mapping for the backend {backend or _DEFAULT!r}, only for "
        f"{', '.join(self.BACKEND_MAPPINGS) or 'none'}"
      )
    return dict(mapping[part])
