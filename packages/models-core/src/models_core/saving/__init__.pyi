from .atomic import check_directory, local_path, recover, replace_directory
from .base import Base
from .companions import CONFIG, WEIGHTS_KEY, is_companion
from .directory import write_texts
from .host_arrays import whole
from .orbax_saver import save_parameters_to_orbax
from .parameters import flatten, save_parameters_to_safetensors
from .plan import SavedFile, Shaped, parse_size, plan_save, plan_state
from .safetensors_writer import file_bytes, write_files, write_own_file
from .target import Draft, Place, Target, check_target, path_of, put_files
from .writers import WRITERS, Writer

__all__ = [
  "CONFIG",
  "WEIGHTS_KEY",
  "WRITERS",
  "Base",
  "Draft",
  "Place",
  "SavedFile",
  "Shaped",
  "Target",
  "Writer",
  "check_directory",
  "check_target",
  "file_bytes",
  "flatten",
  "is_companion",
  "local_path",
  "parse_size",
  "path_of",
  "plan_save",
  "plan_state",
  "put_files",
  "recover",
  "replace_directory",
  "save_parameters_to_orbax",
  "save_parameters_to_safetensors",
  "whole",
  "write_files",
  "write_own_file",
  "write_texts",
]
