"""The keyword arguments of `AutoModel.from_pretrained` as types, so that type checkers find a misspelt one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
  from models_core.sharding import ShardingConfig


class ConfigFields(TypedDict, total=False):
  """Fields of the configurations of the families of this project.

  A family of another package may have more. For them, pass `config=dataclasses.replace(config, field=value)`.
  """

  attention_bias: bool
  attention_types: Sequence[Any]
  attn_implementation: str
  attn_logits_soft_cap: float | None
  decoder_sparse_step: int
  embed_dim: int
  final_logit_softcap: float | None
  head_dim: int
  hidden_dim: int
  local_rope_theta: float
  max_window_layers: int
  mlp_bias: bool
  mlp_only_layers: Sequence[int]
  moe_hidden_dim: int | None
  norm_eps: float
  norm_topk_prob: bool | None
  num_embed: int
  num_experts: int | None
  num_experts_per_tok: int | None
  num_heads: int
  num_kv_heads: int
  num_layers: int
  query_pre_attn_scalar: int
  remat_config: Any  # a member of RematConfig, its name, or its number
  scan_layers: bool
  rope_scaling: Any
  rope_theta: float
  shd_config: ShardingConfig
  sliding_window: int | None
  sliding_window_size: int | None
  use_post_attn_norm: bool
  use_post_ffw_norm: bool
  use_tied_embedding: bool
  vocab_size: int
  weight_tying: bool


class Keywords(ConfigFields, total=False):
  """What `from_pretrained` takes besides its named parameters; its docstring says what each is for."""

  dtype: Any
  config: Any
  ignore_config_keys: Collection[str]
  layers: range | None
  strict_sharding: bool
  use_flash_attention: bool  # tunix' name for a choice of attn_implementation
