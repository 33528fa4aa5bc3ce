"""Loading, from headers to arrays on devices: the abstract model, the load plan, and the loader that executes it.

May import: `family`, `config`, `formats`, `layers`, `weights`, the ground modules and `errors`, but not `saving`.
"""

import lazy_loader

# __init__.pyi lists the names and their modules; a module is imported when one of its names is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
