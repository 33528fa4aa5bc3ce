"""What is recomputed in the backward pass instead of being kept."""

import enum


class RematConfig(enum.Enum):
  """NONE keeps all activations, BLOCK recomputes each attention block, DECODER each layer."""

  NONE = "none"
  BLOCK = "block"
  DECODER = "decoder"
