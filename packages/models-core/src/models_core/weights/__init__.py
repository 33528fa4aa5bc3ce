"""Weight tables and layouts: how the tensors of a checkpoint become the parameters of a model, as data.

This room knows nothing of files or models. May import: NumPy alone.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
