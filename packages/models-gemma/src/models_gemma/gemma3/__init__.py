"""Gemma 3 and the models made from it: language models alone, without the vision tower."""

from models_gemma.gemma3.params_safetensors import FAMILY

__all__ = ["FAMILY"]
