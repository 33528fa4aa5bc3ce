from .lora import (
  Adapter,
  Factors,
  Roles,
  adapter_of,
  check_factors,
  merge_adapter,
  merge_into,
  merge_lora,
  merge_parameter,
  save_lora_merged,
  save_merged,
  set_adapter,
)
from .orbax_tree import factor_names, load_orbax_adapter
from .patterns import match_modules, unmatched
from .peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_peft_adapter, save_peft_adapter

__all__ = [
  "ADAPTER_CONFIG",
  "ADAPTER_WEIGHTS",
  "Adapter",
  "Factors",
  "Roles",
  "adapter_of",
  "check_factors",
  "factor_names",
  "load_orbax_adapter",
  "load_peft_adapter",
  "match_modules",
  "merge_adapter",
  "merge_into",
  "merge_lora",
  "merge_parameter",
  "save_lora_merged",
  "save_merged",
  "save_peft_adapter",
  "set_adapter",
  "unmatched",
]
