"""Gemma 1, 1.1 and 2, CodeGemma and ShieldGemma."""

from models_gemma.gemma.params_safetensors import BACKEND_MAPPINGS, FAMILY

__all__ = ["BACKEND_MAPPINGS", "FAMILY"]
