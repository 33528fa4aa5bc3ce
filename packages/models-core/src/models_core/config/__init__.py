"""config.json as fields of a configuration, the configuration in a GGUF header as config.json, and presets.

May import: `formats`, `layers`, the ground modules and `errors`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
