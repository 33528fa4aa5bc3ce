from .fingerprint import fingerprint_of
from .lora import Adapter, Factors, Roles, Rows, adapter_of, check_factors, lora_rules, set_adapter
from .merging import (
  merge_adapter,
  merge_into,
  merge_lora,
  merge_parameter,
  merged_model,
  save_lora_merged,
  save_merged,
)
from .orbax_tree import factor_names, load_orbax_adapter
from .patterns import match_modules, unmatched
from .peft import load_peft_adapter
from .peft_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PeftConfig, read_peft_config
from .peft_writer import save_peft_adapter
from .vocabulary import merged_config

__all__ = [
  "ADAPTER_CONFIG",
  "ADAPTER_WEIGHTS",
  "Adapter",
  "Factors",
  "PeftConfig",
  "Roles",
  "Rows",
  "adapter_of",
  "check_factors",
  "factor_names",
  "fingerprint_of",
  "load_orbax_adapter",
  "load_peft_adapter",
  "lora_rules",
  "match_modules",
  "merge_adapter",
  "merge_into",
  "merge_lora",
  "merge_parameter",
  "merged_config",
  "merged_model",
  "read_peft_config",
  "save_lora_merged",
  "save_merged",
  "save_peft_adapter",
  "set_adapter",
  "unmatched",
]
