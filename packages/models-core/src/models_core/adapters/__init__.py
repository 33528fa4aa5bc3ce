"""LoRA adapters: taken from models, merged into weights, read and written in peft's format; patterns of module paths.

May import: `loading`, `saving` and everything below them.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
