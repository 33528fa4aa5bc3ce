"""Qwen 3, dense and with experts, Coder, and the DeepSeek-R1 model distilled into it."""

from models_qwen.qwen3.params import FAMILY

__all__ = ["FAMILY"]
