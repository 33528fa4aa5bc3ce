"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import struct
from collections.abc import Callable

from models_core.formats.files import Files

GGUF_MAGIC = b"GGUF"
# Bytes that tell the kind of a file.
FIRST = 64

# Suffixes of files that hold no weights, or weights in a format that their name tells. All others may hold anything:
# tools store GGUF files as `sha256-...` or as `model.bin`.
_NAMED = (
  ".safetensors", ".gguf", ".json", ".jsonl", ".txt", ".md", ".model", ".py", ".jinja", ".yaml", ".yml", ".png",
  ".jpg", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".tmp", ".lock", ".html", ".pdf", ".csv", ".npz",
)  # fmt: skip
# Most files of unknown kind whose first bytes are read.
_MOST = 16

_CONVERT = (
  "convert it to safetensors, for example with transformers: "
  "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
)
# First bytes, and the rest of a sentence that begins with the file's name.
_OTHERS: tuple[tuple[bytes, str], ...] = (
  (b"version https://git-lfs", "is a Git LFS pointer, not the file: run `git lfs pull` in the clone"),
  (b"PK\x03\x04", f"is a pickle of PyTorch, and pickles are never loaded: {_CONVERT}"),
  (b"\x80\x02", f"is a pickle, and pickles are never loaded: {_CONVERT}"),
  (b"<!DOCTYPE", "is a web page, not the file: download it again"),
  (b"<!doctype", "is a web page, not the file: download it again"),
  (b"<html", "is a web page, not the file: download it again"),
  (b"\x1f\x8b", "is compressed with gzip: unpack it"),
  (b"\x89HDF", "is an HDF5 file: load a safetensors or GGUF checkpoint of the model instead"),
  (bytes(16), "begins with zeros, as a download that was cut off leaves it: download it again"),
)


def is_gguf(start: bytes) -> bool:
  """Whether a file that begins with these bytes is a GGUF file."""
  return start.startswith(GGUF_MAGIC)


def is_safetensors(start: bytes) -> bool:
  """Whether a file that begins with these bytes is a safetensors file: a length, then a JSON object."""
  return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 40


def strangeness(start: bytes) -> str | None:
  """What a file that begins with these bytes is, as the rest of a sentence that begins with its name.

  None if it is none of the kinds that lie in the place of weights, such as a Git LFS pointer.
  """
  # The length at the beginning of a safetensors file may have the bytes of any of them.
  if is_safetensors(start):
    return None
  return next((what for magic, what in _OTHERS if start.startswith(magic)), None)


def named(files: Files, suffix: str, is_kind: Callable[[bytes], bool]) -> list[str]:
  """Sorted names of the files of a kind at the top level.

  Names tell the kind. First bytes tell that of a single file, and if no name has the suffix, that of files whose own
  suffix says nothing.

  Args:
    files: to look through.
    suffix: of names of the kind.
    is_kind: whether a file that begins with some bytes is of the kind.
  """
  top = sorted(name for name in files.names() if "/" not in name)
  if len(top) == 1:
    start = files.read(top[0], 0, FIRST)
    if is_gguf(start) or is_safetensors(start):
      return top if is_kind(start) else []
  if found := [name for name in top if name.endswith(suffix)]:
    return found
  unknown = [name for name in top if not name.endswith(_NAMED) and not name.startswith(".")]
  return [name for name in unknown[:_MOST] if is_kind(files.read(name, 0, FIRST))]
