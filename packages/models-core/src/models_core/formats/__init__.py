"""The parts of a checkpoint: files, headers, tensors and the readers of their bytes, with a module for each format.

This room knows nothing of models. May import: the ground modules and `errors`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
