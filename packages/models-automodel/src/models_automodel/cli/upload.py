"""`automodel upload`: a checkpoint of this machine goes to the hub."""

from __future__ import annotations

import argparse

from models_automodel.cli.arguments import Commands


def add_upload(commands: Commands) -> None:
  """Adds `automodel upload`."""
  parser = commands.add_parser(
    "upload",
    help="upload a directory to a repository of the hub, in one commit; a cut upload goes on when run again",
  )
  parser.set_defaults(run=_upload)
  parser.add_argument("directory", help="directory of safetensors files, with its config.json")
  parser.add_argument("repository", help="organisation/name; it is made if needed")
  parser.add_argument("--revision", help="branch that the commit goes to (default: main)")
  parser.add_argument("--message", default="Upload a checkpoint", help="of the commit")
  parser.add_argument(
    "--base-model", help="repository of the model that this one came from, for the model card"
  )
  parser.add_argument(
    "--private",
    action=argparse.BooleanOptionalAction,
    help="a repository that is made (default: the account's)",
  )


def _upload(options: argparse.Namespace) -> None:
  from models_automodel.hub import upload

  commit = upload(
    options.directory,
    options.repository,
    revision=options.revision,
    private=options.private,
    message=options.message,
    base_model=options.base_model,
  )
  print(f"{options.repository} at commit {commit}")
