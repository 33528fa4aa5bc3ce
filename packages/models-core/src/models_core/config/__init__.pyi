from .fields import SIZES, check_decoder, read_sizes, write_rope, write_sizes
from .gguf import gguf_config
from .headers import HEADER_CONFIGS
from .keys import ConfigKeys, collect_notes
from .presets import preset_rows
from .rope import write_scaling

__all__ = [
  "HEADER_CONFIGS",
  "SIZES",
  "ConfigKeys",
  "check_decoder",
  "collect_notes",
  "gguf_config",
  "preset_rows",
  "read_sizes",
  "write_rope",
  "write_scaling",
  "write_sizes",
]
