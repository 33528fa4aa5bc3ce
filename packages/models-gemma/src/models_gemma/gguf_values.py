"""What Gemma's GGUF files store otherwise."""

import numpy as np

from models_core.weights import Conversion


def _load(stored: np.ndarray) -> np.ndarray:
  return stored.astype(np.float32) - np.float32(1)


def _save(w: np.ndarray) -> np.ndarray:
  return w.astype(np.float32) + np.float32(1)


# Norms hold the factor 1 + w, where Hugging Face's files hold w.
FACTOR = Conversion(load=_load, save=_save)
