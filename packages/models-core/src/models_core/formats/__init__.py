"""What checkpoints are made of: files, headers, tensors, and the readers of their bytes; one module a format.

Formats know no model. May import: the ground modules and `errors`.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
