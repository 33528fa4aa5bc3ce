"""Qwen 2.5, Coder, Math, QwQ and the models distilled into them."""

from models_qwen.qwen2.params import FAMILY

__all__ = ["FAMILY"]
