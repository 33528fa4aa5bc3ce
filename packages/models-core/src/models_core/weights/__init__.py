"""Weight tables and layouts: how the tensors of a checkpoint become the parameters of a model, as data.

This room knows nothing of files or models. May import: NumPy and `stacks` alone.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
