"""`automodel env`: what a report of a problem needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from models_automodel.cli.arguments import Commands
from models_automodel.cli.messages import missing_backend
from models_automodel.cli.output import add_json, print_json
from models_automodel.cli.tables import is_terminal, of_environment, print_renderables

_PACKAGES = (
  *(
    "models-automodel",
    "models-core",
    "models-naming",
    "models-sources",
    "models-gemma",
    "models-llama",
    "models-qwen",
  ),
  *("jax", "jaxlib", "flax", "numpy", "rich", "tokenizers", "jinja2", "huggingface_hub", "orbax-checkpoint"),
)
_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE")


def add_env(commands: Commands) -> None:
  """Adds `automodel env`."""
  parser = commands.add_parser("env", help="show versions, devices and memory, for a report of a problem")
  parser.set_defaults(run=_env)
  add_json(parser)


def _env(options: argparse.Namespace) -> None:
  found = environment()
  if options.json:
    print_json(found)
    return
  if is_terminal():
    print_renderables(of_environment(found))
    return
  for name, value in found.items():
    if isinstance(value, dict):
      print(f"{name}:")
      for key, inner in value.items():
        print(f"  {key}: {inner}")
    else:
      print(f"{name}: {value}")


def environment() -> dict[str, Any]:
  """Versions, devices and memory, without names of the machine or the user."""
  import jax

  from models_automodel.cli.memory import free_host_bytes, gib

  versions = {name: version for name in _PACKAGES if (version := _version(name))}
  if (backend := missing_backend()) is None:
    devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
    backend = f"{jax.default_backend()}, {len(devices)} x {devices[0]}"
  free = free_host_bytes()
  return {
    "python": platform.python_version(),
    "system": f"{platform.system()} {platform.machine()}",
    "cores": os.cpu_count(),
    "free memory": "unknown" if free is None else gib(free),
    "backend": backend,
    "packages": versions,
    "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None
