from .atomic import recover, replace_directory
from .base import Base
from .companions import CONFIG, WEIGHTS_KEY, is_companion
from .directory import write_texts
from .host_arrays import whole
from .orbax_saver import save_parameters_to_orbax
from .parameters import flatten, save_parameters_to_safetensors
from .plan import SavedFile, Shaped, parse_size, plan_save, plan_state
from .safetensors_writer import write_files
from .writers import WRITERS, Writer

__all__ = [
  "CONFIG",
  "WEIGHTS_KEY",
  "WRITERS",
  "Base",
  "SavedFile",
  "Shaped",
  "Writer",
  "flatten",
  "is_companion",
  "parse_size",
  "plan_save",
  "plan_state",
  "recover",
  "replace_directory",
  "save_parameters_to_orbax",
  "save_parameters_to_safetensors",
  "whole",
  "write_files",
  "write_texts",
]
