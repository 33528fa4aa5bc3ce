"""Scalings of RoPE frequencies, as configurations state them. This module needs only NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import numpy as np


class RopeScaling(Protocol):
  """A scaling of RoPE, which adapts the frequencies of a head to a longer context."""

  @property
  def magnitude(self) -> float:
    """Factor of cosines and sines."""

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies in radians per token: float64 [H/2] -> float64 [H/2]."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling:
  """Divides all frequencies, and so all angles, by a factor (arXiv:2306.15595).

  Attributes:
    factor: the divisor.
  """

  factor: float
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies in radians per token: float64 [H/2] -> float64 [H/2]."""
    return inverse_frequencies / self.factor


@dataclasses.dataclass(frozen=True, slots=True)
class Llama3Scaling:
  """Stretches long wavelengths, keeps short ones, and interpolates between (Llama 3.1, `apply_scaling`).

  Attributes:
    factor: by which long wavelengths are multiplied.
    low_freq_factor: wavelengths of original_max_position / low_freq_factor tokens or more are stretched by `factor`.
    high_freq_factor: wavelengths of original_max_position / high_freq_factor tokens or less are kept.
    original_max_position: context length in pretraining, in tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies in radians per token: float64 [H/2] -> float64 [H/2]."""
    turns = self.original_max_position * inverse_frequencies / (2 * math.pi)
    smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return inverse_frequencies * ((1 - smooth) / self.factor + smooth)


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling:
  """Lowers low frequencies, keeps high ones, with a linear ramp between (arXiv:2309.00071), as transformers does.

  Other implementations multiply `attention_factor` by `attn_factor`, another key of config.json. transformers does not
  read that key, and there is no field for it here.

  Attributes:
    factor: divisor of low frequencies.
    original_max_position: context length in pretraining, in tokens.
    attention_factor: factor of cosines and sines. None derives it: 0.1 * log(factor) + 1, or, with both mscales,
      (0.1 * mscale * log(factor) + 1) / (0.1 * mscale_all_dim * log(factor) + 1).
    beta_fast: frequencies with at least as many turns within the original context are kept.
    beta_slow: frequencies with at most as many turns within the original context are divided by `factor`.
    mscale: for the derived attention factor; used only with `mscale_all_dim`.
    mscale_all_dim: for the derived attention factor; used only with `mscale`.
    truncate: whether the ramp starts and ends at whole indices.
  """

  factor: float
  original_max_position: int
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  @property
  def magnitude(self) -> float:
    """Factor of cosines and sines."""
    if self.attention_factor is not None:
      return self.attention_factor
    log = math.log(max(self.factor, 1.0))
    if self.mscale and self.mscale_all_dim:
      return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
    return 0.1 * log + 1

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies in radians per token: float64 [H/2] -> float64 [H/2].

    Raises:
      ValueError: if H is less than 4.
    """
    if len(inverse_frequencies) < 2:
      raise ValueError(
        f"YarnScaling needs a head_dim of at least 4, not {2 * len(inverse_frequencies)}: set another rope_scaling"
      )
    # Frequency i is exp(-decay * i), so that a number of turns within the context gives an index.
    decay = -math.log(inverse_frequencies[1] / inverse_frequencies[0])
    low, high = (
      math.log(self.original_max_position / (turns * 2 * math.pi)) / decay
      for turns in (self.beta_fast, self.beta_slow)
    )
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    # The upper bound is H - 1, not H/2 - 1, as in transformers.
    low, high = max(low, 0), min(high, 2 * len(inverse_frequencies) - 1)
    ramp = (np.arange(len(inverse_frequencies)) - low) / (high - low if high != low else 0.001)
    ramp = np.clip(ramp, 0.0, 1.0)
    return inverse_frequencies * (ramp / self.factor + 1 - ramp)


@dataclasses.dataclass(frozen=True, slots=True)
class FrequencyFactors:
  """Divides each frequency by a number of its own, as GGUF files store a scaling.

  Attributes:
    factors: H/2 divisors.
  """

  factors: tuple[float, ...]
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """Scales frequencies in radians per token: float64 [H/2] -> float64 [H/2]."""
    return inverse_frequencies / np.asarray(self.factors, np.float64)
