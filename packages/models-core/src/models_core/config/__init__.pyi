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
from .quantisation import (
  QUANTISATION_KEYS,
  SCHEMES,
  Stated,
  is_mark,
  quantisation_problem,
  stated_quantisation,
)
from .rope import write_scaling

__all__ = [
  "HEADER_CONFIGS",
  "QUANTISATION_KEYS",
  "SCHEMES",
  "SIZES",
  "TYING_FIELDS",
  "VOCABULARY_FIELDS",
  "ConfigKeys",
  "Stated",
  "check_decoder",
  "collect_notes",
  "field_of",
  "gguf_config",
  "is_mark",
  "preset_rows",
  "quantisation_problem",
  "read_sizes",
  "stated_quantisation",
  "write_rope",
  "write_scaling",
  "write_sizes",
]
