"""OLMo 2 as a Flax NNX module. AutoModel finds FAMILY by the entry point in `models.families`."""

from models_olmo2.params import FAMILY

__all__ = ["FAMILY"]
