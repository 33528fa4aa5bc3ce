"""Qwen 2.5, Coder, Math, QwQ, and the DeepSeek-R1 models distilled into them."""

from models_qwen.qwen2.params import BACKEND_MAPPINGS, FAMILY

__all__ = ["BACKEND_MAPPINGS", "FAMILY"]
