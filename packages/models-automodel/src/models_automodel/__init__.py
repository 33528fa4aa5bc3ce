"""Pretrained models by one call: `AutoModel.from_pretrained`."""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
