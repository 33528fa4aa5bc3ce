"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, TypeAlias

from models_automodel.cli.mesh_argument import parse_mesh
from models_automodel.cli.output import print_error

if TYPE_CHECKING:
  from models_automodel.where import Where

_DTYPES = ("bfloat16", "float16", "float32", "float64")
# The type that `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def model_arguments() -> argparse.ArgumentParser:
  """A parent parser with the model, its source and the dtype of its parameters."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "model",
    help="repository id, a published model's name such as llama-3.1-8b, local directory, GGUF file, or gs:// or s3:// "
    "address; org/repo:Q8_0 and org/repo/folder choose a part",
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
  parser.add_argument(
    "--dtype",
    choices=_DTYPES,
    help="dtype of the parameters (default: as stored; for generate and chat, the fastest here)",
  )
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
    _repository(options.model) if options.source == "huggingface" else options.model,
    model_source=options.source,
    revision=options.revision,
    model_download_path=options.download_path,
    **selectors_of(options),
  )


def _repository(model: str) -> str:
  """The repository of a published model's name, such as "meta-llama/Llama-3.1-8B"; another text stays as it is."""
  if os.sep in model or os.path.exists(model):
    return model
  import models_naming

  name, tag, quantisation = model.partition(":")
  for model_id in (i for ids in models_naming.known_model_ids().values() for i in ids):
    if model_id.rpartition("/")[2].casefold() == name.casefold():
      print_error(f"{name} is {model_id}")
      return f"{model_id}{tag}{quantisation}"
  return model


def mesh_arguments() -> argparse.ArgumentParser:
  """A parent parser with the mesh."""
  parser = argparse.ArgumentParser(add_help=False)
  parser.add_argument(
    "--mesh",
    type=parse_mesh,
    help="axes of the mesh, such as fsdp=2,tp=4; a CPU simulates as many devices (default: one device)",
  )
  return parser


def token_count(text: str) -> int:
  """Parses a number of tokens.

  Raises:
    argparse.ArgumentTypeError: if the text is no positive whole number.
  """
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens: write it like 8192")
  return int(text)
