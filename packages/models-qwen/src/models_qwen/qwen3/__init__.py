"""Qwen 3, dense and with experts, Coder, and the DeepSeek-R1 model distilled into it."""

from models_qwen.qwen3.params import BACKEND_MAPPINGS, FAMILY

__all__ = ["BACKEND_MAPPINGS", "FAMILY"]
