"""Rotary position embeddings (arXiv:2104.09864), halves rotated as Hugging Face stores them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models_core.rope_scaling import RopeScaling


class Rotary(NamedTuple):
  """What `rotate` turns heads by.

  Attributes:
    frequencies: float32 [H/2], radians per token.
    magnitude: factor of cosines and sines.
  """

  frequencies: np.ndarray
  magnitude: float


def rotary(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotary:
  """The frequencies theta^(-2i/H) for i < H/2 and their magnitude, with any scaling."""
  frequencies = _scaled(head_dim, theta, scaling)
  return Rotary(frequencies, 1.0 if scaling is None else scaling.magnitude)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """theta^(-2i/H) for i < H/2, scaled, where the scaling is one of frequencies alone.

  Returns:
    float32 [H/2], radians per token.

  Raises:
    ValueError: for a scaling that has a magnitude, too, which `rotary` gives.
  """
  if scaling is not None and scaling.magnitude != 1.0:
    raise ValueError(
      f"{type(scaling).__name__} also scales cosines and sines: call rotary(), and rotate() by both"
    )
  return _scaled(head_dim, theta, scaling)


def _scaled(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """Computed in float64, so that the angle of position 32768 is right."""
  frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is not None:
    frequencies = scaling.scale(frequencies)
  return frequencies.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray, magnitude: float = 1.0) -> jax.Array:
  """Rotates each pair (i, i + H/2) of a head by position * frequency.

  Args:
    x: [B, T, N, H].
    positions: [B, T], in tokens.
    frequencies: float32 [H/2].
    magnitude: factor of cosines and sines.

  Returns:
    [B, T, N, H] in the dtype of x; the angles and the products are float32.
  """
  angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
  cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
