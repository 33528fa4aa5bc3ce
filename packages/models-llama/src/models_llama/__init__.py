"""Llama models as Flax NNX modules."""
