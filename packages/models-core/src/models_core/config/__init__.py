"""config.json as fields of a configuration, the configuration in a GGUF header as config.json, and presets.

May import: `formats`, the ground modules and `errors`.
"""

import lazy_loader

# Names and their modules stand in __init__.pyi; each module is imported when a name of it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
