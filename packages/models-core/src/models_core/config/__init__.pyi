from .fields import (
  SIZES,
  TYING_FIELDS,
  VOCABULARY_FIELDS,
  check_decoder,
  field_of,
  read_sizes,
  write_rope,
  write_sizes,
)
from .gguf import gguf_config
from .headers import HEADER_CONFIGS
from .keys import ConfigKeys, collect_notes
from .presets import preset_rows
from .rope import write_scaling

__all__ = [
  "HEADER_CONFIGS",
  "SIZES",
  "TYING_FIELDS",
  "VOCABULARY_FIELDS",
  "ConfigKeys",
  "check_decoder",
  "collect_notes",
  "field_of",
  "gguf_config",
  "preset_rows",
  "read_sizes",
  "write_rope",
  "write_scaling",
  "write_sizes",
]
