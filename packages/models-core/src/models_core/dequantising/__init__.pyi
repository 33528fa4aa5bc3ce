from .checkpoint import DequantisedCheckpoint, dequantised

__all__ = ["DequantisedCheckpoint", "dequantised"]
