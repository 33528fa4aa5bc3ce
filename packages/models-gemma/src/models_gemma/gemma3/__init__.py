"""The language models of Gemma 3 and of models made from it, without the vision tower."""

from models_gemma.gemma3.params_safetensors import BACKEND_MAPPINGS, FAMILY

__all__ = ["BACKEND_MAPPINGS", "FAMILY"]
