"""Weights handed from a trainer to a sampler: named and laid out as in a checkpoint, without leaving the devices.

May import: `adapters` and everything below it.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
