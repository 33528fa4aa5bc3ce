from .checkpoint import Checkpoint, Codec, Files, LocalFiles, RangeFiles, TensorInfo, as_files
from .gguf import read_gguf
from .json_files import read_json
from .orbax import METADATA, find_orbax, read_orbax, tree_entries
from .reader import (
  ALIGNMENT,
  BoxReader,
  Index,
  OnBytes,
  RunReader,
  TensorReader,
  aligned_empty,
  bounds_of,
  cells,
  open_reader,
  read_box,
)
from .safetensors import DTYPES, INDEX, SINGLE, is_inside, read_header, read_safetensors

__all__ = [
  "ALIGNMENT",
  "DTYPES",
  "INDEX",
  "METADATA",
  "SINGLE",
  "BoxReader",
  "Checkpoint",
  "Codec",
  "Files",
  "Index",
  "LocalFiles",
  "OnBytes",
  "RangeFiles",
  "RunReader",
  "TensorInfo",
  "TensorReader",
  "aligned_empty",
  "as_files",
  "bounds_of",
  "cells",
  "find_orbax",
  "is_inside",
  "open_reader",
  "read_box",
  "read_gguf",
  "read_header",
  "read_json",
  "read_orbax",
  "read_safetensors",
  "tree_entries",
]
