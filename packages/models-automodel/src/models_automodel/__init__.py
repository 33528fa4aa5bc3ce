"""Pretrained models by one call: ``AutoModel.from_pretrained``."""
