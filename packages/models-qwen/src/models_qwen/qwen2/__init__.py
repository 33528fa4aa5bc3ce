"""Qwen 2.5, Coder, Math, QwQ, and the DeepSeek-R1 models distilled into them."""

from models_qwen.qwen2.params import FAMILY

__all__ = ["FAMILY"]
