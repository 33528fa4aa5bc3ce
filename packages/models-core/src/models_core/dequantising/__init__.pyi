from .checkpoint import DequantisedCheckpoint, dequantised, without_zero_biases

__all__ = ["DequantisedCheckpoint", "dequantised", "without_zero_biases"]
