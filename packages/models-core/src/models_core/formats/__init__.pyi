from .checkpoint import Checkpoint, Format, Header
from .files import Files, LocalFiles, RangeFiles, as_files, dead_entries, names_in, open_file, read_ahead
from .gguf import GGUF, GgufCheckpoint, read_gguf
from .json_files import read_json
from .kinds import strangeness
from .memory import ALIGNMENT, aligned_empty
from .orbax import METADATA, ORBAX, read_orbax
from .reader import CellReader, Extent, OnBytes, RunReader, TensorReader
from .registry import FORMATS, checkpoint_entries, formats_in, weight_files
from .safetensors import (
  CODES,
  DTYPES,
  SAFETENSORS,
  SafetensorsCheckpoint,
  file_layout,
  read_safetensors,
  read_safetensors_file,
  safetensors_entries,
  shard_name,
)
from .safetensors_files import INDEX, SINGLE
from .selection import checkpoint_folders, is_part, open_folder, select
from .tensors import Codec, Index, Packing, ReadBox, TensorInfo, bounds_of, cells_of

__all__ = [
  "ALIGNMENT",
  "CODES",
  "DTYPES",
  "FORMATS",
  "GGUF",
  "INDEX",
  "METADATA",
  "ORBAX",
  "SAFETENSORS",
  "SINGLE",
  "CellReader",
  "Checkpoint",
  "Codec",
  "Extent",
  "Files",
  "Format",
  "GgufCheckpoint",
  "Header",
  "Index",
  "LocalFiles",
  "OnBytes",
  "Packing",
  "RangeFiles",
  "ReadBox",
  "RunReader",
  "SafetensorsCheckpoint",
  "TensorInfo",
  "TensorReader",
  "aligned_empty",
  "as_files",
  "bounds_of",
  "cells_of",
  "checkpoint_entries",
  "checkpoint_folders",
  "dead_entries",
  "file_layout",
  "formats_in",
  "is_part",
  "names_in",
  "open_file",
  "open_folder",
  "read_ahead",
  "read_gguf",
  "read_json",
  "read_orbax",
  "read_safetensors",
  "read_safetensors_file",
  "safetensors_entries",
  "select",
  "shard_name",
  "strangeness",
  "weight_files",
]
