"""Llama 3, 3.1, 3.2, 3.3 and the DeepSeek-R1 models distilled into them."""

from models_llama.llama3.params import BACKEND_MAPPINGS, FAMILY

__all__ = ["BACKEND_MAPPINGS", "FAMILY"]
