"""Llama 3, 3.1, 3.2, 3.3 and the DeepSeek-R1 models distilled into them."""

from models_llama.llama3.params import FAMILY

__all__ = ["FAMILY"]
