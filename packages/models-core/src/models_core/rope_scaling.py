"""Scalings of RoPE frequencies, as configurations state them. They need NumPy alone."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import numpy as np


class RopeScaling(Protocol):
  """Turns the plain inverse frequencies of a head into those of a longer context."""

  @property
  def magnitude(self) -> float:
    """Factor of cosines and sines."""

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """float64 [H/2] -> float64 [H/2]."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinearScaling:
  """Positions divided by a factor (arXiv:2306.15595)."""

  factor: float
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """float64 [H/2] -> float64 [H/2]."""
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
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """float64 [H/2] -> float64 [H/2]."""
    turns = self.original_max_position * inverse_frequencies / (2 * math.pi)
    smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return inverse_frequencies * ((1 - smooth) / self.factor + smooth)


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling:
  """Slow frequencies stretched, fast ones kept, a ramp between (arXiv:2309.00071), as transformers computes it.

  Other implementations multiply `attention_factor` with an `attn_factor` of config.json. transformers reads that
  key no more than it is a field here.

  Attributes:
    factor: by which slow frequencies shrink.
    original_max_position: context length in pretraining, in tokens.
    attention_factor: of cosines and sines; None derives it from `factor` and both mscales.
    beta_fast: turns within the original context from which on a frequency is kept.
    beta_slow: turns up to which it is stretched.
    mscale: weight of log(factor) in the attention factor, where `mscale_all_dim` is set, too.
    mscale_all_dim: the same in its denominator.
    truncate: the ramp starts and ends at whole indices.
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
    """float64 [H/2] -> float64 [H/2]."""
    if len(inverse_frequencies) < 2:
      raise ValueError("YaRN's ramp needs a head_dim of 4 or more")
    # The frequencies are powers of their second one, from which a number of turns gives an index.
    decay = -math.log(inverse_frequencies[1] / inverse_frequencies[0])
    low, high = (
      math.log(self.original_max_position / (turns * 2 * math.pi)) / decay
      for turns in (self.beta_fast, self.beta_slow)
    )
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    # The upper bound is a head's dimension, not a pair's.
    low, high = max(low, 0), min(high, 2 * len(inverse_frequencies) - 1)
    ramp = (np.arange(len(inverse_frequencies)) - low) / (high - low if high != low else 0.001)
    ramp = np.clip(ramp, 0.0, 1.0)
    return inverse_frequencies * (ramp / self.factor + 1 - ramp)


@dataclasses.dataclass(frozen=True, slots=True)
class FrequencyFactors:
  """One divisor for each frequency, as GGUF files store a scaling.

  Attributes:
    factors: H/2 numbers.
  """

  factors: tuple[float, ...]
  magnitude: ClassVar[float] = 1.0

  def scale(self, inverse_frequencies: np.ndarray) -> np.ndarray:
    """float64 [H/2] -> float64 [H/2]."""
    return inverse_frequencies / np.asarray(self.factors, np.float64)
