"""Gemma 1, 1.1 and 2, CodeGemma and ShieldGemma."""

from models_gemma.gemma.params_safetensors import FAMILY

__all__ = ["FAMILY"]
