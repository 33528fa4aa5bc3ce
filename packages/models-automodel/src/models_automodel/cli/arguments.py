"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from models_automodel.cli.mesh_argument import parse_mesh

if TYPE_CHECKING:
  from models_automodel.where import Where

# The type that `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def model_arguments() -> argparse.ArgumentParser:
  """A parent parser with the model, its source and the dtype of its parameters."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "model",
    help="repository id, local directory, GGUF file, or gs:// or s3:// address; org/repo:Q8_0 and org/repo/folder choose "
    "a part; show also takes a name such as llama-3.1-8b",
  )
  parser.add_argument(
    "--source",
    default="huggingface",
    help="where the model lies: huggingface (default), kaggle, gcs, s3, local, or a source of another package",
  )
  parser.add_argument("--revision", help="branch, tag or commit (default: the source's default)")
  parser.add_argument(
    "--download-path",
    help="directory that downloads are kept in (default: the source's cache; object stores are read in place)",
  )
  add_ignored_keys(parser)
  parser.add_argument("--dtype", help="dtype of the parameters, such as bfloat16 (default: as stored)")
  add_selectors(parser)
  return parser


# Options that choose one of several checkpoints of a place.
_SELECTORS = {
  "file": "name of a file, or a pattern such as '*Q8_0*', that chooses one of several checkpoints",
  "subfolder": "folder of the checkpoint within the place",
  "variant": "variant of the weights, as in model.fp16.safetensors",
}


def add_selectors(parser: argparse.ArgumentParser) -> None:
  """Adds the options that choose one of several checkpoints."""
  for name, text in _SELECTORS.items():
    parser.add_argument(f"--{name}", help=text)


def selectors_of(options: argparse.Namespace) -> dict[str, Any]:
  """The options that choose one of several checkpoints, as keyword arguments."""
  return {name: getattr(options, name) for name in _SELECTORS}


def add_ignored_keys(parser: argparse.ArgumentParser) -> None:
  """Adds `--ignore-config-key`."""
  parser.add_argument(
    "--ignore-config-key",
    metavar="KEY",
    action="append",
    default=[],
    help="a key of config.json to leave out, such as residual_multiplier or rope_scaling.factor; may be repeated",
  )


def where_of(options: argparse.Namespace) -> Where:
  """The place that the options name."""
  from models_automodel.where import Where

  return Where.of(
    options.model,
    model_source=options.source,
    revision=options.revision,
    model_download_path=options.download_path,
    **selectors_of(options),
  )


def mesh_arguments() -> argparse.ArgumentParser:
  """A parent parser with the mesh."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "--mesh",
    type=parse_mesh,
    help="axes of the mesh, such as fsdp=2,tp=4; a CPU simulates as many devices (default: one device)",
  )
  return parser
