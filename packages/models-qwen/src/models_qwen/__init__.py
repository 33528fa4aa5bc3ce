"""Qwen models as Flax NNX modules."""
