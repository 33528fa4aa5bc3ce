"""What the initialisation of LoRA factors takes out of the weights that they belong to.

peft sets the factors of PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) to a part of each weight and subtracts
this part. It does so again when it loads the trained factors onto the base, and only the name of the initialisation is
stored: the part follows from the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def _pissa(w: np.ndarray, rank: int, scale: float) -> np.ndarray:
  """w without its largest singular values, as many as the rank."""
  u, s, v = np.linalg.svd(w.astype(np.float32), full_matrices=False)
  return w - (u[:, :rank] * s[:rank]) @ v[:rank]


def _olora(w: np.ndarray, rank: int, scale: float) -> np.ndarray:
  """w without the first columns of Q times the first rows of R, of w = Q @ R."""
  q, r = np.linalg.qr(w.astype(np.float32))
  return w - np.float32(scale) * (q[:, :rank] @ r[:rank])


# The value of init_lora_weights -> (weight [out, in], rank, scale of the factors) -> what remains of the weight.
INITIAL: Mapping[str, Callable[[np.ndarray, int, float], np.ndarray]] = {"pissa": _pissa, "olora": _olora}
