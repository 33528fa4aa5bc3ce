"""Which files of a folder look like weights and are not loaded, as notes."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection

from models_core.formats.files import Files

# Patterns of names in lower case, and why such files are not loaded. The first row that fits counts. An empty reason is
# no note: the file holds no weights of a model.
_REASONS: tuple[tuple[str, str], ...] = (
  ("training_args.bin", ""),
  ("optimizer*", ""),
  ("scheduler*", ""),
  ("scaler*", ""),
  ("rng_state*", ""),
  ("random_states*", ""),
  ("*imatrix*", ""),
  (
    "adapter_model*",
    "a LoRA adapter, which models_core.adapters.load_peft_adapter reads; the model beside it is loaded",
  ),
  ("*mmproj*.gguf", "the projector of a vision tower"),
  ("consolidated*", "the weights in the format of their author"),
  ("*.gguf", "GGUF files beside the weights; file= chooses one"),
  ("*.safetensors", "other weights than those that are loaded; file= or variant= chooses them"),
  ("*.bin", "pickles are never loaded"),
  ("*.pt", "pickles are never loaded"),
  ("*.pth", "pickles are never loaded"),
  ("*.ckpt", "pickles are never loaded"),
  ("*.h5", "the weights for another framework"),
  ("*.msgpack", "the weights for another framework"),
  ("*.onnx", "the weights for another framework"),
)
# Most folders of a directory that are looked into.
_MOST = 32


def left_out(files: Files, used: Collection[str]) -> list[str]:
  """Notes on the files that look like weights, and on the folders of such files, that are not loaded.

  Args:
    files: of a checkpoint.
    used: names of the files that are loaded.
  """
  groups: dict[str, list[str]] = {}
  folders: set[str] = set()
  for name in (name for name in files.names() if name not in used):
    folder, _, rest = name.partition("/")
    if not rest:
      if reason := _reason(name):
        groups.setdefault(reason, []).append(name)
    elif _reason(name.rpartition("/")[2]):
      folders.add(folder)
  folders |= _weighty_folders(files.path)
  folders -= {name.partition("/")[0] for name in used if "/" in name}
  notes = [f"{some(names)} {_are(names)} not loaded: {reason}" for reason, names in groups.items()]
  if folders:
    names = sorted(folders)
    kind = "folder" if len(names) == 1 else "folders"
    notes.append(f"the {kind} {', '.join(names)} {_are(names)} not loaded: subfolder= chooses one")
  return notes


def some(names: Collection[str]) -> str:
  """The first of some names, and the number of the others: "a.bin and 2 more"."""
  first = min(names)
  return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _are(names: Collection[str]) -> str:
  return "is" if len(names) == 1 else "are"


def _reason(name: str) -> str:
  low = name.lower()
  return next((reason for pattern, reason in _REASONS if fnmatch.fnmatchcase(low, pattern)), "")


def _weighty_folders(path: str) -> set[str]:
  """Folders of a directory on this machine that hold files which look like weights."""
  try:
    folders = (
      [entry for entry in os.scandir(path) if os.path.isdir(entry.path)] if os.path.isdir(path) else []
    )
    return {one.name for one in folders[:_MOST] if any(map(_reason, os.listdir(one.path)))}
  except OSError:
    return set()
