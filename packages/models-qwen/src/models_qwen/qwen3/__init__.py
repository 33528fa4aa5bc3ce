"""Qwen 3, dense and mixture of experts, Coder and the model distilled into it."""

from models_qwen.qwen3.params import FAMILY

__all__ = ["FAMILY"]
