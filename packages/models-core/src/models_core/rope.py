"""Rotary position embeddings (arXiv:2104.09864), halves rotated as Hugging Face stores them."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(Protocol):
  """Turns the plain inverse frequencies of a head into those of a longer context."""

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """float64 [H/2] -> float64 [H/2]."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling:
  """Positions divided by a factor (arXiv:2306.15595)."""

  factor: float

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    return inverse_frequencies / self.factor


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
  """Long wavelengths stretched, short ones kept, a smooth step between (Llama 3.1, `apply_scaling`).

  Attributes:
    factor: by which wavelengths beyond the low-frequency border grow.
    low_freq_factor: original_max_position over the wavelength from which on all is stretched.
    high_freq_factor: original_max_position over the wavelength up to which nothing is.
    original_max_position: context length in pretraining, in tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    turns = self.original_max_position * inverse_frequencies / (2 * math.pi)
    smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return inverse_frequencies * ((1 - smooth) / self.factor + smooth)


@dataclasses.dataclass(frozen=True, slots=True)
class FrequencyFactors:
  """One divisor for each frequency, as GGUF files store a scaling.

  Attributes:
    factors: H/2 numbers.
  """

  factors: tuple[float, ...]

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    return inverse_frequencies / np.asarray(self.factors, np.float64)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """theta^(-2i/H) for i < H/2, scaled. Computed in float64, so that the angle of position 32768 is right.

  Returns:
    float32 [H/2], radians per token.
  """
  frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is not None:
    frequencies = scaling.scale(frequencies)
  return frequencies.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """Rotates each pair (i, i + H/2) of a head by position * frequency.

  Args:
    x: [B, T, N, H].
    positions: [B, T], in tokens.
    frequencies: float32 [H/2].

  Returns:
    [B, T, N, H] in the dtype of x; the angles and the products are float32.
  """
  angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
