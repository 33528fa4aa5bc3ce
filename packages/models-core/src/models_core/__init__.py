"""Checkpoints as sharded Flax NNX modules: weight tables, load plans, loader and shared layers."""
