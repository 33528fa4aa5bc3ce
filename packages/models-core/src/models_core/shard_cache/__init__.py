"""The shard cache: what a load put on this process's devices, kept in files that a later load maps.

May import: `loading`, `saving`, and whatever these may import.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
