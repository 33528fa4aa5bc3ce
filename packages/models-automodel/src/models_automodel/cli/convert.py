"""`automodel convert`: writes a checkpoint in another format, dtype or shard size."""

from __future__ import annotations

import argparse
import pathlib

from models_automodel.cli.arguments import Commands, model_arguments, where_of
from models_automodel.cli.memory import gib
from models_automodel.cli.output import add_json, print_json
from models_automodel.interrupt import raise_at_interrupt


def add_convert(commands: Commands) -> None:
  """Adds `automodel convert`."""
  parser = commands.add_parser(
    "convert",
    parents=[model_arguments()],
    help="convert a checkpoint: from GGUF, from or to an Orbax tree, to another dtype or shard size",
  )
  parser.set_defaults(run=_convert)
  parser.add_argument(
    "target",
    help="directory or address in an object store to write; missing or empty, unless --overwrite is given",
  )
  parser.add_argument(
    "--to",
    choices=("huggingface", "orbax", "maxtext"),
    default="huggingface",
    help="huggingface (default): safetensors files that transformers loads; orbax: a tree that Orbax restores; maxtext: one "
    "that MaxText loads",
  )
  parser.add_argument(
    "--max-shard-size", type=_size, help="tensor data in one safetensors file, such as 2GB (default: 5GB)"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace a checkpoint in the target; other files stay"
  )
  add_json(parser)


def _size(text: str) -> int:
  from models_core.saving import parse_size

  try:
    return parse_size(text)
  except ValueError as error:
    # argparse shows the message of this error alone.
    raise argparse.ArgumentTypeError(str(error)) from error


def _convert(options: argparse.Namespace) -> None:
  from models_automodel.convert import convert

  # What is half written is removed.
  raise_at_interrupt()
  convert(
    where_of(options),
    options.target,
    to=options.to,
    dtype=options.dtype,
    max_shard_size=options.max_shard_size,
    ignore_config_keys=options.ignore_config_key,
    overwrite=options.overwrite,
  )
  found = _written(options.target)
  if options.json:
    print_json({"path": options.target, "files": found})
  elif found:
    print(f"wrote {options.target}: {len(found)} files, {gib(sum(found.values()))}")
  else:
    print(f"wrote {options.target}")


def _written(target: str) -> dict[str, int]:
  """Name and bytes of each file of a directory on this machine; empty for another place."""
  root = pathlib.Path(target).expanduser()
  files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else []
  return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
