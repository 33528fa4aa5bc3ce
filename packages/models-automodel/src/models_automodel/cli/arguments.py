"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

from models_automodel.cli.mesh_argument import parse_mesh

if TYPE_CHECKING:
  from models_automodel.where import Where

# What `add_subparsers` gives.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def model_arguments() -> argparse.ArgumentParser:
  """The model, where it lies and the dtype of its parameters; a parent of the commands' parsers."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "model",
    help="repository id, local directory, GGUF file, gs:// or s3:// address, or a name such as llama-3.1-8b",
  )
  parser.add_argument("--source", default="huggingface", help="huggingface (default), local, ...")
  parser.add_argument("--revision", help="branch, tag or commit")
  parser.add_argument("--download-path", help="the source's cache directory")
  parser.add_argument("--dtype", help="of the parameters, such as bfloat16; as stored if left out")
  return parser


def where_of(options: argparse.Namespace) -> Where:
  """Where the model lies."""
  from models_automodel.where import Where

  return Where(options.model, options.source, revision=options.revision, download_path=options.download_path)


def mesh_arguments() -> argparse.ArgumentParser:
  """The mesh; a parent of the commands' parsers."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "--mesh", type=parse_mesh, help="such as fsdp=2,tp=4; CPU devices are made up as needed"
  )
  return parser
