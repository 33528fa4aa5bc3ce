"""Rotary position embeddings (arXiv:2104.09864), with pairs (i, i + H/2) as in Hugging Face's checkpoints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models_core.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
  """The rotation of a head, as `rotate` takes it.

  Attributes:
    frequencies: float32 [H/2], in radians per token.
    magnitude: factor of cosines and sines.
  """

  frequencies: np.ndarray
  magnitude: float


def rotary(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotary:
  """Computes the frequencies theta^(-2i/H) for i < H/2, in radians per token, and applies a scaling.

  Args:
    head_dim: H.
    theta: base of the frequencies.
    scaling: None leaves them as they are.
  """
  # In float64, since position 32768 multiplies each rounding error by 32768.
  frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return Rotary(frequencies.astype(np.float32), 1.0)
  return Rotary(scaling.scale(frequencies).astype(np.float32), scaling.magnitude)


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
  """Rotates each pair (i, i + H/2) of a head by position * frequency radians.

  Args:
    x: [B, T, N, H].
    positions: int [B, T], in tokens.
    rotary: frequencies, and the factor of cosines and sines.

  Returns:
    [B, T, N, H] in the dtype of x; the angles and the products are float32.
  """
  angles = positions.astype(jnp.float32)[:, :, None, None] * rotary.frequencies[None, None, None]
  cos, sin = jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
