"""A mesh on the command line: `fsdp=2,tp=4`."""

from __future__ import annotations

import argparse
import math
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import AbstractMesh, Mesh

MeshShape = dict[str, int]


def parse_mesh(text: str) -> MeshShape:
  """Parses the sizes of a mesh: "fsdp=2,tp=4" -> {"fsdp": 2, "tp": 4}.

  Raises:
    argparse.ArgumentTypeError: if the text has another form.
  """
  parts = [part.strip() for part in text.split(",")]
  pairs = [re.fullmatch(r"([A-Za-z_]\w*)=([1-9]\d*)", part) for part in parts]
  if not all(pairs) or len({pair[1] for pair in pairs if pair}) != len(parts):
    raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; write it like fsdp=2,tp=4")
  return {pair[1]: int(pair[2]) for pair in pairs if pair}


def abstract_mesh(shape: MeshShape | None) -> AbstractMesh | None:
  """A mesh of any size without devices, for plans; None without a shape, which is one device."""
  from jax.sharding import AbstractMesh, AxisType

  if shape is None:
    return None
  return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def make_mesh(shape: MeshShape | None) -> Mesh | None:
  """Makes a mesh over this process's devices; None without a shape.

  On a CPU, JAX simulates as many devices as the mesh needs, unless its backend has started already.

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
      f"the mesh needs {size} devices, but {jax.default_backend()} has {jax.device_count()}: choose smaller axes"
    )
  return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[:size])
