"""The parts of a checkpoint: files, headers, tensors and the readers of their bytes, with a module for each format.

This room knows nothing of models. May import: the ground modules and `errors`.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
