"""A mesh on the command line: `fsdp=2,tp=4`."""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import Mesh

MeshShape = dict[str, int]


def parse_mesh(text: str) -> MeshShape:
  """ "fsdp=2,tp=4" -> {"fsdp": 2, "tp": 4}.

  Raises:
    argparse.ArgumentTypeError: if it is not of that form.
  """
  parts = [part.strip() for part in text.split(",")]
  pairs = [re.fullmatch(r"([A-Za-z_]\w*)=([1-9]\d*)", part) for part in parts]
  if not all(pairs) or len({pair[1] for pair in pairs if pair}) != len(parts):
    raise argparse.ArgumentTypeError(f"{text!r} is no mesh; write it like fsdp=2,tp=4")
  return {pair[1]: int(pair[2]) for pair in pairs if pair}


def make_mesh(shape: MeshShape | None) -> Mesh | None:
  """The mesh over this process's devices; None without a shape.

  A CPU stands for as many devices as the mesh has, if JAX's backend has not started.

  Raises:
    TypeError: if there are too few devices.
  """
  import jax

  if shape is None:
    return None
  size = math.prod(shape.values())
  if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu"):
    jax.config.update("jax_num_cpu_devices", size)
  if size > jax.device_count():
    raise TypeError(
      f"a mesh of {size} devices was asked for, but {jax.default_backend()} has {jax.device_count()}"
    )
  return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:size])
