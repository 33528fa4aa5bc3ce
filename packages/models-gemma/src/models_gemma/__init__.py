"""Gemma models as Flax NNX modules."""
