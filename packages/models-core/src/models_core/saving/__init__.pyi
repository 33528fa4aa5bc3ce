from .atomic import recover, replace_directory
from .directory import write_texts
from .host_arrays import whole
from .orbax_saver import save_parameters_to_orbax
from .parameters import flatten, save_parameters
from .plan import SavedFile, Shaped, parse_size, plan_state
from .safetensors_writer import write_files

__all__ = [
  "SavedFile",
  "Shaped",
  "flatten",
  "parse_size",
  "plan_state",
  "recover",
  "replace_directory",
  "save_parameters",
  "save_parameters_to_orbax",
  "whole",
  "write_files",
  "write_texts",
]
