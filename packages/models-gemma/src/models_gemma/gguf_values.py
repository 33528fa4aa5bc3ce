"""Tensors whose values in Gemma's GGUF files differ from those in Hugging Face's files."""

import numpy as np

from models_core.weights import Conversion


def _load(stored: np.ndarray) -> np.ndarray:
  return stored.astype(np.float32) - np.float32(1)


def _save(w: np.ndarray) -> np.ndarray:
  return w.astype(np.float32) + np.float32(1)


# Norms: GGUF files store 1 + w, Hugging Face's files store w.
FACTOR = Conversion(load=_load, save=_save)
