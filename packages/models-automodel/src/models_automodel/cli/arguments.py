"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from models_automodel.cli.mesh_argument import parse_mesh

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


def source_keywords(options: argparse.Namespace) -> dict[str, Any]:
  """Keyword arguments of `from_pretrained` that say where the model lies."""
  return {
    "model_source": options.source,
    "model_download_path": options.download_path,
    "revision": options.revision,
  }


def mesh_arguments() -> argparse.ArgumentParser:
  """The mesh; a parent of the commands' parsers."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "--mesh", type=parse_mesh, help="such as fsdp=2,tp=4; CPU devices are made up as needed"
  )
  return parser
